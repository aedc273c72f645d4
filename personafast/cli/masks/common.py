"""Masks and libraries of masks named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from personafast.errors import PersonafastError

if TYPE_CHECKING:
    from personafast.library import PersonaLibrary
    from personafast.masks import PersonaMask


def mask_of(library: PersonaLibrary, name: str, folder: Path) -> PersonaMask:
    """The library's mask of that name, or a `PersonafastError` that lists those there are."""
    if name not in library.masks:
        listing = ", ".join(sorted(library.masks)) or "none"
        raise PersonafastError(f"--library {folder}: holds no mask {name!r}; there are: {listing}")
    return library.masks[name]
