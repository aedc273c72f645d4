"""What goes wrong in a call is named before any token is streamed, and leaves model and handle as they were."""

import copy
import math

import pytest
import torch
from helpers import exact, tiny, voices
from helpers.voices import NEW, PERSONAS, Recorder, chats, row_of, speak
from transformers import LogitsProcessor, LogitsProcessorList

import personafast as pf
from personafast.density.draft import Draft
from personafast.density.scr import ScrOptions
from personafast.models.anatomy import anatomy

pytestmark = [pytest.mark.usefixtures("reference_backend"), pytest.mark.filterwarnings("ignore:A decoder-only")]
EXACT = ("direct", "verify", "block", "token_rs")


@pytest.fixture
def handle(net):
    with voices.attach(net) as found:
        yield found


class Says:
    """A drafter that gives what it is told to."""

    def __init__(self, make):
        self.make = make

    def draft(self, transcript, draws, chunk):
        return self.make(transcript.alive.numel())

    def commit(self, tokens, counts):
        pass

    def keep(self, rows):
        pass


def refused(net, handle, message, persona=PERSONAS["separate"], **more):
    """The call fails by name, with nothing but the prompt streamed."""
    batch, recorder = chats("what is this"), Recorder()
    with pytest.raises(pf.PersonafastError, match=message) as caught:
        speak(net, handle, batch, persona, streamer=recorder, **more)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(seen, batch["input_ids"]) for seen in recorder.seen) and len(recorder.seen) <= 1


def tokens(rows, *ids):
    return torch.tensor([ids] * rows)


def full(rows, count):
    return torch.full((rows,), count, dtype=torch.int32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda n: Draft(tokens(n, 4, 5), None, full(n, 2)), "draft: the probabilities are missing"),
        (lambda n: Draft(tokens(n, 4, 64), None, full(n, 2), True), "hold 64, expected 0 to 63"),
        (lambda n: Draft(tokens(n, 4, -1), None, full(n, 2), True), "hold -1, expected 0 to 63"),
        (lambda n: Draft(tokens(n, 4), None, full(n, 2), True), "`lengths` of row 0 is 2, expected 0 to 1"),
        (lambda n: Draft(tokens(n, *[4] * 9), None, full(n, 2), True), "with j at most 8"),
        (lambda n: Draft(tokens(n, 4), torch.zeros(n, 1, 63), full(n, 1)), "expected floating .1, 1, 64"),
        (lambda n: Draft(tokens(n, 4), torch.zeros(n, 1, 64), full(n, 1)), "sums to 64, expected 1"),
    ],
)
@pytest.mark.parametrize("sampler", ["verify", "block"])
def test_a_draft_that_cannot_be_is_refused(net, handle, sampler, make, message):
    refused(net, handle, message, sampler=sampler, draft=Says(make), do_sample=True)


def test_a_draft_model_needs_the_references_vocabulary_and_is_left_as_it_was(net, handle):
    refused(
        net,
        handle,
        "draft: the model has a vocabulary of 8 tokens, the reference one of 64",
        sampler="block",
        draft=exact.model(1),
    )
    small = tiny.model(seed=9)
    before = {name: value.clone() for name, value in small.state_dict().items()}
    speak(net, handle, chats(), PERSONAS["separate"], sampler="block", draft=small)
    assert all(torch.equal(value, before[name]) for name, value in small.state_dict().items())
    assert not any("forward" in part.__dict__ or part._forward_hooks for part in small.modules())


@pytest.mark.parametrize("sampler", ["direct", "verify", "block", "token_rs", "scr"])
def test_a_separate_model_with_nan_is_named_before_any_token(net, sampler):
    given = voices.policies(net)
    with torch.no_grad():
        next(given["jolly"].model.parameters())[5] = math.nan
        given["jolly"].model.lm_head.weight[7] = math.nan
    with voices.attach(net, given) as handle:
        draft = {"draft": "reference"} if sampler in ("verify", "block") else {}
        message = r"policies\['jolly'\]: its logits are not finite .row 0"
        for do_sample in (True, False):
            refused(net, handle, message, sampler=sampler, do_sample=do_sample, **draft)
        one = pf.Persona(policies={"stern": 1.0})
        assert speak(net, handle, chats(), one).shape == (3, NEW)


def test_a_mixture_names_the_policy_with_nan_when_it_speaks(net):
    given = voices.policies(net)
    with torch.no_grad():
        given["jolly"].model.lm_head.weight[7] = math.nan
    persona = pf.Persona(policies={"stern": 0.01, "jolly": 1.0}, aggregator="linear")
    with voices.attach(net, given) as handle:
        refused(net, handle, r"policies\['jolly'\]: its logits", persona, sampler="mixture", do_sample=True, seed=1)


class Nothing(LogitsProcessor):
    def __call__(self, ids, scores):
        return torch.full_like(scores, -math.inf)


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("sampler", EXACT)
def test_a_target_without_any_token_is_named(net, handle, sampler, do_sample):
    processors = LogitsProcessorList([Nothing()])
    refused(
        net, handle, "target: row 0 .* no token left", sampler=sampler, do_sample=do_sample, logits_processor=processors
    )


def test_weights_without_a_total_are_refused_and_zero_weights_are_the_plain_model(net, handle):
    for rule in ("linear", "harmonic", "min"):
        with pytest.raises(pf.PersonafastError, match="the weights sum to 0"):
            pf.Persona(policies={"stern": 0.0, "jolly": 0.0}, aggregator=rule)
    with pytest.raises(pf.PersonafastError, match="the weights sum to 0"):
        pf.Persona(policies={"stern": 1.0, "jolly": -1.0}, aggregator="linear")
    batch = chats()
    nothing = pf.Persona(policies={"stern": 0.0, "formal": 0.0})
    for sampler in ("direct", "block", "auto"):
        assert torch.equal(speak(net, handle, batch, nothing, sampler=sampler), speak(net, handle, batch, None))


@pytest.mark.parametrize("sampler", ["direct", "block", "token_rs"])
def test_a_negative_weight_in_a_linear_rule_warns_and_is_reported(net, handle, sampler):
    batch, options = chats(), {"do_sample": True, "seed": 1, "sampler": sampler, "return_dict_in_generate": True}
    persona = pf.Persona(policies={"stern": 1.5, "formal": -0.5}, aggregator="linear")
    with pytest.warns(UserWarning, match="negative weight under the linear rule"):
        stats = speak(net, handle, batch, persona, **options).stats
    assert 0 < stats.clamped_share < 0.5
    refused(
        net, handle, "'mixture' cannot sample row 0: a weight is negative", persona, sampler="mixture", do_sample=True
    )
    assert speak(net, handle, batch, PERSONAS["lora"], **options).stats.clamped_share is None


class Stop(Exception):
    """A user's own."""


class Breaks:
    """A processor and a rule that fail when they are called for the n-th time."""

    def __init__(self, calls):
        self.calls = calls

    def __call__(self, first, second):
        self.calls -= 1
        if not self.calls:
            raise Stop
        return second if first.dtype == torch.long else first.sum(0)


@pytest.fixture
def peft_model():
    """An adapter is active, and another one is there."""
    peft = pytest.importorskip("peft")
    configs = [
        peft.LoraConfig(r=3, lora_alpha=3, target_modules=names) for names in (["q_proj", "up_proj"], ["v_proj"])
    ]
    wrapped = peft.get_peft_model(tiny.model(), configs[0], adapter_name="live")
    wrapped.add_adapter("other", configs[1])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, parameter in wrapped.named_parameters():
            if ".lora_" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    wrapped.set_adapter("live")
    return wrapped.eval()


@torch.no_grad()
def logits(net):
    return net(**chats("what is this"), use_cache=False).logits


@pytest.mark.parametrize("calls", [1, 4])
@pytest.mark.parametrize("sampler", ["direct", "verify", "block", "token_rs"])
@pytest.mark.parametrize("where", ["rule", "processor"])
def test_an_exception_of_a_users_own_leaves_model_and_handle_usable(peft_model, sampler, where, calls):
    net, batch = peft_model, chats()
    before = logits(net)
    given = pf.PolicySet.from_adapters(net) | pf.PolicySet.from_models(net, {"stern": voices.apart(tiny.model(), 21)})
    persona = pf.Persona(policies={"live": 0.5, "other": 0.5, "stern": 0.5})
    options = {"sampler": sampler, "do_sample": True, "seed": 1, "chunk": 2}
    with pf.attach(net, policies=given, tokenizer=tiny.tokenizer()) as handle:
        fresh = speak(net, handle, batch, persona, **options)
    with pf.attach(net, policies=given, tokenizer=tiny.tokenizer()) as handle:
        with pytest.raises(Stop):
            if where == "rule":
                failing = pf.Persona(policies=persona.policies, aggregator=Breaks(calls))
                speak(net, handle, batch, failing, **options)
            else:
                speak(net, handle, batch, persona, logits_processor=LogitsProcessorList([Breaks(calls)]), **options)
        assert torch.equal(logits(net), before), "the adapters are still off"
        assert torch.equal(speak(net, handle, batch, persona, **options), fresh)


def test_a_rule_that_gives_something_else_is_told_what_is_needed(net, handle):
    for rule, message in ((lambda r, w: r, r"gave \[2, 1, 64\]"), (lambda r, w: 3.0, "gave float")):
        refused(net, handle, message, pf.Persona(policies={"stern": 1.0, "formal": 1.0}, aggregator=rule))


def test_vectors_and_masks_of_the_reference_do_not_reach_separate_models(net):
    with voices.attach(net, masks=True) as handle:
        for more in ({"vectors": {"creative": 1.0}}, {"mask": "introvert"}):
            for names in ({"policies": {"stern": 1.0}}, {"policies": {"formal": 1.0}, "base": "stern"}):
                refused(net, handle, r"policies\['stern'\] is a model of its own", pf.Persona(**names, **more))
        lora = pf.Persona(policies={"formal": 1.0, "pirate": 0.5}, vectors={"creative": 1.0}, mask="introvert")
        batch = chats()
        expected = speak(net, handle, batch, lora)
        for draft in ("reference", "merge"):
            assert torch.equal(speak(net, handle, batch, lora, sampler="block", draft=draft), expected)


def test_a_name_in_library_and_set_is_refused_and_nothing_is_patched(net):
    given = pf.PolicySet.from_models(net, {"formal": voices.apart(net, 21)})
    with pytest.raises(pf.PersonafastError, match=r"policies\['formal'\]: the library has a policy of that name too"):
        voices.attach(net, given)
    for model in (net, *given.models):
        assert not any("forward" in part.__dict__ or part._forward_hooks for part in model.modules())
    library = tiny.library(net, masks=False)
    with pf.attach(net, library, policies=voices.policies(net), tokenizer=tiny.tokenizer()) as handle:
        library.add_policy("stern", tiny.policy(net, 3))
        refused(net, handle, r"policies\['stern'\]: the library has a policy of that name too")


def test_policies_of_another_reference_are_refused(net):
    with pytest.raises(pf.PersonafastError, match="policies: their reference is another model"):
        pf.attach(tiny.model(seed=1), policies=voices.policies(net))


@pytest.mark.parametrize("sampler", ["direct", "block"])
def test_adapters_of_a_live_model_compute_what_they_do_by_hand(peft_model, sampler):
    net, batch = peft_model, chats("what is this")
    before = logits(net)
    alphas = {"live": 0.7, "other": 0.8}
    ids = batch["input_ids"]
    for _ in range(NEW):
        with torch.no_grad():
            with net.disable_adapter():
                logp0 = net(ids, use_cache=False).logits[:, -1].log_softmax(-1)
            target = logp0
            for name, alpha in alphas.items():
                net.set_adapter(name)
                target = target + alpha * (net(ids, use_cache=False).logits[:, -1].log_softmax(-1) - logp0)
        ids = torch.cat([ids, target.argmax(-1, keepdim=True)], dim=1)
    net.set_adapter("live")
    given = pf.PolicySet.from_adapters(net)
    with pf.attach(net, policies=given, tokenizer=tiny.tokenizer()) as handle:
        found = speak(net, handle, batch, pf.Persona(policies=alphas), sampler=sampler, min_p=0.0)
        torch.testing.assert_close(logits(net), before)
    assert torch.equal(found, ids[:, -NEW:])
    assert torch.equal(logits(net), before)


def test_detach_restores_separate_models_and_merges_bit_for_bit(net):
    given = voices.policies(net)
    models = [net, *given.models]
    before = [(copy.deepcopy(model.state_dict()), logits(model)) for model in models]
    handle = voices.attach(net, given)
    for sampler in ("direct", "block", "merge"):
        speak(net, handle, chats(), PERSONAS["separate"], sampler=sampler)
    merged = given.merged(PERSONAS["separate"].policies)
    handle.detach()
    for model, (state, expected) in zip(models, before, strict=True):
        assert torch.equal(logits(model), expected)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for model in (*models, merged):
        assert anatomy(model).blocks
        for part in model.modules():
            assert "forward" not in part.__dict__ and not part._forward_hooks and not part._forward_pre_hooks
    with pytest.raises(pf.PersonafastError, match="detached"):
        speak(net, handle, chats(), None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"personas": "creative"}, "personas: expected Persona or None, got str"),
        ({"scr_options": {"chunk": 3}, "sampler": "scr"}, "scr_options: expected ScrOptions or None, got dict"),
        ({"seed": "x"}, "seed: 'x' is not a whole number"),
        ({"seeds": [1.5]}, "seeds: expected one whole number a row"),
        ({"seeds": 5}, "seeds: expected one whole number a row, got 5"),
        ({"min_p": "0.1"}, "min_p: '0.1' is not a number"),
        ({"policy_temperature": "1"}, "policy_temperature: '1' is not a number"),
        ({"draft": 5, "sampler": "block"}, "draft: expected one of auto, .*, got int"),
    ],
)
def test_what_is_of_the_wrong_kind_is_named(net, handle, more, message):
    options = {"personas": pf.Persona(policies={"formal": 0.5}), "do_sample": True, **more}
    with pytest.raises(pf.PersonafastError, match=f"^{message}"):
        speak(net, handle, row_of(chats(), 0), options.pop("personas"), **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda net: ScrOptions(chunk="4"), "chunk: '4' is not a whole number"),
        (lambda net: ScrOptions(gamma="2"), "gamma: '2' is not a number"),
        (lambda net: pf.Persona(policies={"p": 1}, aggregator="power", p="2"), "p: '2' is not a finite number"),
        (lambda net: pf.Persona(policies={"p": 1}, aggregator=["linear"]), r"aggregator: \['linear'\] is not one of"),
        (lambda net: pf.attach(net, "personas/"), "library: expected a PersonaLibrary or None, got str"),
        (lambda net: pf.attach(net, policies={"a": net}), "policies: expected a PolicySet or None, got dict"),
        (lambda net: pf.attach("gpt2"), "model: expected a transformers causal LM, got str"),
        (lambda net: pf.PolicySet.from_prompts(net, {"a": "b"}).merged(["a"]), "weights: expected a mapping"),
    ],
)
def test_constructors_name_what_is_of_the_wrong_kind(net, make, message):
    with pytest.raises(pf.PersonafastError, match=f"^{message}"):
        make(net)
