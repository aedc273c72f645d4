"""The folder that an interrupted extraction goes on from."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import nn

from personafast._io import read_json, write_json, write_text
from personafast.errors import FormatError
from personafast.models.anatomy import anatomy


def trait_folder(state: Path, trait: str) -> Path:
    """The part of a state folder that belongs to one trait, whatever characters its name has."""
    return state / f"trait-{quote(trait, safe='')}"


def open_state(folder: Path, settings: Mapping[str, Any]) -> Path:
    """Make the folder, or check that what is in it was made with the same settings.

    Raises:
        FormatError: it was made with others; the message names them.
    """
    path = folder / "settings.json"
    if not path.is_file():
        write_json(path, dict(settings))
        return folder
    found = read_json(path)
    if not isinstance(found, dict):
        raise FormatError(f"{path}: not the settings of an extraction; give another folder")
    changed = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
    if changed:
        raise FormatError(
            f"{folder}: begun with another {', '.join(changed)}; repeat those settings to resume, or remove the folder "
            "to begin again"
        )
    return folder


def digest(value: Any) -> str:
    """A short hash of plain JSON values."""
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode()).hexdigest()[:16]


def model_settings(model: nn.Module) -> dict[str, str]:
    """What tells one model from another: its shape, its dtype, and a hash over a few values of every parameter.

    Of a parameter whose values cannot be had (offloaded, or packed by a quantiser) only name and shape count.
    """
    shape = anatomy(model).shape
    parameters = dict(model.named_parameters())
    dtype = str(next(iter(parameters.values())).dtype).removeprefix("torch.")
    hashed = hashlib.sha256()
    for name in sorted(parameters):
        hashed.update(f"{name} {list(parameters[name].shape)}".encode())
        with contextlib.suppress(NotImplementedError, RuntimeError, TypeError):
            flat = parameters[name].detach().flatten()
            some = flat[:: max(1, len(flat) // 64)][:64].cpu().contiguous()
            hashed.update(some.view(torch.uint8).numpy().tobytes())
    return {
        "model": f"{shape.model_type} {shape.num_blocks} x {shape.hidden_size} {dtype}",
        "weights": hashed.hexdigest()[:16],
    }


class Lines:
    """A JSON-lines file that grows by whole lines; a line that a crash cut short is dropped at opening.

    Without a path the records are only kept in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self.records: list[dict[str, Any]] = []
        if path is not None and path.is_file():
            *whole, torn = path.read_bytes().split(b"\n")
            try:
                self.records = [json.loads(line) for line in whole]
            except ValueError:
                raise FormatError(f"{path}: not a file of responses; remove it to begin again") from None
            if torn:
                write_text(path, "".join(line.decode() + "\n" for line in whole))

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Append records and wait until they are on disk."""
        records = list(records)
        self.records += records
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
            file.flush()
            os.fsync(file.fileno())
