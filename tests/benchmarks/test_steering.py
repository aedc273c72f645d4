"""Steering's contenders on a tiny model: every one decodes, and wrong vectors are not timed."""

import contextlib

import pytest
import torch

import personafast as pf
from benchmarks import steering
from benchmarks.check import CheckFailed
from benchmarks.decode import PROMPT, Shape, drawn
from benchmarks.views import Run, View
from personafast.vectors import blend

TINY = Shape(
    "tiny",
    {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.15,
    },
)


@pytest.fixture(scope="module")
def contenders():
    ids = torch.randint(5, 320, (8, PROMPT), generator=torch.Generator().manual_seed(1))
    with contextlib.ExitStack() as stack, torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        # So that vectors show in a model this narrow.
        patch.setattr(steering, "STRENGTH", 1.0)
        yield steering.Contenders(drawn(TINY), ids, stack)


def test_every_contender_decodes(contenders):
    names = {name for view in steering.VIEWS for name in view.contenders}
    with torch.no_grad():
        runners, absent = contenders.runners(sorted(names))
        assert set(runners) | set(absent) == names and set(absent) <= {steering.HOOKS}
        for name, generate in runners.items():
            assert generate(3).shape == (8, PROMPT + 3), name


def test_personas_are_as_many_and_as_long_as_their_name_says(contenders):
    for count, vectors in ((1, 4), (8, 1), (8, steering.VECTORS)):
        rows = contenders.batch(count, vectors)
        kinds = {tuple(persona.vectors.items()) for persona in rows}
        assert len(kinds) == count and all(len(persona.vectors) == vectors for persona in rows)


def test_wrong_vectors_are_not_timed(contenders, monkeypatch):
    with torch.no_grad():
        contenders.check()
        monkeypatch.setattr(steering, "blend", lambda *given: blend(*given).roll(1, 0))
        with pytest.raises(CheckFailed, match="steered logits are off"):
            contenders.check()
        monkeypatch.undo()
        nobody = [pf.Persona(vectors={"trait0": 0.0})] * 8
        monkeypatch.setattr(contenders, "batch", lambda *_: nobody)
        with pytest.raises(CheckFailed, match="nothing is being compared"):
            contenders.check()


def test_a_view_compares_round_by_round():
    view = View("seen", "slow", {"fast": 1.5, "gone": None}, rows=2)
    run = Run(TINY, {"slow": [1.0, 2.0, 4.0], "fast": [0.5, 1.0, 1.0]}, {"gone": "not here"}, [50.0] * 3, 1000, 4)
    found = run.seen_as(view)
    assert found.samples == {"slow": [1.0, 2.0, 4.0], "fast": [0.5, 1.0, 1.0]} and found.absent == {"gone": "not here"}
    slow, fast = (found.record["contenders"][name] for name in ("slow", "fast"))
    assert fast["times_faster"]["median"] == 2.0 and fast["goal"] == 1.5 and "times_faster" not in slow
    assert slow["tokens_per_s"] == 1.0 and found.record["contenders"]["gone"] == {"absent": "not here"}
