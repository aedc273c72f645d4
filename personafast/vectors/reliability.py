"""How far to trust a direction: the same from either half of the texts, and what it tells apart on the other half."""

from __future__ import annotations

import math

import torch

from personafast.errors import PersonafastError
from personafast.vectors.directions import direction


def reliability(method: str, positive: torch.Tensor, negative: torch.Tensor) -> tuple[float | None, float | None]:
    """Split-half cosine and held-out separation at one block.

    The texts are split into those of even and those of odd place, pairs staying together, and the method is applied to
    each half. The cosine is between the two directions. The separation is Cohen's d of the projections of one half's
    texts on the other half's direction, (mean+ - mean-) / pooled deviation, averaged over both ways round. On the very
    texts a direction was made from, d is large even for noise as soon as there are fewer texts than dimensions.

    Args:
        method: one of `METHODS`.
        positive: float [n, H].
        negative: float [m, H].

    Returns:
        (cosine, d), each None where the halves are too small or do not vary.
    """
    halves = [(positive[start::2], negative[start::2]) for start in (0, 1)]
    try:
        found = [direction(method, *half) for half in halves if min(map(len, half)) > 0]
    except PersonafastError:
        return None, None
    if len(found) < 2 or any(part.norm() == 0 for part in found):
        return None, None
    units = [part / part.norm() for part in found]
    effects = [
        _cohens_d(*(side.double() @ unit for side in half)) for unit, half in zip(units, halves[::-1], strict=True)
    ]
    known = [effect for effect in effects if effect is not None]
    return float(units[0] @ units[1]), sum(known) / len(known) if len(known) == 2 else None


def _cohens_d(positive: torch.Tensor, negative: torch.Tensor) -> float | None:
    n, m = len(positive), len(negative)
    if min(n, m) < 2:
        return None
    pooled = math.sqrt(float((n - 1) * positive.var() + (m - 1) * negative.var()) / (n + m - 2))
    return float(positive.mean() - negative.mean()) / pooled if pooled > 0 else None
