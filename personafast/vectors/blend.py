"""Linear blends of persona vectors: whatever goes in, one row a block comes out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from personafast.errors import PersonafastError
from personafast.vectors.vector import PersonaVector

NORMALIZATIONS = ("none", "unit", "match")


@dataclass(frozen=True)
class WeightedVector:
    """One term of a blend: float64 rows c_i s_ib v_ib [len(blocks), hidden] for the blocks it acts at, ascending."""

    blocks: tuple[int, ...]
    rows: torch.Tensor


def blend(
    vectors: Mapping[str, PersonaVector],
    coefficients: Mapping[str, float],
    *,
    blocks: Sequence[int] | None = None,
    normalize: str = "none",
) -> torch.Tensor:
    """Sum over i of c_i s_ib v_ib at every block b (arXiv 2510.10157, which has s = 1).

    Vector i acts at block b if c_i is not 0 and b is among `blocks` or, where that is None, among its own blocks. The
    sum is taken in float64 in the order of the names and rounded once, so that the order of `coefficients` changes no
    bit.

    Args:
        vectors: the vectors by name.
        coefficients: name -> c_i; names must be among `vectors`.
        blocks: act on these blocks only; None takes each vector's own.
        normalize: how long each vector is before its coefficient. Norms of trait vectors differ several-fold, and a raw
            sum is ruled by the longest.

            - "none": s = 1, as it is.
            - "unit": s_ib = 1 / |v_ib|. The length of the blend is then all in the coefficients, the same at every
              block, although the residual stream grows from block to block.
            - "match": s_ib = m_b / |v_ib|, m_b being the mean of |v_jb| over the vectors j that act at b. All are
              equally long, and coefficients keep the size they have under "none". A vector alone is left as it is.

    Returns:
        float32 [num_blocks, hidden]; rows of blocks that nothing acts on are zero.

    Raises:
        PersonafastError: no coefficients, an unknown name, a coefficient that is not finite, shapes or hook points that
            differ, a block out of range or without a direction, a blend too long for float32; under "unit" and "match"
            a vector of norm zero at a block where it acts.
    """
    terms = weigh(vectors, coefficients, blocks=blocks, normalize=normalize)
    total = torch.zeros(vectors[next(iter(coefficients))].directions.shape, dtype=torch.float64)
    for term in terms.values():
        total[list(term.blocks)] += term.rows
    found = total.float()
    if not torch.isfinite(found).all():
        bad = (~torch.isfinite(found)).any(dim=1).nonzero().flatten().tolist()
        raise PersonafastError(f"coefficients: the blend overflows float32 at blocks {bad[:8]}; give smaller ones")
    return found


def weigh(
    vectors: Mapping[str, PersonaVector],
    coefficients: Mapping[str, float],
    *,
    blocks: Sequence[int] | None = None,
    normalize: str = "none",
) -> dict[str, WeightedVector]:
    """Return the terms that `blend` sums, with its arguments and errors, by name in alphabetical order.

    Vectors of coefficient 0 are checked and left out.
    """
    if normalize not in NORMALIZATIONS:
        raise PersonafastError(f"normalize: {normalize!r} is not one of {', '.join(NORMALIZATIONS)}")
    names = sorted(coefficients)
    check_alike(vectors, names, "coefficients")
    acting: dict[str, tuple[int, ...]] = {}
    for name in names:
        if not math.isfinite(coefficients[name]):
            raise PersonafastError(f"coefficients[{name!r}]: {coefficients[name]} is not finite; give a finite number")
        if coefficients[name] != 0:
            acting[name] = acting_blocks(name, vectors[name], blocks)
    rows = {name: vectors[name].directions[list(where)].double() for name, where in acting.items()}
    if normalize != "none":
        norms = {name: checked_norms(name, acting[name], rows[name], f'normalize="{normalize}"') for name in rows}
        lengths = _mean_norms(acting, norms) if normalize == "match" else {}
        for name, norm in norms.items():
            target = torch.tensor([lengths.get(block, 1.0) for block in acting[name]], dtype=torch.float64)
            rows[name] = rows[name] * (target / norm)[:, None]
    return {name: WeightedVector(acting[name], coefficients[name] * rows[name]) for name in rows}


def check_alike(vectors: Mapping[str, PersonaVector], names: Sequence[str], argument: str) -> None:
    """Raise `PersonafastError` unless `vectors` has all the names, in one shape, read at one hook point, and finite."""
    if not names:
        raise PersonafastError(f"{argument}: empty; name at least one vector")
    for name in names:
        if name not in vectors:
            raise PersonafastError(f"vectors: no vector {name!r}; there are {_listing(vectors)}")
    check_shapes({name: vectors[name] for name in names})
    first = vectors[names[0]]
    for name in names:
        vector = vectors[name]
        if vector.hook_point != first.hook_point:
            raise PersonafastError(
                f"vectors[{name!r}]: read at {vector.hook_point!r}, others of the blend at {first.hook_point!r}; "
                "blend vectors of one hook point only"
            )
        # Checked when it was made, but a tensor can be written to afterwards.
        if not torch.isfinite(vector.directions).all():
            raise PersonafastError(f"vectors[{name!r}]: NaN or infinity; extract it again")


def check_shapes(vectors: Mapping[str, PersonaVector]) -> None:
    """Raise `PersonafastError` unless all are vectors of one shape."""
    shapes = {}
    for name, vector in vectors.items():
        if not isinstance(vector, PersonaVector):
            raise PersonafastError(
                f"vectors[{name!r}]: expected a PersonaVector, got {type(vector).__name__}; "
                "wrap it in PersonaVector(...)"
            )
        shapes[name] = list(vector.directions.shape)
        first = next(iter(shapes))
        if shapes[name] != shapes[first]:
            raise PersonafastError(
                f"vectors[{name!r}]: shape {shapes[name]} does not fit {shapes[first]} of {first!r}; "
                "take vectors of one model only"
            )


def checked_norms(name: str, blocks: Sequence[int], rows: torch.Tensor, purpose: str) -> torch.Tensor:
    """Return the norm of every row of `rows` [len(blocks), hidden], or refuse a zero by the vector's name and block."""
    norms = rows.norm(dim=1)
    zero = [block for block, norm in zip(blocks, norms.tolist(), strict=True) if norm == 0]
    if zero:
        raise PersonafastError(
            f"vectors[{name!r}]: has norm zero at block {zero[0]}, so no direction there for {purpose}; "
            "leave that block or the vector out"
        )
    return norms


def acting_blocks(name: str, vector: PersonaVector, blocks: Sequence[int] | None) -> tuple[int, ...]:
    """`blocks`, or the vector's own, ascending and each once; one out of range or without a direction is refused."""
    chosen = sorted({int(block) for block in (vector.blocks if blocks is None else blocks)})
    count = vector.directions.shape[0]
    if any(not 0 <= block < count for block in chosen):
        raise PersonafastError(f"blocks: {chosen} has an index that is not in 0..{count - 1}")
    for block in chosen:
        if block in vector.missing:
            raise PersonafastError(
                f"vectors[{name!r}]: block {block} has no direction ({vector.missing[block]}); name other blocks"
            )
    return tuple(chosen)


def _mean_norms(acting: Mapping[str, tuple[int, ...]], norms: Mapping[str, torch.Tensor]) -> dict[int, float]:
    """Block -> mean norm of the vectors that act there."""
    found: dict[int, list[float]] = {}
    for name, blocks in acting.items():
        for block, norm in zip(blocks, norms[name].tolist(), strict=True):
            found.setdefault(block, []).append(norm)
    return {block: math.fsum(each) / len(each) for block, each in found.items()}


def _listing(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
