"""What a weight is worth to a persona (arXiv 2602.07164, section 3; Wanda: arXiv 2306.11695).

W [out, in] is the weight, A [in] a statistic of the linear's inputs (`CalibrationStatistics.of`). A score is a tuple of
float64 levels [rows, in]; `personafast.masks.selection` says how levels are compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import numpy as np
import torch

from personafast.masks.selection import Levels
from personafast.masks.targets import Target
from personafast.ops import philox

Score = Callable[[Target, slice], Levels]

_EPS = 1e-6


def magnitude(target: Target, rows: slice) -> Levels:
    """|W_ij|: a control that knows nothing of the persona."""
    return (target.weight()[rows].abs().double().cpu(),)


def random(seed: int) -> Score:
    """Uniform numbers that follow from seed, path, row and column alone: a control."""

    def score(target: Target, rows: slice) -> Levels:
        out, width = target.features
        index = torch.arange(out)[rows]
        stream = int.from_bytes(hashlib.sha256(target.path.encode()).digest()[:4], "big")
        return (philox.uniform(torch.full_like(index, seed), index, stream, width),)

    return score


def wanda(statistic: Mapping[str, torch.Tensor]) -> Score:
    """|W_ij| A_j."""

    def score(target: Target, rows: slice) -> Levels:
        return (magnitude(target, rows)[0] * statistic[target.path],)

    return score


def contrastive_wanda(difference: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> Score:
    """|W_ij| relu(z_j), ties broken by |W_ij| A_j.

    relu gives 0 to about half of the inputs, and more weights than that are kept: without the second level the choice
    among the rest would be arbitrary.

    Args:
        difference: z of every linear, with the sign of this side.
        own: A of this side.
    """

    def score(target: Target, rows: slice) -> Levels:
        weight = magnitude(target, rows)[0]
        return weight * difference[target.path].clamp(min=0), weight * own[target.path]

    return score


def contrastive_sparse(own: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> Score:
    """Weights that this side wants more than the other come first, then those wanted alike, then the rest.

    "More" compares the two sides' |W_ij| A_j, each divided by its row's sum; within the three classes the own
    normalised score decides. So opposing masks share weights only where a row keeps more than one side's class holds.
    """

    def score(target: Target, rows: slice) -> Levels:
        weight = magnitude(target, rows)[0]
        mine, theirs = (normalised(weight * side[target.path]) for side in (own, other))
        return (mine > theirs).double() + (mine >= theirs).double(), mine

    return score


def mixture(statistics: Mapping[str, Mapping[str, torch.Tensor]], weights: Mapping[str, float]) -> Score:
    """sum over personas p of w_p S^p_ij / sum_j S^p_ij, S^p = |W_ij| A^p_j."""

    def score(target: Target, rows: slice) -> Levels:
        weight = magnitude(target, rows)[0]
        total = torch.zeros_like(weight)
        for name in sorted(weights):
            total += weights[name] * normalised(weight * statistics[name][target.path])
        return (total,)

    return score


def normalised(scores: torch.Tensor) -> torch.Tensor:
    """Each row divided by its sum; a row of zeros stays as it is."""
    # numpy adds in one order whatever the number of threads.
    sums = torch.from_numpy(np.sum(scores.numpy(), axis=1, keepdims=True))
    return torch.where(sums > 0, scores / sums, scores)


def standard_difference(
    positive: tuple[torch.Tensor, torch.Tensor], negative: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """z = (mu+ - mu-) / (sqrt(var+ + var-) + eps), eps = 1e-6; each side is (mean, variance), float64 [in]."""
    (mean, variance), (other_mean, other_variance) = positive, negative
    return (mean - other_mean) / ((variance + other_variance).sqrt() + _EPS)
