"""Linear blends of persona vectors: whatever goes in, one row a block comes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch

from personafast.errors import PersonafastError
from personafast.vectors.vector import PersonaVector


def blend(
    vectors: Mapping[str, PersonaVector],
    coefficients: Mapping[str, float],
    *,
    blocks: Sequence[int] | None = None,
    normalize: str = "none",
) -> torch.Tensor:
    """Sum_i c_i v_i per block (arXiv 2510.10157).

    Args:
        vectors: the vectors by name.
        coefficients: name -> c_i; names must be among `vectors`.
        blocks: act on these blocks only; None takes each vector's own.
        normalize: "none" adds the vectors as they are; "unit" scales each to norm 1 at every block first, because the
            norms of trait vectors differ several-fold and a raw sum is ruled by the longest.

    Returns:
        float32 [num_blocks, hidden]; rows of blocks that nothing acts on are zero.

    Raises:
        PersonafastError: no coefficients, an unknown name, shapes or hook points that differ, a block out of range or
            without a direction.
    """
    if normalize not in ("none", "unit"):
        raise PersonafastError(f"normalize: {normalize!r} is not one of none, unit")
    if not coefficients:
        raise PersonafastError("coefficients: empty; name at least one vector")
    total: torch.Tensor | None = None
    hook_point = ""
    for name, coefficient in coefficients.items():
        if name not in vectors:
            raise PersonafastError(f"vectors: no vector {name!r}; there are {_listing(vectors)}")
        vector = vectors[name]
        if total is None:
            total, hook_point = torch.zeros_like(vector.directions), vector.hook_point
        if vector.directions.shape != total.shape:
            raise PersonafastError(
                f"vectors[{name!r}]: shape {list(vector.directions.shape)} does not fit {list(total.shape)}; "
                "blend vectors of one model only"
            )
        if vector.hook_point != hook_point:
            raise PersonafastError(
                f"vectors[{name!r}]: read at {vector.hook_point!r}, others of the blend at {hook_point!r}; "
                "blend vectors of one hook point only"
            )
        rows = list(vector.blocks if blocks is None else blocks)
        if any(not 0 <= row < total.shape[0] for row in rows):
            raise PersonafastError(f"blocks: {rows} has an index that is not in 0..{total.shape[0] - 1}")
        for row in rows:
            if row in vector.missing:
                raise PersonafastError(
                    f"vectors[{name!r}]: block {row} has no direction ({vector.missing[row]}); name other blocks"
                )
        part = vector.directions[rows]
        if normalize == "unit":
            part = torch.nn.functional.normalize(part, dim=1)
        total[rows] += coefficient * part
    assert total is not None
    return total


def _listing(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
