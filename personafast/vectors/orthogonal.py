"""Vectors at right angles: so that a blend adds what each has of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from personafast.errors import PersonafastError
from personafast.vectors.blend import check_alike
from personafast.vectors.vector import PersonaVector

METHODS = ("gram_schmidt", "symmetric")
LEAST_REST = 0.01
"""A vector of which less than this share lies outside the span of others counts as depending on them."""


def orthogonalise(
    vectors: Mapping[str, PersonaVector],
    names: Sequence[str] | None = None,
    *,
    method: str = "symmetric",
    keep_norms: bool = True,
    blocks: Sequence[int] | None = None,
) -> dict[str, PersonaVector]:
    """Make vectors orthogonal to each other at every block, in float64, rounded once.

    With u_i = v_i / |v_i| and orthonormal q_i of the same span, the new vector is |v_i| q_i, or (v_i . q_i) q_i without
    `keep_norms`: what v_i has of its new direction. A vector that is zero at a block is orthogonal to all and stays so.

    Args:
        vectors: the vectors by name.
        names: which of them, in this order; None takes all in their order.
        method: how the q_i are found.

            - "symmetric": Q = (U U^T)^(-1/2) U, rows u_i (Loewdin's). Of all orthonormal sets the one closest to the
              u_i in the sum of squares; it treats all alike, so that their order does not matter.
            - "gram_schmidt": q_i is what u_i has outside the span of those before it, at norm 1. The first stays as it
              is, to the bit; the last changes most.
        keep_norms: keep every vector's norm at every block, so that coefficients keep their strength. A vector that is
            almost in the span of the others is then mostly made of what little was its own.
        blocks: only at these; None takes every block. Elsewhere the vectors stay as they are.

    Returns:
        name -> vector, with a note in its metadata.

    Raises:
        PersonafastError: an unknown name or method, a name given twice, shapes or hook points that differ, a block out
            of range, or a vector that depends on others: less than 1 % of it lies outside their span.
    """
    if method not in METHODS:
        raise PersonafastError(f"method: {method!r} is not one of {', '.join(METHODS)}")
    chosen = list(vectors if names is None else names)
    check_alike(vectors, chosen, "names")
    if len(set(chosen)) < len(chosen):
        raise PersonafastError(f"names: {', '.join(chosen)} names a vector twice; name each once")
    stacked = torch.stack([vectors[name].directions for name in chosen]).double()
    for block in _checked(blocks, stacked.shape[1]):
        rows = stacked[:, block]
        live = (rows.norm(dim=1) > 0).nonzero().flatten()
        if len(live):
            labels = [f"vectors[{chosen[index]!r}]" for index in live.tolist()]
            stacked[live, block] = _orthogonal(rows[live], labels, block, method, keep_norms)
    note = {"method": method, "names": chosen, "keep_norms": keep_norms}
    return {
        name: replace(
            vectors[name],
            directions=stacked[index].float(),
            metadata={**vectors[name].metadata, "orthogonalised": note},
        )
        for index, name in enumerate(chosen)
    }


def remove_component(
    vector: PersonaVector,
    others: PersonaVector | Mapping[str, PersonaVector],
    *,
    keep_norm: bool = False,
    blocks: Sequence[int] | None = None,
) -> PersonaVector:
    """Take the span of other vectors out of a vector: v - sum_k (v . q_k) q_k, q an orthonormal basis of the others.

    As when a direction that all personas share, of an assistant in general, should not be added once per persona.

    Args:
        vector: the vector.
        others: what to take out; they may depend on each other.
        keep_norm: give the rest the norm of the vector.
        blocks: only at these; None takes every block.

    Raises:
        PersonafastError: shapes or hook points that differ, a block out of range, or nothing left: less than 1 % of the
            vector lies outside the span of the others.
    """
    given = {"others": others} if isinstance(others, PersonaVector) else dict(others)
    if not given:
        raise PersonafastError("others: empty; give at least one vector to take out")
    check_alike({"the vector": vector, **given}, ["the vector", *given], "others")
    rest = vector.directions.double()
    for block in _checked(blocks, rest.shape[0]):
        before = float(rest[block].norm())
        basis = _basis(torch.stack([other.directions[block] for other in given.values()]).double())
        if before == 0 or not len(basis):
            continue
        row = _without(rest[block], basis)
        after = float(row.norm())
        if after < LEAST_REST * before:
            raise PersonafastError(
                f"vector: at block {block} it lies in the span of {', '.join(given)} ({100 * after / before:.2g} % of "
                "it is outside), so nothing would be left; leave that block out"
            )
        rest[block] = row * (before / after) if keep_norm else row
    note = {"names": sorted(given), "keep_norm": keep_norm}
    return replace(vector, directions=rest.float(), metadata={**vector.metadata, "removed": note})


def _checked(blocks: Sequence[int] | None, count: int) -> list[int]:
    chosen = list(range(count)) if blocks is None else [int(block) for block in blocks]
    for block in chosen:
        if not 0 <= block < count:
            raise PersonafastError(f"blocks: {block} is not in 0..{count - 1}")
    return chosen


def _orthogonal(rows: torch.Tensor, labels: Sequence[str], block: int, method: str, keep_norms: bool) -> torch.Tensor:
    """The new rows [N, H] of rows that are not zero."""
    norms = rows.norm(dim=1, keepdim=True)
    unit = rows / norms
    directions = torch.empty_like(unit)
    for index, row in enumerate(unit):
        rest = _without(row, directions[:index])
        share = float(rest.norm())
        if share < LEAST_REST:
            raise PersonafastError(
                f"{labels[index]}: at block {block} it depends on {', '.join(labels[:index])} ({100 * share:.2g} % of "
                "it is outside their span); leave one of them or that block out"
            )
        directions[index] = rest / share
    if method == "symmetric":
        # The polar factor of U, from its singular values rather than from those of U U^T, which are squared.
        left, _, right = torch.linalg.svd(unit, full_matrices=False)
        directions = left @ right
    lengths = norms if keep_norms else (rows * directions).sum(1, keepdim=True)
    return lengths * directions


def _basis(rows: torch.Tensor) -> torch.Tensor:
    """An orthonormal basis [R, H] of the span of rows [N, H]; a row that depends on those before it adds nothing."""
    found = torch.empty(0, rows.shape[1], dtype=rows.dtype)
    for row in rows:
        norm = float(row.norm())
        rest = _without(row, found)
        if norm > 0 and float(rest.norm()) >= LEAST_REST * norm:
            found = torch.cat([found, (rest / rest.norm())[None]])
    return found


def _without(row: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """What is left of a row [H] outside the span of an orthonormal basis [R, H]; taken out twice, against rounding."""
    for _ in range(2):
        row = row - basis.T @ (basis @ row)
    return row
