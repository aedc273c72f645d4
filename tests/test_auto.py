"""What `sampler="auto"` chooses, and why; and what the others draft with when they are left to it."""

import re

import pytest
import torch
from helpers import tiny, voices
from helpers.voices import PERSONAS, chats, speak

import personafast as pf

pytestmark = [pytest.mark.usefixtures("reference_backend"), pytest.mark.filterwarnings("ignore")]
LINEAR = pf.Persona(policies={"stern": 0.5, "jolly": 0.5}, aggregator="linear")
DRAWN = {"do_sample": True, "seed": 1}


@pytest.fixture
def handle(net):
    with voices.attach(net) as found:
        yield found


@pytest.mark.parametrize(
    ("personas", "more", "why"),
    [
        (None, DRAWN, "direct, since no row has density ratios"),
        (pf.Persona(vectors={"creative": 1.0}), DRAWN, "direct, since no row has density ratios"),
        (PERSONAS["lora"], DRAWN, "direct, since all members share one read"),
        (PERSONAS["prompts"], DRAWN, "direct, since all members share one read"),
        (PERSONAS["separate"], DRAWN, "block, .* drafts: the merge"),
        (PERSONAS["separate"], {}, "block, .* drafts: the merge"),
        (PERSONAS["mixed"], DRAWN, "block, .* drafts: the reference, since they cannot be merged"),
        ([PERSONAS["lora"], PERSONAS["separate"], None], DRAWN, "block, .* drafts: the merge"),
        (pf.Persona(policies={"formal": 1.0}, base="stern"), DRAWN, "block, "),
        (LINEAR, DRAWN, "mixture, since the linear rule"),
        ([LINEAR, None, LINEAR], {**DRAWN, "chunk": 3}, "mixture, since the linear rule"),
        # What a mixture's policies cannot take one by one.
        (LINEAR, {**DRAWN, "top_k": 5}, "block, "),
        (LINEAR, {**DRAWN, "temperature": 0.7}, "block, "),
        (LINEAR, {**DRAWN, "repetition_penalty": 1.2}, "block, "),
        (LINEAR, {}, "block, "),
        (pf.Persona(policies={"formal": 1.0}, aggregator="linear"), {**DRAWN, "top_p": 0.9}, "direct, .* TopPLogits"),
        (pf.Persona(policies={"stern": 1.5, "jolly": -0.5}, aggregator="linear"), DRAWN, "block, "),
        (pf.Persona(policies={"stern": 1.0}, aggregator="linear", base="jolly"), DRAWN, "block, "),
        ([LINEAR, PERSONAS["lora"], None], DRAWN, "block, "),
    ],
)
def test_the_choice_has_a_reason_and_gives_what_was_chosen(net, handle, personas, more, why):
    batch = chats()
    out = speak(net, handle, batch, personas, sampler="auto", return_dict_in_generate=True, **more)
    (note,) = out.stats.notes
    assert re.match(f"auto: {why}", note)
    chosen = note.removeprefix("auto: ").split(",")[0]
    same = speak(net, handle, batch, personas, sampler=chosen, return_dict_in_generate=True, **more)
    assert same.sequences.equal(out.sequences) and same.stats.weight_bytes == out.stats.weight_bytes


def test_large_batches_are_told_what_a_merge_would_save(net, handle):
    batch = chats(*["sea"] * 24)
    out = speak(net, handle, batch, PERSONAS["lora"], sampler="auto", return_dict_in_generate=True, max_new_tokens=1)
    assert "24 rows of 3 members are bound by arithmetic, of which a merge would need 1/3" in out.stats.notes[0]


@pytest.mark.parametrize("sampler", ["mixture", "token_rs", "scr"])
def test_samplers_that_need_chance_say_so_when_there_is_none(net, handle, sampler):
    out = speak(net, handle, chats(), LINEAR, sampler=sampler, return_dict_in_generate=True)
    assert out.stats.notes == [f"{sampler} without sampling is greedy decoding of the target: by `direct`"]
    assert out.sequences[:, -voices.NEW :].equal(speak(net, handle, chats(), LINEAR))


@pytest.mark.parametrize("sampler", ["auto", "verify", "block"])
def test_models_that_cannot_be_merged_are_drafted_for_by_the_reference(net, sampler):
    """Policies need the reference's vocabulary, not its architecture."""
    other = tiny.model("gpt2", seed=4)
    with pf.attach(net, policies=pf.PolicySet.from_models(net, {"other": other})) as found:
        persona = pf.Persona(policies={"other": 0.6})
        expected = speak(net, found, chats(), persona)
        assert torch.equal(speak(net, found, chats(), persona, sampler=sampler), expected)
        with pytest.raises(pf.PersonafastError, match="merging needs models of one architecture"):
            speak(net, found, chats(), persona, sampler="merge")


def test_rows_that_cannot_go_on_by_different_counts_are_left_to_direct():
    """Gemma 2 attends to windows of columns: longer texts cannot be rolled back row by row."""
    net = tiny.model("gemma2")
    net.config.sliding_window = 8
    policies = pf.PolicySet.from_models(net, {"stern": tiny.model("gemma2", 3)})
    persona = pf.Persona(policies={"stern": 1.0})
    batch = chats()
    with pf.attach(net, policies=policies) as handle:
        for rows, wanted in ((2, "direct, since a model"), (1, "block, ")):
            few = {key: value[:rows] for key, value in batch.items()}
            out = speak(net, handle, few, persona, sampler="auto", return_dict_in_generate=True, **DRAWN)
            assert out.stats.notes[0].startswith(f"auto: {wanted}")
