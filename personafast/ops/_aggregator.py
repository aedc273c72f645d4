"""The rules that join several policies into one target, and what their operators check alike."""

from __future__ import annotations

import enum

import torch

from personafast.ops._library import check_dtype, check_float, check_shape, fail


class Aggregator(enum.IntEnum):
    """How density ratios r_i = pi_i / pi_0 are joined (arXiv 2511.01891, section 3), as the operators number it.

    LINEAR is sum_i w_i r_i, a mixture; GEOMETRIC is prod_i r_i ** w_i, which blends.
    """

    LINEAR = 0
    GEOMETRIC = 1


_CODES = frozenset(int(code) for code in Aggregator)


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


def rules_in_use(op: str, aggregator: torch.Tensor, weights: torch.Tensor) -> tuple[bool, bool]:
    """Which rules some row asks for: (linear, geometric).

    On a CPU unknown codes and negative weights under the linear rule raise. On a GPU, where reading them would wait
    for the device, both rules are assumed and `poison` marks the rows at fault.
    """
    if aggregator.device.type != "cpu":
        return True, True
    codes = set(aggregator.tolist())
    if not codes <= _CODES:
        known = ", ".join(f"{code.value} ({code.name.lower()})" for code in Aggregator)
        fail(op, f"`aggregator` holds the unknown code {min(codes - _CODES)}: known are {known}")
    linear = int(Aggregator.LINEAR) in codes
    if linear and weights.numel():
        lowest = weights.amin(1)
        if bool((lowest < 0).any()):
            wrong = (lowest < 0) & (aggregator == int(Aggregator.LINEAR))
            if bool(wrong.any()):
                row = int(wrong.int().argmax())
                fail(op, f"`weights` of row {row} hold {float(lowest[row]):g}, but the linear rule needs 0 or more")
    return linear, int(Aggregator.GEOMETRIC) in codes


def poison(result: torch.Tensor, aggregator: torch.Tensor) -> torch.Tensor:
    """Make the rows of `result` [B, ...] with an unknown rule NaN on a GPU, where raising would wait for the device."""
    if aggregator.device.type == "cpu":
        return result
    known = (aggregator >= 0) & (aggregator < len(_CODES))
    return torch.where(known[:, None], result, float("nan"))
