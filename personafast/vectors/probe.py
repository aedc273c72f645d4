"""A logistic probe, solved to machine precision: no dependency, no random numbers, no step count to choose."""

from __future__ import annotations

import torch
from torch.nn import functional

from personafast.errors import PersonafastError

_STEPS = 200


def logistic_probe(positive: torch.Tensor, negative: torch.Tensor, *, c: float = 1.0) -> torch.Tensor:
    """Weights of the probe that tells the positive rows from the negative ones.

    Every coordinate is standardised over both sides (mean 0, deviation 1), then

        minimise over w, b:  |w|^2 / 2 + c * sum_i log(1 + exp(-t_i (w . z_i + b))),   t_i = +1 or -1

    which has one solution, also where the sides can be separated. It is found by Newton's method in the span of the
    rows, where w lies, so that the cost follows the number of texts, not the hidden size. w / deviation is the gradient
    of the log odds in activation space, and that is what is returned.

    Args:
        positive: float64 [n, H].
        negative: float64 [m, H].
        c: weight of the data against the penalty.

    Returns:
        float64 [H], pointing to the positive side.

    Raises:
        PersonafastError: it did not converge.
    """
    rows = torch.cat([positive, negative])
    deviation = rows.std(dim=0, correction=0)
    # A coordinate that never changes stands for nothing, whatever it is divided by.
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    rows = (rows - rows.mean(dim=0)) / deviation
    target = torch.cat([rows.new_ones(len(positive)), -rows.new_ones(len(negative))])
    if len(rows) >= rows.shape[1]:
        return _newton(rows, target, c) / deviation
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    kept = values > values[-1] * 1e-12
    root = values[kept].sqrt()
    # rows = features @ basis with an orthonormal basis, so lengths and dot products are the same in both.
    features = vectors[:, kept] * root
    return rows.T @ (vectors[:, kept] / root) @ _newton(features, target, c) / deviation


def _newton(features: torch.Tensor, target: torch.Tensor, c: float) -> torch.Tensor:
    ones = features.new_ones(len(features), 1)
    design = torch.cat([features, ones], dim=1)
    penalty = torch.ones(design.shape[1], dtype=design.dtype, device=design.device)
    penalty[-1] = 0  # the intercept is free
    weights = torch.zeros_like(penalty)

    def loss(candidate: torch.Tensor) -> torch.Tensor:
        fit = functional.softplus(-target * (design @ candidate), threshold=700).sum()
        return 0.5 * (penalty * candidate * candidate).sum() + c * fit

    value = loss(weights)
    for _ in range(_STEPS):
        margin = target * (design @ weights)
        gradient = penalty * weights - c * design.T @ (target * torch.sigmoid(-margin))
        curvature = c * torch.sigmoid(margin) * torch.sigmoid(-margin)
        hessian = torch.diag(penalty) + design.T @ (curvature[:, None] * design)
        step = torch.linalg.solve(hessian, gradient)
        descent = gradient @ step
        if descent <= 1e-14 * (1 + value):
            return weights[:-1]
        size = 1.0
        while (trial := loss(weights - size * step)) > value - 0.25 * size * descent and size > 1e-10:
            size /= 2
        if not trial < value:
            return weights[:-1]  # below what float64 can tell apart
        weights, value = weights - size * step, trial
    raise PersonafastError("logistic: the probe did not converge; look for activations far out of range")
