"""On a device that is elsewhere the samplers write the texts of a CPU, and look there once a round."""

import math

import pytest
import torch
from helpers import remote, tiny, voices
from helpers.remote import There
from helpers.voices import NEW, PERSONAS, Recorder, chats, speak
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

import personafast as pf
from personafast import generate, ops
from personafast.density.draft import Draft
from personafast.density.scr import ScrOptions

pytestmark = pytest.mark.filterwarnings("ignore")
SAMPLED = {"do_sample": True}
LINEAR = pf.Persona(policies={"formal": 0.5, "stern": 0.5}, aggregator="linear")
LEAST = pf.Persona(policies={"formal": 0.4, "stern": 0.6}, aggregator="min")
BATCH = [pf.Persona(vectors={"creative": 2.0}, policies={"warm": 0.7}), None, PERSONAS["prompts"]]


def own(ratios, weights):
    """A geometric blend by hand."""
    return (weights.view(-1, *[1] * (ratios.dim() - 1)) * ratios).sum(0)


class World:
    """The same model and policies twice: on the CPU, and elsewhere."""

    def __init__(self):
        self.here = tiny.model()
        self.library = tiny.library(self.here, masks=False)
        self.here_handle = self.attached(self.here, voices.policies(self.here))
        self.there = tiny.model()
        policies = voices.policies(self.there)
        for model in (*policies.models, self.there):
            remote.moved(model)
        self.there_handle = self.attached(self.there, policies)

    def attached(self, net, policies):
        return pf.attach(net, self.library, policies=policies, tokenizer=tiny.tokenizer(), graphs=True)

    def on_cpu(self, personas, batch=None, **options):
        return speak(self.here, self.here_handle, batch or chats(), personas, **options)

    def elsewhere(self, personas, batch=None, **options):
        batch = {name: There(tensor) for name, tensor in (batch or chats()).items()}
        return speak(self.there, self.there_handle, batch, personas, **options)


@pytest.fixture(scope="module")
def world():
    with ops.use_backend("reference"), remote.device():
        yield World()


@pytest.fixture(autouse=True)
def watch(monkeypatch):
    """What is read while rounds go on."""
    found, run = remote.Watch(), generate._Call.run

    def watched(call, sampler):
        with remote.watching() as seen:
            try:
                run(call, sampler)
            finally:
                found.reads[:], found.peeks[:] = seen.reads, seen.peeks

    monkeypatch.setattr(generate._Call, "run", watched)
    with ops.use_backend("reference"):
        yield found


def same_text(world, watch, personas, **options):
    """Both texts are one, and every round read once; the stats of both."""
    options = {"return_dict_in_generate": True, "seed": 5, "max_new_tokens": 6, **options}
    here = world.on_cpu(personas, **options)
    there = world.elsewhere(personas, **options)
    assert isinstance(there.sequences, There)
    assert torch.equal(there.sequences.here, here.sequences)
    assert watch.peeks == []
    assert len(watch.reads) == there.stats.rounds == here.stats.rounds, watch.reads
    assert torch.equal(there.stats.row_rounds, here.stats.row_rounds)
    if here.stats.log_z is not None:
        torch.testing.assert_close(there.stats.log_z.here, here.stats.log_z, atol=1e-4, rtol=1e-4)
    counted = ("tokens", "proposed", "accepted", "accepted_lengths", "scored", "clipped", "salvaged", "exact")
    for name in counted:
        assert getattr(there.stats, name) == getattr(here.stats, name), name
    return here.stats, there.stats


@pytest.mark.parametrize("kind", PERSONAS)
@pytest.mark.parametrize(
    ("sampler", "draft"), [("verify", "merge"), ("verify", "ngram"), ("block", "reference"), ("verify", "reference")]
)
def test_drafts_of_every_kind_are_verified_with_one_read(world, watch, sampler, draft, kind):
    if kind in ("mixed", "prompts") and draft == "merge":
        pytest.skip("prompts cannot be merged")
    same_text(world, watch, PERSONAS[kind], sampler=sampler, draft=draft, chunk=3, **SAMPLED)


@pytest.mark.parametrize("kind", PERSONAS)
@pytest.mark.parametrize("sampler", ["direct", "token_rs", "scr"])
def test_one_read_a_token_or_chunk(world, watch, sampler, kind):
    same_text(world, watch, PERSONAS[kind], sampler=sampler, **SAMPLED)


@pytest.mark.parametrize("sampler", ["direct", "block"])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 12},
        {"min_p": 0.1},
        {"min_p": 0.0},
        {"policy_temperature": 1.3},
        # These look at ids, which stand at other places in every row.
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"draft_doubt": 1.0, "chunk": 5},
    ],
)
def test_whatever_acts_on_the_target(world, watch, sampler, options):
    if sampler == "direct" and "chunk" in options:
        pytest.skip("nothing is drafted")
    same_text(world, watch, PERSONAS["separate"], sampler=sampler, **{**SAMPLED, **options})


@pytest.mark.parametrize("sampler", ["direct", "verify", "block", "token_rs", "mixture", "scr"])
def test_rows_that_end_in_the_middle(world, watch, sampler):
    chunk = {} if sampler in ("direct", "token_rs", "scr") else {"chunk": 2}
    ends = {"eos_token_id": list(range(5, 16)), "max_new_tokens": 14, "seed": 2}
    here, _ = same_text(world, watch, LINEAR, sampler=sampler, **ends, **chunk, **SAMPLED)
    assert len(set(here.row_rounds.tolist())) > 1


@pytest.mark.parametrize("sampler", ["direct", "block", "scr"])
@pytest.mark.parametrize(
    "personas",
    [
        BATCH,
        LEAST,
        pf.Persona(policies={"formal": 0.7, "stern": 0.4}, aggregator=own),
        pf.Persona(policies={"formal": 1.5, "stern": -0.5}, aggregator="linear"),
        pf.Persona(policies={"formal": 0.8}, base="stern"),
        pf.Persona(policies={"formal": 0.8}, base="stern", aggregator="harmonic"),
        [pf.Persona(policies={"formal": 0.8}, base="stern", aggregator=own), PERSONAS["lora"], LINEAR],
    ],
    ids=["batch", "min", "function", "negative", "base", "harmonic base", "function on a base"],
)
def test_every_rule_is_settled_on_the_host(world, watch, sampler, personas):
    if personas is BATCH and sampler == "scr":
        pytest.skip("scr needs policies in every row")
    here, there = same_text(world, watch, personas, sampler=sampler, **SAMPLED)
    assert (here.clamped_share is None) == (there.clamped_share is None)
    if here.clamped_share is not None and sampler in ("direct", "token_rs"):  # elsewhere drafts may be longer
        assert there.clamped_share == pytest.approx(here.clamped_share, rel=1e-3)


@pytest.mark.parametrize("sampler", ["direct", "block"])
def test_positions_and_schedules_are_worked_out_on_the_device(world, watch, sampler):
    policies, creative = {"warm": 0.7}, {"creative": 2.0}
    steps = [
        pf.Steering(creative, positions="response", schedule="linear:4"),
        pf.Steering({"futurist": 1.0}, "ablate", positions=[(0, 2), (-1, None)]),
    ]
    personas = [pf.Persona(policies=policies, steering=steps), None, pf.Persona(creative, policies=policies)]
    same_text(world, watch, personas, sampler=sampler, **SAMPLED)


@pytest.mark.parametrize("sampler", ["direct", "verify", "token_rs", "mixture"])
def test_ratios_are_carried_on_the_device(world, watch, sampler):
    same_text(world, watch, LINEAR, sampler=sampler, carry=True, **SAMPLED)


def test_scr_with_ratios_carried_and_a_proposal_of_another_temperature(world, watch):
    options = ScrOptions(carry=True, proposal_temperature=1.3, chunk=3, gamma=4.0, retries=2)
    here, _ = same_text(world, watch, LINEAR, sampler="scr", scr_options=options, max_new_tokens=20, **SAMPLED)
    assert here.exact > 0


def test_tokens_are_streamed_from_the_host(world, watch):
    recorders = [Recorder(), Recorder()]
    batch = voices.row_of(chats(), 0)
    world.on_cpu(PERSONAS["lora"], batch, streamer=recorders[0], **SAMPLED, seed=3)
    world.elsewhere(PERSONAS["lora"], batch, streamer=recorders[1], **SAMPLED, seed=3)
    assert len(recorders[0].seen) == len(recorders[1].seen) == NEW + 1
    assert all(torch.equal(a, b) for a, b in zip(*(found.seen for found in recorders), strict=True))
    assert len(watch.reads) == NEW and not watch.peeks


def test_a_stopping_criterion_looks_at_the_device_on_its_own_account(world, watch):
    asked = []

    def stops(ids, scores, **_):
        asked.append(type(ids))
        return ids[:, -1] % 5 == 0

    options = {"seed": 3, "max_new_tokens": 12, **SAMPLED}
    here = world.on_cpu(PERSONAS["lora"], stopping_criteria=StoppingCriteriaList([stops]), **options)
    asked.clear()
    there = world.elsewhere(PERSONAS["lora"], stopping_criteria=StoppingCriteriaList([stops]), **options)
    assert torch.equal(there.here, here) and here.shape[1] <= 12
    assert set(asked) == {There} and watch.peeks == []
    assert len(watch.reads) <= 12 + len(asked)


class Nothing(LogitsProcessor):
    def __call__(self, ids, scores):
        return torch.full_like(scores, -math.inf)


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("sampler", ["direct", "verify", "block", "token_rs"])
def test_a_target_without_any_token_is_found_with_the_rounds_read(world, watch, sampler, sample):
    with pytest.raises(pf.PersonafastError, match="target: row 0 .* no token left"):
        processors = LogitsProcessorList([Nothing()])
        world.elsewhere(PERSONAS["lora"], sampler=sampler, do_sample=sample, logits_processor=processors)
    assert watch.peeks == [] and len(watch.reads) == 1


@pytest.mark.parametrize("sampler", ["direct", "verify", "block", "token_rs", "scr", "mixture"])
def test_logits_that_are_no_numbers_are_found_with_the_rounds_read(world, watch, sampler):
    weight = next(m for m in world.there_handle.cast.policies.models).lm_head.weight.here
    kept = weight[7].clone()
    weight[7] = math.nan
    draft = {"draft": "reference"} if sampler in ("verify", "block") else {}
    personas = pf.Persona(policies={"stern": 1.0}, aggregator="linear")
    try:
        with pytest.raises(pf.PersonafastError, match=r"policies\['stern'\]: its logits are not finite .row 0"):
            world.elsewhere(personas, sampler=sampler, **draft, **SAMPLED)
    finally:
        weight[7] = kept
    assert watch.peeks == [] and len(watch.reads) == 1


class Repeats:
    """A drafter of a caller's own: it drafts the last token twice, with or without a law, and knows only the CPU."""

    def __init__(self, law):
        self.law = law

    def draft(self, transcript, draws, chunk):
        last = transcript.ids()[:, -1:].expand(-1, min(2, chunk))
        law = torch.full((*last.shape, tiny.VOCAB), -math.log(tiny.VOCAB)) if self.law else None
        lengths = torch.full((last.shape[0],), last.shape[1], dtype=torch.int32)
        return Draft(last, law, lengths, deterministic=not self.law)

    def commit(self, tokens, counts):
        assert type(tokens) is type(counts) is torch.Tensor

    def keep(self, rows):
        assert type(rows) is torch.Tensor


@pytest.mark.parametrize("law", [False, True])
def test_a_drafter_of_a_callers_own_may_draft_on_the_cpu(world, watch, law):
    same_text(world, watch, PERSONAS["lora"], sampler="verify", draft=Repeats(law), **SAMPLED)


def test_the_device_of_these_tests_sees_who_looks():
    with remote.device() as device, remote.watching() as seen:
        x = torch.arange(4.0, device=device)
        assert isinstance(x, There) and x.device == device
        looks = [
            lambda: bool(x.any()),
            lambda: x.sum().item(),
            lambda: x.tolist(),
            lambda: x.nonzero(),
            lambda: x[x > 1],
            lambda: x[torch.tensor([0])],
            lambda: torch.equal(x, x),
            lambda: x.unique(),
            lambda: torch.tensor([1.0], device=device),
            lambda: x.copy_(torch.ones(4)),
        ]
        for n, look in enumerate(looks, 1):
            look()
            assert len(seen.peeks) == n
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(4)
        fine = x[torch.arange(2, device=device)] + torch.ones(2).to(device, non_blocking=True)
        assert len(seen.peeks) == len(looks) and not seen.reads
        assert type(fine.cpu()) is torch.Tensor and len(seen.reads) == 1
