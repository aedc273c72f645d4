"""What users plug into `generate` beside personas: processors and criteria see every row as stock generate shows it."""

import pytest
import torch
from helpers import tiny, voices
from helpers.voices import PERSONAS, chats, row_of, speak
from transformers import LogitsProcessor, LogitsProcessorList, MinPLogitsWarper, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

import personafast as pf

pytestmark = [pytest.mark.usefixtures("reference_backend"), pytest.mark.filterwarnings("ignore")]
SAMPLERS = ["direct", "verify", "block", "token_rs"]


@pytest.fixture
def handle(net):
    with voices.attach(net) as found:
        yield found


@pytest.mark.parametrize("sampler", ["verify", "block"])
def test_processors_that_count_columns_do_so_for_every_row(net, handle, sampler):
    """Rows of one batch get on by different counts; none may end before its own twelfth token."""
    batch = {name: part[:1].repeat(24, 1) for name, part in chats().items()}
    options = {"do_sample": True, "seed": 5, "eos_token_id": list(range(3, 40)), "chunk": 4, "draft_doubt": 0.0}
    out = speak(net, handle, batch, PERSONAS["lora"], sampler=sampler, max_new_tokens=14, min_new_tokens=12, **options)
    assert not ((out[:, :11] >= 3) & (out[:, :11] < 40)).any()


class Place(LogitsProcessor):
    """Row b says word 10 + b at every third of its places, and its prompt's last token elsewhere; writes in place."""

    def __init__(self, batch):
        self.width = batch["input_ids"].shape[1]

    def __call__(self, input_ids, scores):
        done = input_ids.shape[1] - self.width
        last = input_ids[:, self.width - 1]
        for row in range(len(scores)):
            scores[row, (10 + row) if done % 3 == 2 else int(last[row])] += 1e4
        return scores


@pytest.mark.parametrize("sampler", ["direct", "verify", "block"])
def test_processors_find_every_row_in_its_place_with_all_of_its_text(net, handle, sampler):
    batch = chats()
    processors = LogitsProcessorList([Place(batch)])
    options = {"sampler": sampler, "draft": "reference", "chunk": 3, "logits_processor": processors}
    last = batch["input_ids"][:, -1]
    wanted = torch.stack([10 + torch.arange(3) if place % 3 == 2 else last for place in range(voices.NEW)], dim=1)
    for more in ({}, {"do_sample": True, "seed": 1}):
        assert torch.equal(speak(net, handle, batch, PERSONAS["mixed"], **options, **more), wanted)


@pytest.mark.parametrize("sampler", ["direct", "verify", "token_rs"])
def test_a_processor_that_writes_in_place_does_not_change_what_is_reported(net, handle, sampler):
    class Shifts(LogitsProcessor):
        def __init__(self, copies):
            self.copies = copies

        def __call__(self, input_ids, scores):
            scores = scores.clone() if self.copies else scores
            scores[:, 7] += 3.0
            return scores

    options = {"do_sample": True, "seed": 3, "sampler": sampler, "return_dict_in_generate": True}
    found = [
        speak(net, handle, chats(), PERSONAS["lora"], logits_processor=LogitsProcessorList([Shifts(copies)]), **options)
        for copies in (True, False)
    ]
    assert torch.equal(found[0].sequences, found[1].sequences)
    torch.testing.assert_close(found[1].stats.log_z, found[0].stats.log_z)


class Cuts(StoppingCriteria):
    """Ends row b after `counts[b]` new tokens, as the width of what it is given says."""

    def __init__(self, width, counts):
        self.width, self.counts = width, counts

    def __call__(self, input_ids, scores, **kwargs):
        assert len(input_ids) == len(self.counts)
        return torch.tensor([input_ids.shape[1] - self.width >= count for count in self.counts])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_criteria_find_every_row_in_its_place_and_may_count_columns(net, handle, sampler):
    batch, counts = chats(), [2, 7, 5]
    criteria = StoppingCriteriaList([Cuts(batch["input_ids"].shape[1], counts)])
    options = {"sampler": sampler, "do_sample": True, "seed": 4}
    whole = speak(net, handle, batch, PERSONAS["lora"], **options)
    found = speak(net, handle, batch, PERSONAS["lora"], stopping_criteria=criteria, **options)
    for row, count in enumerate(counts):
        assert found[row, :count].tolist() == whole[row, :count].tolist() and not found[row, count:].any()


def test_a_callers_own_length_and_eos_criteria_count(net, handle):
    batch = row_of(chats(), 0)
    whole = speak(net, handle, batch, PERSONAS["lora"])
    criteria = StoppingCriteriaList([MaxLengthCriteria(batch["input_ids"].shape[1] + 4)])
    assert torch.equal(speak(net, handle, batch, PERSONAS["lora"], stopping_criteria=criteria), whole[:, :4])
    first = int(whole[0, 2])
    end = whole[0].tolist().index(first) + 1
    criteria = StoppingCriteriaList([EosTokenCriteria(first)])
    assert torch.equal(speak(net, handle, batch, PERSONAS["lora"], stopping_criteria=criteria), whole[:, :end])


def test_every_member_that_speaks_needs_positions():
    """GPT-2 has 64 of them: a system text, or a policy that has fewer, runs out before the reference does."""
    net, short = tiny.model("gpt2"), tiny.model("gpt2", seed=3)
    short.config.n_positions = 16
    short.transformer.wpe = torch.nn.Embedding(16, tiny.HIDDEN)
    batch = row_of(chats("sea"), 0)
    width = batch["input_ids"].shape[1]
    policies = pf.PolicySet.from_models(net, {"short": short})
    text = "you are a calm pirate " * 8
    with pf.attach(net, policies=policies, tokenizer=tiny.tokenizer()) as handle:
        for persona, prompt, most in (
            (pf.Persona(prompts={text: 0.5}), 42 + width, 64),
            (pf.Persona(policies={"short": 0.5}), width, 16),
        ):
            for options in ({}, {"sampler": "block", "draft": "reference"}):
                with pytest.raises(pf.PersonafastError, match=rf"the {most} positions of .*at most {most - prompt}$"):
                    speak(net, handle, batch, persona, max_new_tokens=most - prompt + 1, **options)
                assert speak(net, handle, batch, persona, max_new_tokens=most - prompt, **options).numel()
            processor = pf.MPGLogitsProcessor(handle, persona, **batch)
            with pytest.raises(pf.PersonafastError, match=f"the {most} positions of "):
                net.generate(**batch, logits_processor=[processor], max_new_tokens=most - width + 2, do_sample=False)
        # A draft may be shorter: its tokens are verified.
        expected = speak(net, handle, batch, None, max_new_tokens=40)
        assert torch.equal(speak(net, handle, batch, None, max_new_tokens=40, sampler="verify", draft=short), expected)


class EndsForGood(LogitsProcessor):
    """A grammar in which nothing may follow an EOS."""

    def __call__(self, input_ids, scores):
        return scores.masked_fill((input_ids[:, -1:] == 9), float("-inf"))


@pytest.mark.parametrize("sampler", ["verify", "block"])
def test_nothing_needs_to_follow_an_eos_inside_a_draft(net, handle, sampler):
    options = {"do_sample": True, "eos_token_id": 9, "logits_processor": LogitsProcessorList([EndsForGood()])}
    bias = {"sequence_bias": {(9,): 3.0}, "max_new_tokens": 6}
    ended = 0
    for seed in range(8):
        out = speak(net, handle, row_of(chats(), 0), PERSONAS["lora"], sampler=sampler, seed=seed, **bias, **options)
        ended += int((out == 9).sum())
    assert ended


LINEAR = pf.Persona(policies={"formal": 0.5, "stern": 0.5}, aggregator="linear")


@pytest.mark.parametrize("sampler", ["direct", "verify", "token_rs", "scr"])
def test_carry_reaches_every_sampler(net, handle, sampler):
    batch = {name: part[:1].repeat(16, 1) for name, part in chats().items()}
    options = {"do_sample": True, "seed": 1, "sampler": sampler, "max_new_tokens": 6}
    carried = speak(net, handle, batch, LINEAR, carry=True, **options)
    assert not torch.equal(carried, speak(net, handle, batch, LINEAR, **options))


def test_min_p_reaches_the_plain_rows_of_a_mixture(net, handle):
    options = {"do_sample": True, "seed": 1, "min_p": 1.0}
    greedy = speak(net, handle, chats(), None)
    found = speak(net, handle, chats(), [LINEAR, None, None], sampler="mixture", **options)
    assert torch.equal(found[1:], greedy[1:])


@pytest.mark.parametrize("sampler", ["direct", "block", "auto"])
def test_a_callers_own_min_p_warper_acts_on_the_target(net, handle, sampler):
    processors = LogitsProcessorList([MinPLogitsWarper(1.0)])
    for persona in (PERSONAS["lora"], LINEAR):
        greedy = speak(net, handle, chats(), persona)
        options = {"do_sample": True, "seed": 1, "sampler": sampler, "logits_processor": processors}
        assert torch.equal(speak(net, handle, chats(), persona, **options), greedy)


def test_a_processor_that_remembers_its_steps_is_kept_from_drafts(net, handle):
    options = {"guidance_scale": 1.7}
    for sampler in ("verify", "block"):
        with pytest.raises(pf.PersonafastError, match=rf"^sampler: '{sampler}' .*Unbatched.* use sampler='direct'$"):
            speak(net, handle, chats(), PERSONAS["separate"], sampler=sampler, **options)
    expected = speak(net, handle, chats(), PERSONAS["separate"], **options)
    found = speak(net, handle, chats(), PERSONAS["separate"], sampler="auto", return_dict_in_generate=True, **options)
    assert torch.equal(found.sequences[:, -voices.NEW :], expected) and "Unbatched" in found.stats.notes[0]
