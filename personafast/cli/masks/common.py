"""Masks and libraries of masks named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from personafast.errors import PersonafastError

if TYPE_CHECKING:
    from personafast.library import PersonaLibrary
    from personafast.masks import PersonaMask
    from personafast.models.anatomy import ModelShape


def mask_of(library: PersonaLibrary, name: str, folder: Path) -> PersonaMask:
    """The library's mask of that name, or a `PersonafastError` that lists those there are."""
    if name not in library.masks:
        listing = ", ".join(sorted(library.masks)) or "none"
        raise PersonafastError(f"--library {folder}: holds no mask {name!r}; there are: {listing}")
    return library.masks[name]


def check_model(folder: Path, library: PersonaLibrary, shape: ModelShape) -> None:
    """Raise `PersonafastError` unless the library is of a model of this shape, or of none yet."""
    if library.shape not in (None, shape):
        raise PersonafastError(f"--library {folder}: made for another model; give another folder")
