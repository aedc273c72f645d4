"""Save persona vectors to a file of ours, or to files that another project reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from personafast.errors import FormatError, PersonafastError
from personafast.models.anatomy import ModelShape
from personafast.vectors.formats import control_vector, own, persona_vectors
from personafast.vectors.formats.conventions import format_named
from personafast.vectors.formats.fit import fit, num_blocks_of
from personafast.vectors.vector import PersonaVector


def save_vectors(
    path: str | Path,
    vectors: Mapping[str, PersonaVector],
    shape: ModelShape | None = None,
    *,
    format: str = "personafast",
    drop_block_0: bool = False,
) -> list[Path]:
    """Write vectors and return the files; each is written whole or not at all.

    Args:
        path: the file. The formats of other projects hold one vector a file: with several vectors, or a path that is a
            folder, each goes to a file of its own in that folder.
        vectors: the vectors by name, of one model.
        shape: that model; it is recorded where the format has room, and vectors of another one are refused.
        format: one of `FORMATS` but "library", which is `PersonaLibrary.save_pretrained`.
        drop_block_0: for GGUF, which has no block 0: leave that block out instead of refusing.

    Raises:
        FormatError: vectors of different models, or what the format cannot express: block 0 in GGUF, the last block in
            persona_vectors.
        PersonafastError: an unknown format, an unusable name, or the `gguf` package is missing.
    """
    path = Path(path)
    kind = format_named(format)
    if kind.name == "library":
        raise PersonafastError("format: a library is a folder; add the vectors to a PersonaLibrary and save_pretrained")
    blocks, hidden = num_blocks_of(vectors)
    fit(path, next(iter(vectors)), blocks, hidden, shape)
    for name in vectors:
        if not name or name.startswith(".") or any(mark in name for mark in ("/", "\\", "::", "\0")):
            raise PersonafastError(f"vectors: {name!r} is not a usable name; use letters, digits, '-' and '_'")
    if kind.name == "personafast":
        if path.is_dir():
            raise FormatError(f"{path}: is a folder; name a .safetensors file")
        own.write_file(path, vectors, shape)
        return [path]
    paths = _paths(path, vectors, kind.name)
    if kind.name == "persona_vectors":
        for name, vector in vectors.items():
            persona_vectors.check_writable(paths[name], name, vector)
        for name, vector in vectors.items():
            persona_vectors.write_file(paths[name], name, vector)
    else:
        for name, vector in vectors.items():
            control_vector.check_writable(paths[name], name, vector, drop_block_0)
        for name, vector in vectors.items():
            hint = shape.model_type if shape else str(vector.metadata.get("model_hint", "unknown"))
            control_vector.write_file(
                paths[name], name, vector, format=kind.name, model_type=hint, drop_block_0=drop_block_0
            )
    return list(paths.values())


def _paths(path: Path, vectors: Mapping[str, PersonaVector], format: str) -> dict[str, Path]:
    if len(vectors) == 1 and not path.is_dir() and path.suffix:
        return {name: path for name in vectors}
    if path.is_file() or path.suffix in (".pt", ".gguf"):
        raise FormatError(f"{path}: holds one vector, and there are {len(vectors)}; name a folder for them")
    if format == "persona_vectors":
        return {name: path / persona_vectors.file_name(name, vector) for name, vector in vectors.items()}
    return {name: path / f"{name}.gguf" for name in vectors}
