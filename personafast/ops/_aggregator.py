"""The rules that join several policies into one target, and what their operators check alike."""

from __future__ import annotations

import enum

import torch

from personafast.ops._library import check_dtype, check_float, check_shape, fail


class Aggregator(enum.IntEnum):
    """How density ratios r_i = pi_i / pi_0 are joined (arXiv 2511.01891, section 3), as the operators number it.

    LINEAR is (sum_i w_i r_i)+, a mixture; a negative weight takes away. GEOMETRIC is prod_i r_i ** w_i, which blends.
    POWER is (sum_i w_i r_i ** p) ** (1 / p); p = 0 is the geometric mean, of weights that sum to 1, and p = -1 the
    harmonic mean, which needs no code of its own. JENSEN_SHANNON is s / (1 - s) of the weighted geometric mean s of
    the r_i / (1 + r_i). MIN and MAX are the least and the greatest r_i, whatever the weights of their members.
    """

    LINEAR = 0
    GEOMETRIC = 1
    POWER = 2
    JENSEN_SHANNON = 3
    MIN = 4
    MAX = 5


_CODES = frozenset(int(code) for code in Aggregator)

# The rules under which a weight may be negative.
_SIGNED = (Aggregator.LINEAR, Aggregator.GEOMETRIC)


def check_members(op: str, batch: object, members: object, weights: torch.Tensor, carried: torch.Tensor | None) -> None:
    """`weights` and `carried` must be [B, N] and floating."""
    check_float(op, "weights", weights)
    check_shape(op, "weights", weights, (batch, members), "[B, N]")
    if carried is not None:
        check_float(op, "carried", carried)
        check_shape(op, "carried", carried, (batch, members), "[B, N]")


def check_rule_shapes(op: str, batch: object, aggregator: torch.Tensor, p: torch.Tensor) -> None:
    """`aggregator` must be int32 [B] and `p` floating [B]."""
    check_dtype(op, "aggregator", aggregator, torch.int32)
    check_shape(op, "aggregator", aggregator, (batch,), "[B]")
    check_float(op, "p", p)
    check_shape(op, "p", p, (batch,), "[B]")


def rules_in_use(op: str, aggregator: torch.Tensor, weights: torch.Tensor, p: torch.Tensor) -> frozenset[int]:
    """The codes that some row asks for.

    On a CPU unknown codes, negative weights under the rules that have no use for them, and exponents that are not
    finite raise. On a GPU, where reading them would wait for the device, all rules are assumed and `poison` marks the
    rows at fault.
    """
    if aggregator.device.type != "cpu":
        return _CODES
    codes = frozenset(aggregator.tolist())
    if not codes <= _CODES:
        known = ", ".join(f"{code.value} ({code.name.lower()})" for code in Aggregator)
        fail(op, f"`aggregator` holds the unknown code {min(codes - _CODES)}: known are {known}")
    if codes <= set(_SIGNED):
        return codes
    wrong = _negative(aggregator, weights)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        weight, rule = float(weights[row][weights[row] < 0][0]), Aggregator(int(aggregator[row])).name.lower()
        fail(op, f"`weights` of row {row} hold {weight:g}, but the {rule} rule needs 0 or more")
    wrong = _endless(aggregator, p)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        fail(op, f"`p` of row {row} is {float(p[row]):g}, but the power rule needs a finite exponent")
    return codes


def _negative(aggregator: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Rows [B] that have a negative weight where their rule allows none."""
    signed = (aggregator == int(Aggregator.LINEAR)) | (aggregator == int(Aggregator.GEOMETRIC))
    return (weights < 0).any(1) & ~signed


def _endless(aggregator: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Rows [B] whose exponent is not finite though their rule has one."""
    return (aggregator == int(Aggregator.POWER)) & ~p.float().isfinite()


def at_fault(aggregator: torch.Tensor, weights: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Rows [B] for which `rules_in_use` raises on a CPU."""
    unknown = (aggregator < 0) | (aggregator >= len(_CODES))
    return unknown | _negative(aggregator, weights) | _endless(aggregator, p)


def poison(result: torch.Tensor, aggregator: torch.Tensor, weights: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Make the rows of `result` [B, ...] at fault NaN on a GPU, where raising would wait for the device."""
    if aggregator.device.type == "cpu":
        return result
    return torch.where(at_fault(aggregator, weights, p)[:, None], float("nan"), result)
