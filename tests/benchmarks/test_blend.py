"""Blending's contenders on a tiny model: every one decodes, and a wrong blend is not timed."""

import contextlib

import pytest
import torch

from benchmarks import blend
from benchmarks.check import CheckFailed
from benchmarks.decode import PROMPT, Shape, drawn

pytest.importorskip("peft")
TINY = Shape(
    "tiny",
    {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.15,
    },
)


@pytest.fixture(scope="module")
def contenders():
    ids = torch.randint(5, 320, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    with contextlib.ExitStack() as stack, torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        # So that a policy more or less shows in a model this narrow.
        patch.setattr(blend, "UPDATE", 0.1)
        yield blend.Contenders(drawn(TINY), ids, stack)


def test_every_contender_decodes(contenders):
    with torch.no_grad():
        for name, generate in contenders.runners().items():
            assert generate(3).shape == (1, PROMPT + 3), name


def test_a_wrong_blend_is_not_timed(contenders, monkeypatch):
    with torch.no_grad():
        contenders.check()
        whole = contenders.persona
        # Each policy at a quarter of its weight.
        monkeypatch.setattr(contenders, "persona", lambda count: whole(count, 0.25))
        with pytest.raises(CheckFailed, match="direct, 4 policies"):
            contenders.check()


def test_views_name_what_is_measured(contenders):
    names = set(contenders.runners())
    for view in blend.VIEWS:
        assert {view.baseline, *view.goals} <= names
