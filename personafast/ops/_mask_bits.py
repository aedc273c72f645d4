"""pack_mask and unpack_mask: one bit a weight, 32 weights a word."""

from __future__ import annotations

import sys

import torch

from personafast.ops import _backend
from personafast.ops._library import check_dims, check_dtype, fail, register

_LITTLE = sys.byteorder == "little"


def words(features: int) -> int:
    """int32 words that hold `features` bits: ceil(features / 32)."""
    return (features + 31) // 32


def pack_reference(mask: torch.Tensor) -> torch.Tensor:
    """The specification of `pack_mask` in plain torch."""
    rows, columns = mask.shape
    padded = torch.nn.functional.pad(mask, (0, -columns % 32)).view(rows, words(columns), 32).to(torch.int64)
    packed = (padded << torch.arange(32, device=mask.device)).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_reference(packed: torch.Tensor, features: int) -> torch.Tensor:
    """The specification of `unpack_mask` in plain torch."""
    bits = (packed[..., None] >> torch.arange(32, device=packed.device, dtype=torch.int32)) & 1
    return bits.flatten(-2)[..., :features].bool()


def unpack(packed: torch.Tensor, features: int) -> torch.Tensor:
    """`unpack_reference` through bytes: a quarter of its traffic. Needs a little-endian machine."""
    if not _LITTLE:
        return unpack_reference(packed, features)
    if not packed.is_contiguous() or packed.stride(-1) != 1:  # one word a row is contiguous at any stride
        packed = packed.clone(memory_format=torch.contiguous_format)
    octets = packed.view(torch.uint8)
    bits = (octets[..., None] >> torch.arange(8, device=packed.device, dtype=torch.uint8)) & 1
    return bits.flatten(-2)[..., :features].view(torch.bool)


def _validate_pack(mask: torch.Tensor) -> None:
    check_dims("pack_mask", "mask", mask, 2, "[O, I]")
    check_dtype("pack_mask", "mask", mask, torch.bool)


def _cpp_pack(mask: torch.Tensor) -> torch.Tensor:
    rows, columns = mask.shape
    if mask.stride(1) != 1:
        mask = mask.contiguous()
    packed = torch.empty((rows, words(columns)), dtype=torch.int32)
    _backend.module("cpu").pack_mask(
        mask.data_ptr(), mask.stride(0), packed.data_ptr(), rows, columns, torch.get_num_threads()
    )
    return packed


def _run_pack(mask: torch.Tensor) -> torch.Tensor:
    _validate_pack(mask)
    backend = _backend.pick("pack_mask", mask.device.type)
    if backend == "cpu":
        return _cpp_pack(mask)
    if backend == "triton":
        packed: torch.Tensor = _backend.module("triton").pack_mask(mask)
        return packed
    return pack_reference(mask)


def _fake_pack(mask: torch.Tensor) -> torch.Tensor:
    _validate_pack(mask)
    return mask.new_empty((mask.shape[0], words(mask.shape[1])), dtype=torch.int32)


def _validate_unpack(packed: torch.Tensor, features: int) -> None:
    check_dims("unpack_mask", "packed", packed, 2, "[O, ceil(I / 32)]")
    check_dtype("unpack_mask", "packed", packed, torch.int32)
    if features < 0 or packed.shape[1] != words(features):
        fail(
            "unpack_mask",
            f"`packed` has shape {list(packed.shape)}, but {features} features need {words(features)} words a row",
        )


def _cpp_unpack(packed: torch.Tensor, features: int) -> torch.Tensor:
    rows = packed.shape[0]
    if packed.stride(1) != 1:
        packed = packed.contiguous()
    mask = torch.empty((rows, features), dtype=torch.bool)
    _backend.module("cpu").unpack_mask(
        packed.data_ptr(), packed.stride(0), mask.data_ptr(), rows, features, torch.get_num_threads()
    )
    return mask


def _run_unpack(packed: torch.Tensor, features: int) -> torch.Tensor:
    _validate_unpack(packed, features)
    backend = _backend.pick("unpack_mask", packed.device.type)
    if backend == "cpu":
        return _cpp_unpack(packed, features)
    if backend == "triton":
        mask: torch.Tensor = _backend.module("triton").unpack_mask(packed, features)
        return mask
    if backend == "reference":
        return unpack_reference(packed, features)
    return unpack(packed, features).clone(memory_format=torch.contiguous_format)


def _fake_unpack(packed: torch.Tensor, features: int) -> torch.Tensor:
    _validate_unpack(packed, features)
    return packed.new_empty((packed.shape[0], features), dtype=torch.bool)


_KERNELS = ("cpu", "triton")
_pack = register("pack_mask(Tensor mask) -> Tensor", _run_pack, _fake_pack, _KERNELS)
_unpack = register("unpack_mask(Tensor packed, SymInt features) -> Tensor", _run_unpack, _fake_unpack, _KERNELS)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Pack a boolean mask along its input features, least significant bit first.

    Bit j of word w of row o is mask[o, 32 w + j]; the bits beyond I are zero. On a GPU it is one launch of a Triton
    kernel.

    Args:
        mask: bool [O, I].

    Returns:
        int32 [O, ceil(I / 32)].

    Raises:
        PersonafastError: `mask` is not a boolean matrix.
    """
    return _pack(mask)


def unpack_mask(packed: torch.Tensor, features: int) -> torch.Tensor:
    """Undo `pack_mask`; on a GPU, one launch of a Triton kernel.

    Args:
        packed: int32 [O, ceil(I / 32)]; bits beyond I are ignored.
        features: I.

    Returns:
        bool [O, I].

    Raises:
        PersonafastError: `packed` is not an int32 matrix of ceil(features / 32) columns.
    """
    return _unpack(packed, features)
