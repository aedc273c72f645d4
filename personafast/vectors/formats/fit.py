"""Whether what a file claims to hold is possible at all, and whether it fits the model it is meant for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from personafast.errors import FormatError
from personafast.models.anatomy import ModelShape
from personafast.vectors.vector import PersonaVector

MAX_BLOCKS, MAX_HIDDEN = 1024, 65_536
"""No decoder comes near; a file that claims more is broken or means to exhaust the memory."""


def fit(path: Path, name: str, blocks: int, hidden: int, shape: ModelShape | None, *, exact: bool = True) -> None:
    """Raise `FormatError`, naming file and vector, unless [blocks, hidden] is possible and that of the model.

    With `exact` off the file may describe fewer blocks than the model has.
    """
    if not (0 < blocks <= MAX_BLOCKS and 0 < hidden <= MAX_HIDDEN):
        raise FormatError(
            f"{path}: vector {name!r} claims {blocks} blocks of width {hidden}, where at most {MAX_BLOCKS} of "
            f"{MAX_HIDDEN} are possible; the file is broken"
        )
    if shape is None:
        return
    if hidden != shape.hidden_size:
        raise FormatError(
            f"{path}: vector {name!r} has width {hidden}, the model {shape.model_type!r} has {shape.hidden_size}; "
            "use a vector made for this model"
        )
    if blocks > shape.num_blocks or (exact and blocks != shape.num_blocks):
        raise FormatError(
            f"{path}: vector {name!r} describes {blocks} blocks, the model {shape.model_type!r} has "
            f"{shape.num_blocks}; use a vector made for this model"
        )


def fit_model(path: Path, recorded: object, shape: ModelShape | None) -> None:
    """Raise `FormatError` when the model that a file of ours names is another one than `shape`."""
    if shape is None or not isinstance(recorded, Mapping):
        return
    for what in ("model_type", "hidden_size", "num_blocks"):
        found, wanted = recorded.get(what), getattr(shape, what)
        if found is not None and found != wanted:
            raise FormatError(
                f"{path}: made for a model with {what} {found}, this one has {wanted}; use vectors made for this model"
            )


def num_blocks_of(vectors: Mapping[str, PersonaVector]) -> tuple[int, int]:
    """(blocks, hidden) that all vectors share, or `FormatError`."""
    found = {tuple(vector.directions.shape): name for name, vector in vectors.items()}
    if len(found) != 1:
        listing = ", ".join(f"{name!r} {list(size)}" for size, name in found.items())
        raise FormatError(f"vectors: of different models ({listing or 'none given'}); save those of one model together")
    (size,) = found
    return size[0], size[1]
