"""GGUF files byte by byte, the broken ones too: what a writer would refuse to write."""

from __future__ import annotations

import struct

import numpy as np

F32, F16, I32, Q8_0 = 0, 1, 26, 8


def text(value: str) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name: str, value: str | int) -> bytes:
    if isinstance(value, int):
        return text(name) + struct.pack("<II", 4, value)
    return text(name) + struct.pack("<I", 8) + text(value)


def header(tensors: int, keys: list[bytes], version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, len(keys)) + b"".join(keys)


def control_vector(
    directions: list[tuple[str, np.ndarray]], architecture: str = "controlvector", kind: int = F32, version: int = 3
) -> bytes:
    """A file with these named tensors; a name may come twice, widths may differ."""
    keys = [
        key("general.architecture", architecture),
        key(f"{architecture}.model_hint", "llama"),
        key(f"{architecture}.layer_count", len(directions)),
    ]
    entries, data = b"", b""
    for name, values in directions:
        dims = tuple(reversed(values.shape))
        entries += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(data))
        data += values.tobytes() + b"\0" * (-values.nbytes % 32)
    head = header(len(directions), keys, version) + entries
    return head + b"\0" * (-len(head) % 32) + data
