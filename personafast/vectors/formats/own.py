"""Our files: one or many vectors in one safetensors file, and the vectors of a library folder.

The tensors are float32 [num_blocks, hidden], one a vector, under the vector's name. The metadata has one entry,
"personafast", a JSON object: format ("personafast vectors"), format_version, convention, model (model_type,
hidden_size, num_blocks and vocab_size, or null), and for each vector its blocks, hook_point, missing blocks, norms and
what is known of its making.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from personafast._io import read_json, read_safetensors, write_safetensors
from personafast.errors import FormatError, PersonafastError
from personafast.models.anatomy import ModelShape
from personafast.vectors.card import CONVENTION, read_card, write_card
from personafast.vectors.formats.fit import fit, fit_model, num_blocks_of
from personafast.vectors.vector import PersonaVector

FORMAT_VERSION = 1
_ENTRY, _KIND = "personafast", "personafast vectors"


def read_file(path: Path, shape: ModelShape | None) -> dict[str, PersonaVector]:
    """Every vector of one of our files.

    Raises:
        FormatError: truncated, not ours, of another version or another model, or a vector that cannot be one.
    """
    tensors, metadata = read_safetensors(path)
    try:
        index = json.loads(metadata[_ENTRY])
        kind, version, cards = index["format"], index["format_version"], index["vectors"]
        listed = sorted(cards)
    except (KeyError, TypeError, ValueError):
        raise FormatError(
            f"{path}: safetensors without the description of persona vectors; give a file that save_vectors wrote"
        ) from None
    if (kind, version) != (_KIND, FORMAT_VERSION):
        raise FormatError(
            f"{path}: expected {_KIND!r} of format_version {FORMAT_VERSION}, found {kind!r} of {version}; "
            "save it again with this version"
        )
    if listed != sorted(tensors):
        odd = sorted(set(listed) ^ set(tensors))[0]
        raise FormatError(f"{path}: {odd!r} is listed without its tensor, or the other way round; save it again")
    fit_model(path, index.get("model"), shape)
    return _vectors(path, tensors, cards, shape)


def read_library(folder: Path, shape: ModelShape | None) -> dict[str, PersonaVector]:
    """The vectors of a `PersonaLibrary` folder; its masks and policies are left alone.

    Raises:
        FormatError: as `read_file`.
    """
    index = read_json(folder / "library.json")
    if not isinstance(index, dict) or not isinstance(index.get("vectors"), dict) or not index["vectors"]:
        raise FormatError(f"{folder / 'library.json'}: lists no vectors; give a library that holds some")
    fit_model(folder / "library.json", index.get("model"), shape)
    path = folder / "vectors.safetensors"
    tensors, _ = read_safetensors(path)
    missing = sorted(set(index["vectors"]) - set(tensors))
    if missing:
        raise FormatError(f"{path}: lacks the vector {missing[0]!r} that library.json lists; save the library again")
    return _vectors(path, tensors, index["vectors"], shape)


def recorded_shape(path: Path) -> ModelShape | None:
    """The model that a file or library of ours says it was made for, or None where it says nothing."""
    try:
        if path.is_dir():
            index = read_json(path / "library.json")
        else:
            index = json.loads(read_safetensors(path)[1][_ENTRY])
        return ModelShape(**index["model"])
    except (KeyError, TypeError, ValueError):  # among them FormatError: a file of another project
        return None


def write_file(path: Path, vectors: Mapping[str, PersonaVector], shape: ModelShape | None) -> None:
    """Write vectors to one file of ours, atomically; equal vectors give equal bytes.

    Raises:
        FormatError: the vectors are of different models, or not of the model `shape`.
    """
    blocks, hidden = num_blocks_of(vectors)
    fit(path, next(iter(vectors)), blocks, hidden, shape)
    index = {
        "format": _KIND,
        "format_version": FORMAT_VERSION,
        "convention": CONVENTION,
        "model": asdict(shape) if shape else None,
        "vectors": {name: write_card(vector) for name, vector in sorted(vectors.items())},
    }
    tensors = {name: vector.directions for name, vector in vectors.items()}
    write_safetensors(path, tensors, {_ENTRY: json.dumps(index, ensure_ascii=False)})


def _vectors(
    path: Path, tensors: Mapping[str, torch.Tensor], cards: Mapping[str, Any], shape: ModelShape | None
) -> dict[str, PersonaVector]:
    found = {}
    for name, card in cards.items():
        size = tuple(tensors[name].shape)
        if len(size) != 2:
            raise FormatError(f"{path}: {name!r}: shape {list(size)}, expected [num_blocks, hidden]")
        fit(path, name, size[0], size[1], shape)
        try:
            found[name] = read_card(tensors[name], card)
        except PersonafastError as error:
            raise FormatError(f"{path}: {name!r}: {error}") from None
    return found
