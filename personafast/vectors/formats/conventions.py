"""The formats by name: how each numbers layers, and how a file is recognised by its first bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from personafast.errors import FormatError, PersonafastError
from personafast.vectors.card import CONVENTION
from personafast.vectors.formats.gguf_file import read_gguf


@dataclass(frozen=True)
class Format:
    """How one project stores persona vectors.

    Attributes:
        name: what `--from` and `--to` call it.
        suffix: of its files; empty for a folder.
        convention: which row of a file belongs to which block, in words.
        row_label: what a file calls the row of a 0-based block.
    """

    name: str
    suffix: str
    convention: str
    row_label: Callable[[int], str]


_DIRECTION = "direction.N = added to the output of the 0-based block N; block 0 cannot be expressed"

FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        Format("personafast", ".safetensors", CONVENTION, lambda block: f"row {block}"),
        Format("library", "", CONVENTION, lambda block: f"row {block}"),
        Format(
            "persona_vectors",
            ".pt",
            "row L = output of the 0-based block L - 1; row 0 (the embedding) and the last (after the final norm) are "
            "dropped",
            lambda block: f"row {block + 1}",
        ),
        Format("repeng", ".gguf", _DIRECTION, lambda block: f"direction.{block}"),
        Format("dialz", ".gguf", _DIRECTION, lambda block: f"direction.{block}"),
    )
}


def format_named(name: str) -> Format:
    """The format of that name, or `PersonafastError` with the names there are."""
    if name not in FORMATS:
        raise PersonafastError(f"format: {name!r} is not one of {', '.join(FORMATS)}")
    return FORMATS[name]


def recognise(path: Path) -> str:
    """Name the format of a file or folder by what is in it; a suffix says nothing.

    Raises:
        FormatError: naming the path, when it is missing, empty, a bare pickle or nothing known.
    """
    if path.is_dir():
        if (path / "library.json").is_file():
            return "library"
        if any(path.glob("*_diff.pt")):
            return "persona_vectors"
        raise FormatError(f"{path}: holds neither library.json nor *_diff.pt; name a file, or a folder of vectors")
    if not path.is_file():
        raise FormatError(f"{path}: no such file; check the path")
    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        raise FormatError(f"{path}: the file is empty; copy or save it again")
    if head.startswith(b"GGUF"):
        return {"controlvector": "repeng", "steeringvector": "dialz"}[read_gguf(path).architecture]
    # A safetensors file begins with the length of its header, whose bytes can look like another format's first ones.
    if head[8:9] == b"{":
        return "personafast"
    if head.startswith(b"PK\x03\x04"):
        return "persona_vectors"
    if head.startswith(b"\x80"):
        raise FormatError(
            f"{path}: a bare pickle, which can run code, so it is not opened; save the tensor with torch.save"
        )
    raise FormatError(f"{path}: not a file of persona vectors; known are {', '.join(FORMATS)}")
