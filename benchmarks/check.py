"""Correctness before timing: against float64, at most twice the error of plain torch in the same precision."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from benchmarks.case import Case, Contender, Inputs

# Beside twice plain torch's error, in units of the exact result's root mean square.
SMALL = 1e-6


class CheckFailed(AssertionError):
    """A contender's result is wrong: its case gets no figure."""


class Error(NamedTuple):
    """Largest absolute error, the largest that was allowed, and the error relative to the exact result."""

    largest: float
    allowed: float
    relative: float


def fresh(case: Case, inputs: Inputs) -> Inputs:
    """`inputs` with copies of what a call changes."""
    parts = vars(inputs)
    return SimpleNamespace(**{k: v.clone() if k in case.mutates else v for k, v in parts.items()})


def double(inputs: Inputs) -> Inputs:
    """`inputs` with every floating tensor in float64."""
    return SimpleNamespace(
        **{
            key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for key, value in vars(inputs).items()
        }
    )


def references(case: Case, inputs: Inputs) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(exact result in float64, plain torch's in the precision of the case)."""
    with torch.no_grad():
        exact = case.exact(inputs) if case.exact is not None else case.plain(fresh(case, double(inputs)))
        return tensors(exact), tensors(case.plain(fresh(case, inputs)))


def check(
    case: Case, contender: Contender, inputs: Inputs, exact: Sequence[torch.Tensor], plain: Sequence[torch.Tensor]
) -> Error:
    """The error of one contender on its own buffer set.

    Raises:
        CheckFailed: it is more than the rule allows, or shapes, NaN or infinities differ.
    """
    with torch.no_grad():
        result = contender.run(fresh(case, inputs))
        if case.observe is not None:
            result = case.observe(inputs, result)
    where = f"{case.name}: {contender.name}"
    actual = tensors(result)
    if len(actual) != len(exact):
        raise CheckFailed(f"{where}: {len(actual)} results, expected {len(exact)}")
    errors = [
        _compare(where, contender, ours, right, usual) for ours, right, usual in zip(actual, exact, plain, strict=True)
    ]
    return max(errors, key=lambda error: error.relative)


def tensors(result: Any) -> list[torch.Tensor]:
    return list(result) if isinstance(result, (list, tuple)) else [result]


def _compare(where: str, contender: Contender, actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> Error:
    if actual.shape != exact.shape:
        raise CheckFailed(f"{where}: shape {list(actual.shape)}, expected {list(exact.shape)}")
    if not exact.is_floating_point():
        if not torch.equal(actual.to(exact.dtype), exact):
            raise CheckFailed(f"{where}: {int((actual != exact).sum())} of {exact.numel()} values differ")
        return Error(0.0, 0.0, 0.0)
    finite = exact.isfinite()
    if not torch.equal(actual.double()[~finite].nan_to_num(), exact[~finite].nan_to_num()) or not bool(
        actual[finite].isfinite().all()
    ):
        raise CheckFailed(f"{where}: NaN or infinity where there should be none, or none where there should be")
    if not bool(finite.any()):
        return Error(0.0, 0.0, 0.0)
    right = exact[finite]
    off = actual.double()[finite] - right
    size = right.square().mean().sqrt()
    relative = float(off.square().mean().sqrt() / size.clamp(min=1e-30))
    largest = float(off.abs().max())
    usual = float((plain.double()[finite] - right).abs().max())
    allowed = 2 * usual + SMALL * float(size)
    if contender.approximate is None:
        if not largest <= allowed:
            raise CheckFailed(f"{where}: error {largest:.3g}, allowed {allowed:.3g} (plain torch errs {usual:.3g})")
    elif not relative <= contender.approximate:
        raise CheckFailed(f"{where}: relative error {relative:.3g}, allowed {contender.approximate:.3g}")
    return Error(largest, allowed, relative)
