"""A blend as a vector of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from personafast.errors import PersonafastError
from personafast.vectors.blend import blend, weigh
from personafast.vectors.vector import PersonaVector


def blended_vector(
    vectors: Mapping[str, PersonaVector],
    coefficients: Mapping[str, float],
    *,
    blocks: Sequence[int] | None = None,
    normalize: str = "none",
) -> PersonaVector:
    """Make one vector that does at coefficient 1 what `blend` of the same arguments does.

    It acts where the blend acts. Its other rows are the blend with every vector there, as `Persona(blocks=...)` would
    ask of the parts, so that the new vector may be moved to other blocks too; they are zero where some part is zero,
    and missing where a part's direction is missing.

    Returns:
        A vector whose metadata hold method "blend", the coefficients and `normalize`.

    Raises:
        PersonafastError: what `blend` raises, or a blend that acts nowhere.
    """
    rows = blend(vectors, coefficients, blocks=blocks, normalize=normalize)
    terms = weigh(vectors, coefficients, blocks=blocks, normalize=normalize)
    acting = sorted({block for term in terms.values() for block in term.blocks})
    if not acting:
        raise PersonafastError("coefficients: nothing acts; give a coefficient other than 0")
    parts = torch.stack([vectors[name].directions for name in terms])
    missing = {block: why for name in terms for block, why in vectors[name].missing.items() if block not in acting}
    spare = [block for block in range(rows.shape[0]) if block not in acting and bool(parts[:, block].any(dim=1).all())]
    if spare:
        rows[spare] = blend(vectors, coefficients, blocks=spare, normalize=normalize)[spare]
    metadata = {
        "method": "blend",
        "coefficients": {name: float(coefficients[name]) for name in sorted(terms)},
        "normalize": normalize,
    }
    return PersonaVector(rows, acting, metadata, vectors[next(iter(terms))].hook_point, missing)
