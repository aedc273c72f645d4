"""Passes that are recorded and replayed give the texts that passes by call give."""

import pytest
import torch
from helpers import tiny, voices
from helpers.voices import PERSONAS, chats, speak

import personafast as pf
from personafast import ops
from personafast.models.graphs import Tape

pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = pf.Persona(policies={"formal": 0.5, "stern": 0.5}, aggregator="linear")
ROWS = {
    "lora": PERSONAS["lora"],
    "separate": PERSONAS["separate"],
    "mixed": PERSONAS["mixed"],
    "a batch": [pf.Persona(vectors={"creative": 2.0}, policies={"warm": 0.7}), None, PERSONAS["prompts"]],
}


@pytest.fixture(scope="module")
def nets():
    """The same model twice: called for every pass, and replayed."""
    with ops.use_backend("reference"):
        called, replayed = tiny.model(), tiny.model()
        handles = [
            pf.attach(net, tiny.library(net), policies=voices.policies(net), tokenizer=tiny.tokenizer(), graphs=graphs)
            for net, graphs in ((called, False), (replayed, True))
        ]
        yield (called, handles[0]), (replayed, handles[1])
        for handle in handles:
            handle.detach()


def both(nets, batch, personas, **options):
    found = []
    for net, handle in nets:
        torch.manual_seed(5)
        found.append(speak(net, handle, batch, personas, return_dict_in_generate=True, **options))
    called, replayed = found
    assert torch.equal(called.sequences, replayed.sequences)
    return called.stats, replayed.stats


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize(
    ("sampler", "sample"), [("direct", True), ("direct", False), ("verify", True), ("block", True)]
)
def test_every_exact_sampler_writes_the_same_text(nets, rows, sampler, sample):
    with ops.use_backend("reference"):
        called, replayed = both(nets, chats(), ROWS[rows], sampler=sampler, do_sample=sample)
    assert called.forwards == replayed.forwards and called.calls == replayed.calls


@pytest.mark.parametrize("sampler", ["mixture", "token_rs", "scr"])
def test_the_other_samplers_too(nets, sampler):
    with ops.use_backend("reference"):
        both(nets, chats(), LINEAR, sampler=sampler, do_sample=True)


def test_rows_that_end_keep_their_seats_and_change_nothing(nets):
    with ops.use_backend("reference"):
        # Every token ends a row sooner or later.
        both(nets, chats(), PERSONAS["lora"], do_sample=True, eos_token_id=list(range(5, 40)), max_new_tokens=12)


def test_recordings_serve_the_next_text_of_another_persona(nets):
    _, (net, handle) = nets
    patch = handle.cast.patch
    with ops.use_backend("reference"):
        speak(net, handle, chats(), PERSONAS["lora"], do_sample=True)
        made = {key: fixed for context in patch._contexts for key, fixed in context._recordings.items()}
        assert made
        other = pf.Persona(policies={"formal": 0.2, "warm": 1.4})
        both(nets, chats(), other, do_sample=True)
        again = {key: fixed for context in patch._contexts for key, fixed in context._recordings.items()}
    assert again == made


def test_new_banks_are_not_read_from_old_recordings(nets):
    (called, first), (replayed, second) = nets
    with ops.use_backend("reference"):
        both(nets, chats(), pf.Persona(vectors={"creative": 1.0}), do_sample=True)
        for handle in (first, second):
            handle.library.add_vector("dark", handle.library.vectors["futurist"])
            handle.library.add_policy("loud", tiny.policy(called, 77, scale=0.4))
        both(nets, chats(), pf.Persona(vectors={"dark": 3.0}, policies={"loud": 1.0}), do_sample=True)


def test_a_cpu_replays_when_told_to():
    from personafast import handle as handles

    net = tiny.model()
    with pf.attach(net) as handle:
        assert handle.cast.patch._recorder is None
    with pf.attach(net, graphs=True) as handle:
        assert handle.cast.patch._recorder is Tape
    assert handles._recorder(net, False) is None
