"""Masks of a library on disk: one base mask, and in what each persona's mask differs from it.

`masks.safetensors` holds a tensor a mask and linear, named `mask::linear`: int32 [out, ceil(in / 32)] is the mask
itself, uint8 [n] its difference from the base (`masks/delta.py`). `mask_base.safetensors` holds the base by linear. A
linear has a base where that makes the whole smaller, and a mask is stored as a difference where that is smaller.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from personafast._io import read_safetensors, write_safetensors
from personafast.errors import FormatError, PersonafastError
from personafast.masks import delta
from personafast.masks.majority import majority
from personafast.masks.mask import PersonaMask

MASKS, BASE = "masks.safetensors", "mask_base.safetensors"
_PACKING = {"packing": "1 bit a weight along in, LSB first, 32 a word"}
_DIFFERENCES = {"packing": f"{_PACKING['packing']}; uint8: Rice-coded gaps of the bits that differ from {BASE}"}


@dataclass(frozen=True)
class PackedMasks:
    """Masks as they are stored.

    Attributes:
        base: linear -> int32 [out, W]; empty where no mask is stored as a difference.
        tensors: `mask::linear` -> the mask, int32 [out, W], or its difference from the base, uint8 [n].
    """

    base: Mapping[str, torch.Tensor]
    tensors: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, masks: Mapping[str, PersonaMask]) -> PackedMasks:
        """Find a base for every linear that several masks cover, and the differences from it."""
        base: dict[str, torch.Tensor] = {}
        tensors: dict[str, torch.Tensor] = {}
        names = sorted(masks)
        for path in sorted({path for mask in masks.values() for path in mask.words}):
            words = {name: masks[name].words[path] for name in names if path in masks[name].words}
            shared, stored = _with_base(words)
            if shared is not None:
                base[path] = shared
            tensors |= {f"{name}::{path}": tensor for name, tensor in stored.items()}
        return cls(base, tensors)

    @property
    def checksum(self) -> str:
        """SHA-256 of the base, by which a difference knows it."""
        return _checksum(self.base)

    def write(self, folder: Path) -> None:
        """Write the one or two files."""
        if self.tensors:
            write_safetensors(folder / MASKS, self.tensors, _DIFFERENCES if self.base else _PACKING)
        if self.base:
            write_safetensors(folder / BASE, self.base, _PACKING)


def read_masks(folder: Path, cards: Mapping[str, Mapping[str, Any]], base: str | None) -> dict[str, PersonaMask]:
    """The masks of a library's folder.

    Args:
        folder: the library.
        cards: mask -> its metadata, and its linears and their widths under ``in_features``.
        base: the base's checksum; None where there is none.

    Raises:
        FormatError: a file is missing or truncated, lacks a mask or a linear, a difference is damaged, or the base is
            another one than they were made against.
    """
    if not cards:
        return {}
    tensors, _ = read_safetensors(folder / MASKS)
    against: dict[str, torch.Tensor] = {}
    if base is not None:
        against, _ = read_safetensors(folder / BASE)
        if _checksum(against) != base:
            raise FormatError(
                f"{folder / BASE}: not the base that the masks beside it were stored against; copy the whole library"
            )
    return {name: _read_mask(folder / MASKS, name, card, tensors, against) for name, card in cards.items()}


def stored_bytes(folder: Path) -> tuple[dict[str, int], int]:
    """Bytes of tensors on disk: by mask, and of the base that they share.

    Raises:
        FormatError: a file is truncated.
    """
    by_mask: dict[str, int] = {}
    for key, size in _sizes(folder / MASKS).items():
        name = key.partition("::")[0]
        by_mask[name] = by_mask.get(name, 0) + size
    return by_mask, sum(_sizes(folder / BASE).values())


def expected_bytes(weights: Iterable[int], share: float) -> int:
    """Bytes that one more persona adds, by arithmetic on the sizes of its linears.

    Args:
        weights: weights of each linear, out times in.
        share: of the bits in which its mask differs from the base, at random places.
    """
    return round(sum(min(delta.expected_bytes(count, share), count / 8) for count in weights))


def _with_base(words: dict[str, torch.Tensor]) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
    masks = list(words.values())
    if len(masks) < 2 or any(mask.shape != masks[0].shape for mask in masks):
        return None, words
    base = majority([mask.cpu() for mask in masks])
    stored = {name: _smaller(mask, delta.encode(mask, base)) for name, mask in words.items()}
    whole = sum(_nbytes(mask) for mask in masks)
    if _nbytes(base) + sum(_nbytes(tensor) for tensor in stored.values()) >= whole:
        return None, words
    return base, stored


def _smaller(mask: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
    return difference if _nbytes(difference) < _nbytes(mask) else mask


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _checksum(base: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for path, words in sorted(base.items()):
        found.update(f"{path} {list(words.shape)} ".encode())
        found.update(words.contiguous().numpy().data)
    return found.hexdigest()


def _read_mask(
    file: Path,
    name: str,
    card: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    base: Mapping[str, torch.Tensor],
) -> PersonaMask:
    widths = card.get("in_features") or {}
    missing = [path for path in widths if f"{name}::{path}" not in tensors]
    if missing or not widths:
        what = missing[0] if missing else "every linear"
        raise FormatError(f"{file}: lacks the mask {name!r} of {what}; save the library again")
    words: dict[str, torch.Tensor] = {}
    for path in widths:
        found = tensors[f"{name}::{path}"]
        if found.dtype == torch.uint8 and found.dim() == 1:
            if path not in base:
                raise FormatError(f"{file}: {name!r} of {path} is a difference from {BASE}, which lacks that linear")
            try:
                found = delta.decode(found, base[path])
            except FormatError as error:
                raise FormatError(f"{file}: {name!r} of {path}: {error}; copy or save the library again") from None
        words[path] = found
    metadata = {key: value for key, value in card.items() if key != "in_features"}
    try:
        return PersonaMask(words, widths, metadata)
    except PersonafastError as error:
        raise FormatError(f"{file}: {name!r}: {error}") from None


def _sizes(file: Path) -> dict[str, int]:
    """Bytes of every tensor of a safetensors file of words or bytes, from its header."""
    if not file.is_file():
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            found = {}
            for key in opened.keys():  # noqa: SIM118
                part = opened.get_slice(key)
                count = 1
                for size in part.get_shape():
                    count *= size
                found[key] = count * (1 if part.get_dtype() == "U8" else 4)
            return found
    except (SafetensorError, OSError, ValueError) as error:
        raise FormatError(f"{file}: truncated or not safetensors ({error}); copy or save it again") from None
