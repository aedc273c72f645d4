"""Reading and writing files so that a crash leaves the old file, and a broken file gives one clear line."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from personafast.errors import FormatError

_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def read_json(path: Path) -> Any:
    """Parse a JSON file, or raise `FormatError` naming it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file; check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise FormatError(f"{path}: not valid JSON ({error}); save it again from its source") from None


def read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Load tensors and metadata of a safetensors file, or raise `FormatError` naming it. Pickles are never opened."""
    if not path.is_file():
        raise FormatError(f"{path}: no such file; check the path")
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors file begins with the length of its JSON header, whose bytes can look like a pickle's first ones.
    if head.startswith(_PICKLE_MAGIC) and head[8:] != b"{":
        raise FormatError(f"{path}: this is a pickle (torch.save), which can run code; convert it to safetensors first")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{path}: truncated or not safetensors ({error}); copy or save it again") from None


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; what we publish should follow the user's umask.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; key order is kept."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors atomically, sorted by name.

    Equal contents give equal bytes as long as there is one metadata entry: safetensors orders several at random.
    """
    # Cloned, because safetensors refuses tensors that share memory.
    ordered = {
        name: tensors[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in sorted(tensors)
    }
    with atomic_path(path) as temporary:
        save_file(ordered, temporary, metadata=dict(metadata))


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield an empty directory beside `path`; on success it takes the place of `path`, on failure nothing changes."""
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        old = None
        if path.exists():
            old = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
            path.replace(old / "previous")
        try:
            temporary.replace(path)
        except OSError:
            if old is not None:
                (old / "previous").replace(path)
            raise
        finally:
            if old is not None:
                shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
