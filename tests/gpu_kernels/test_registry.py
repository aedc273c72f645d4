"""Every operator has a Triton kernel, specimens that are compiled and cases that the GPU suite checks and times."""

import pytest

pytest.importorskip("triton")
pytest.importorskip("personafast._triton", reason="needs an installed personafast")

from benchmarks.gpu.cases import SPECIMENS, cases
from personafast import _triton, ops
from personafast.ops import _backend

OPERATORS = sorted(_backend.KERNELS)


@pytest.mark.parametrize("name", OPERATORS)
def test_operator(name):
    assert "triton" in _backend.KERNELS[name] and callable(getattr(_triton, name))
    assert [specimen for specimen in SPECIMENS if specimen.operator == name]
    assert ops.chosen(name, "cuda")[0] in ("triton", "cuda")


@pytest.mark.parametrize("name", sorted({*OPERATORS, "philox.uniform"} - {"compress", "chunk_scores", "chunk_accept"}))
def test_the_suite_checks_and_times_it(name):
    # compress prepares a model once; the two scores' kernels are timed as the one that does both.
    for tiny in (False, True):
        assert [case for case in cases(tiny) if case.operator == name], f"tiny={tiny}"


def test_names_of_cases_are_their_own():
    for tiny in (False, True):
        names = [case.name for case in cases(tiny)]
        assert len(set(names)) == len(names)


def test_the_lines_of_the_issue_are_goals():
    """What a Hopper GPU has to show, each as a goal of some case."""
    found = {
        (case.operator, contender.name, round(contender.goal, 3))
        for case in cases()
        for contender in case.baselines
        if contender.goal is not None
    }
    goals = {(operator, goal) for operator, _, goal in found}
    assert {
        ("masked_linear", 0.556),
        ("sparse_linear", 1.4),
        ("lora_delta_", 3.333),
        ("token_logprobs", 0.909),
    } <= goals
    assert ("inject_", 0.99) in goals
    shares = {case.operator for case in cases() if case.copy_share == 0.85}
    assert {"inject_", "steer_", "add_inject_rms_norm"} <= shares
    launches = {case.operator: case.launches for case in cases()}
    assert launches["chunk_scores_accept"] == 1 and launches["token_logprobs"] == 2
