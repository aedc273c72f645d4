"""Libraries, vectors and blocks named on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from personafast.errors import PersonafastError
from personafast.library import PersonaLibrary
from personafast.vectors import PersonaVector


def open_library(folder: Path | None) -> PersonaLibrary:
    """The library of a folder, or the zoo's own."""
    if folder is not None:
        return PersonaLibrary.from_pretrained(folder)
    from personafast import zoo

    return PersonaLibrary.from_pretrained(zoo.path() / "library")


def choose_vectors(library: PersonaLibrary, names: Sequence[str], option: str) -> dict[str, PersonaVector]:
    """The vectors of these names, in their order; all, by name, if none is named.

    Raises:
        PersonafastError: a library without vectors, an unknown name, or one given twice.
    """
    if not library.vectors:
        raise PersonafastError("--library: holds no vectors; give the folder of a library that has some")
    listing = ", ".join(sorted(library.vectors))
    for name in names:
        if name not in library.vectors:
            raise PersonafastError(f"{option} {name!r}: no such vector in the library; there are: {listing}")
        if names.count(name) > 1:
            raise PersonafastError(f"{option} {name!r}: is given twice; name it once")
    return {name: library.vectors[name] for name in names or sorted(library.vectors)}


def choose_blocks(given: Sequence[str], count: int) -> list[int] | None:
    """The blocks of `--block`, repeated or "all"; None if it was not given.

    Raises:
        PersonafastError: no number, or no block of a model with `count` of them.
    """
    if not given:
        return None
    if list(given) == ["all"]:
        return list(range(count))
    for value in given:
        if not (value.isascii() and value.isdecimal() and int(value) < count):
            raise PersonafastError(f"--block {value!r}: give a number in 0..{count - 1}, or all")
    return sorted({int(value) for value in given})


def usual_block(vectors: Sequence[PersonaVector]) -> int:
    """The block most of them act on; the lowest of several."""
    acting = [block for vector in vectors for block in vector.blocks]
    return min(set(acting), key=lambda block: (-acting.count(block), block))
