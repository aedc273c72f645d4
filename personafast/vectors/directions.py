"""From the two sides of a contrast to one direction: at one block, in float64.

X is [n, H], the positive texts' means at that block, Y is [m, H], the negative ones'; for the paired methods n = m and
D = X - Y.
"""

from __future__ import annotations

import torch

from personafast.errors import PersonafastError
from personafast.vectors.probe import logistic_probe

METHODS = ("mean_diff", "pca_diff", "pca_center", "logistic")
PAIRED = ("pca_diff", "pca_center")
SCALES = ("gap", "unit")


def direction(method: str, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """The direction of one block, of any length but oriented from the negative side to the positive one.

    - `mean_diff`: mean of X minus mean of Y (arXiv 2510.10157).
    - `pca_diff`: the first principal component of the rows of D, centred by their mean, as repeng has it: the axis
      along which the pairs' differences vary most, not what they share.
    - `pca_center`: the first principal component after each pair is centred by its midpoint, which leaves +-D/2: the
      top eigenvector of D^T D, an axis that the differences share.
    - `logistic`: the weights of an L2-regularised logistic probe, see `logistic_probe`.

    A component has no sign of its own: it is turned so that of most pairs the positive projects higher, and where as
    many say one as the other, so that the mean does.

    Args:
        method: one of `METHODS`.
        positive: X, float [n, H].
        negative: Y, float [m, H].

    Returns:
        float64 [H].

    Raises:
        PersonafastError: too few texts, unequal counts for a paired method, or sides that do not differ.
    """
    x, y = positive.double(), negative.double()
    if method == "mean_diff":
        return x.mean(dim=0) - y.mean(dim=0)
    if min(len(x), len(y)) < 2:
        raise PersonafastError(f"method {method!r}: one text a side says nothing; give two or more, or take mean_diff")
    if method == "logistic":
        return logistic_probe(x, y)
    if len(x) != len(y):
        raise PersonafastError(f"method {method!r}: {len(x)} positive and {len(y)} negative texts; it needs pairs")
    differences = x - y
    centred = differences - differences.mean(dim=0) if method == "pca_diff" else differences
    # Equal differences leave only the rounding of their mean, which has a first component too.
    if centred.abs().max() <= 1e-12 * differences.abs().max():
        raise PersonafastError(f"method {method!r}: the pairs' differences do not vary; give different texts")
    found = first_component(centred)
    sides = differences @ found
    votes = int((sides > 0).sum()) - int((sides < 0).sum())
    return -found if votes < 0 or (votes == 0 and sides.mean() < 0) else found


def first_component(rows: torch.Tensor) -> torch.Tensor:
    """The unit eigenvector of rows^T rows with the largest eigenvalue, through the smaller of the two Gram matrices.

    Args:
        rows: float64 [n, H], not all zero.
    """
    n, width = rows.shape
    rows = rows / rows.abs().max()
    _, vectors = torch.linalg.eigh(rows @ rows.T if n < width else rows.T @ rows)
    found = rows.T @ vectors[:, -1] if n < width else vectors[:, -1]
    return found / found.norm()


def scaled(found: torch.Tensor, mean_gap: torch.Tensor, scale: str) -> torch.Tensor:
    """Give a direction its length.

    `gap`: the length of the mean difference's projection on it, so that coefficient 1 carries the negative side's mean
    to the positive side's, as far as this axis goes. `mean_diff` is its own gap and stays as it is. `unit`: length 1.

    Args:
        found: float64 [H].
        mean_gap: mean of X minus mean of Y, float64 [H].
        scale: one of `SCALES`.

    Raises:
        PersonafastError: a zero direction.
    """
    norm = found.norm()
    if norm == 0:
        raise PersonafastError("direction: zero, the two sides do not differ here; take other positions or other texts")
    unit = found / norm
    return unit if scale == "unit" else unit * (unit @ mean_gap).abs()
