import inspect

import pytest

from benchmarks.case import has_operator
from benchmarks.cases import CASES
from benchmarks.decode import DECODE_CASES, parameters
from benchmarks.notes import NOTES
from personafast import ops
from personafast.ops import _backend

BY_NAME = {case.name: case for case in CASES}
SHAPES = ("11008x4096", "4096x4096")


def test_every_operator_has_a_case():
    covered = {name for case in CASES for name in (case.operator, *case.needs)}
    helpers = {"available", "chosen", "use_backend"}
    public = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))} - helpers
    assert "inject_" in public
    assert set(_backend.KERNELS) | public | {"philox.uniform"} <= covered


def test_names_are_unique_and_ours_comes_first():
    assert len(BY_NAME) == len(CASES)
    for case in CASES:
        names = [contender.name for contender in case.contenders]
        assert names[0] == "ours" and len(set(names)) == len(names) >= 2, case.name


def test_an_operator_that_does_not_exist_yet_is_named():
    case = BY_NAME["inject_-8x4096"]
    assert case.missing() is None
    assert not has_operator("no_such_operator") and not has_operator("philox.no_such_operator")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "baseline", "goal"),
    [
        ("linear-{}-rows1", "F.linear", 1.8),
        ("linear-{}-rows5", "F.linear", 1.2),
        ("linear-{}-rows17", "F.linear", 1.2),
        ("sparse_linear-{}-half-rows1", "F.linear, dense", 3.0),
        ("sparse_linear-{}-half-rows1", "our dense pass", 1.4),
        ("masked_linear-{}-rows8-masks8", "F.linear over 8 masked copies", 6.0),
        ("masked_linear-{}-rows4-masks4", "our dense pass", 1 / 1.6),
        ("lora_delta-{}-rows17-adapters16-rank8", "our dense pass", 1 / 1.3),
    ],
)
def test_what_the_kernels_must_show_is_measured(shape, name, baseline, goal):
    contenders = {contender.name: contender for contender in BY_NAME[name.format(shape)].contenders}
    assert contenders[baseline].goal == goal


def test_memory_and_logprobs_have_their_goals():
    for shape in SHAPES:
        copies = BY_NAME[f"masked_linear-{shape}-rows8-masks8"].baselines[0]
        assert copies.memory_goal == 0.19
    case = BY_NAME["token_logprobs-128256x2048-rows16"]
    assert case.baselines[0].goal == 1.5 and case.extra_memory


def test_quantised_baselines_stand_beside_dense_and_sparse():
    for name in ("linear-{}-rows1", "sparse_linear-{}-half-rows1"):
        for shape in SHAPES:
            names = " ".join(contender.name for contender in BY_NAME[name.format(shape)].baselines)
            assert "int8 weight-only (torch)" in names and "int4" in names and "torchao" in names


def test_the_models_that_decode_have_half_a_billion_parameters():
    assert {case.shape.name for case in DECODE_CASES} == {"qwen2.5-0.5b", "llama-18x1536"}
    for case in DECODE_CASES:
        assert 0.49e9 < parameters(case.shape) < 0.51e9


def test_notes_are_of_operators():
    assert set(NOTES) <= {case.operator for case in CASES} | {"decode", "blend"}
    assert all(NOTES.values())
