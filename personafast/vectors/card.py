"""What a JSON file says of a vector beside its tensor: written by libraries and by vector files alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from personafast.errors import PersonafastError
from personafast.vectors.vector import BLOCK_OUTPUT, PersonaVector

CONVENTION = "row b = added to the output of the 0-based block b"
_OURS = ("blocks", "hook_point", "missing", "norms")


def write_card(vector: PersonaVector) -> dict[str, Any]:
    """Blocks, hook point, missing blocks and norms of a vector, and its metadata beside them, as JSON values."""
    card: dict[str, Any] = {"blocks": list(vector.blocks), "hook_point": vector.hook_point}
    if vector.missing:
        card["missing"] = {str(block): why for block, why in vector.missing.items()}
    card["norms"] = [round(norm, 4) for norm in vector.norms.tolist()]
    return {**card, **{key: value for key, value in vector.metadata.items() if key not in _OURS}}


def read_card(directions: torch.Tensor, card: Mapping[str, Any]) -> PersonaVector:
    """The vector that `card` describes.

    Raises:
        PersonafastError: integers instead of floats, a card of another layout, or what `PersonaVector` refuses.
    """
    if not directions.is_floating_point():
        raise PersonafastError(f"directions are {directions.dtype}; save floats")
    try:
        missing = card.get("missing") or {}
        return PersonaVector(
            directions,
            card.get("blocks") or (),
            {key: value for key, value in card.items() if key not in _OURS},
            card.get("hook_point", BLOCK_OUTPUT),
            {int(block): why for block, why in missing.items()},
        )
    except PersonafastError:
        raise
    except (AttributeError, TypeError, ValueError) as error:
        raise PersonafastError(f"its description is not laid out as a vector's ({error})") from None
