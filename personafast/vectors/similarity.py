"""How alike vectors are."""

from __future__ import annotations

import math

import torch


def cosines(rows: torch.Tensor) -> torch.Tensor:
    """Cosine of every pair of rows, a . b / (|a| |b|), in float64.

    Args:
        rows: [N, hidden], of any float dtype.

    Returns:
        float64 [N, N], symmetric, within -1..1 and with 1 on its diagonal; NaN where a row has norm zero, which has no
        direction.
    """
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True)
    found = (unit @ unit.T).clamp(-1.0, 1.0)
    diagonal = found.diagonal()
    diagonal[~diagonal.isnan()] = 1.0
    return found


def number(value: float) -> float | None:
    """The value for JSON, which has no NaN: None stands for "not defined"."""
    return None if math.isnan(value) else value
