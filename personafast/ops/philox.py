"""Counter-based random numbers: a draw depends on its seed, position and stream, never on batch or device."""

from __future__ import annotations

import os

import torch

from personafast.ops import _backend
from personafast.ops._library import PLAIN, check_device, check_dtype, check_shape, fail

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox4x32(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3).

    Args:
        counter: int64 [4, ...], words in [0, 2**32).
        key: int64 [2, ...], words in [0, 2**32), of a shape that broadcasts with the counter's.

    Returns:
        int64 [4, ...], words in [0, 2**32).
    """
    device = counter.device
    tail = (1,) * (counter.dim() - 1)
    # The two halves of a round run side by side: words 0 and 2 are multiplied, words 1 and 3 are folded in. int64
    # products wrap around, and their two 32-bit halves are those of the unsigned product all the same.
    multiplier = torch.tensor(_MULTIPLIERS, device=device).view(2, *tail)
    weyl = torch.tensor(_WEYL, device=device).view(2, *tail)
    even, odd = counter[0::2], counter[1::2]
    for step in range(_ROUNDS):
        product = even * multiplier
        round_key = (key + step * weyl) & _MASK
        even = ((product >> 32) & _MASK).flip(0) ^ odd ^ round_key
        odd = (product & _MASK).flip(0)
    return torch.stack((even[0], odd[0], even[1], odd[1]))


def uniform(seeds: torch.Tensor, positions: torch.Tensor, stream: int, n: int = 1) -> torch.Tensor:
    """Uniform numbers in the open interval (0, 1), the same bits on every device.

    Row b is keyed by seeds[b]; the Philox counter is (positions[b] low word, high word, stream, block), and a block
    gives two numbers. Each is an odd multiple of 2**-53, so neither 0 nor 1 can occur and log(u) is finite. On a GPU
    it is one launch where Triton is installed.

    Args:
        seeds: int64 [B].
        positions: int64 [B], usually the index of the token to be drawn.
        stream: separates uses that share seed and position, in [0, 2**32).
        n: numbers a row; the first ones do not depend on it.

    Returns:
        float64 [B, n] on the device of `seeds`.

    Raises:
        PersonafastError: a shape or dtype does not fit, or `stream` or `n` is out of range.
    """
    check_dtype("uniform", "seeds", seeds, torch.int64)
    check_dtype("uniform", "positions", positions, torch.int64)
    check_shape("uniform", "positions", positions, tuple(seeds.shape), "[B]")
    if seeds.dim() != 1:
        fail("uniform", f"`seeds` has shape {list(seeds.shape)}, expected [B]")
    if not 0 <= stream <= _MASK:
        fail("uniform", f"`stream` is {stream}, expected 0 to 2**32 - 1")
    if n < 0:
        fail("uniform", f"`n` is {n}, expected 0 or more")
    if _kernel_takes(seeds, positions):
        return _backend.module("triton").philox_uniform(seeds, positions, stream, n)
    if seeds.device.type == "cpu" and _backend.forced() != "reference" and _backend.available("cpu")[0]:
        out = torch.empty((seeds.shape[0], n), dtype=torch.float64)
        seeds, positions = seeds.contiguous(), positions.contiguous()
        _backend.module("cpu").philox_uniform(
            out.data_ptr(), seeds.data_ptr(), positions.data_ptr(), stream, seeds.shape[0], n
        )
        return out
    return reference(seeds, positions, stream, n)


def _kernel_takes(seeds: torch.Tensor, positions: torch.Tensor) -> bool:
    """Whether the Triton kernel runs: for CUDA tensors, which torch takes some 40 launches for, or in the interpreter.

    The numbers are the same everywhere, so a backend that has no kernel of its own is no reason to refuse.
    """
    name = _backend.forced()
    if seeds.is_cpu:
        if name != "triton" or os.environ.get("TRITON_INTERPRET") != "1":
            return False
    elif not seeds.is_cuda or name not in (None, "triton") or not _backend.available("triton")[0]:
        return False
    check_device("uniform", "positions", positions, seeds.device)
    return type(seeds) in PLAIN and type(positions) in PLAIN and not torch.compiler.is_compiling()


def reference(seeds: torch.Tensor, positions: torch.Tensor, stream: int, n: int = 1) -> torch.Tensor:
    """The specification of `uniform` in plain torch, for every device."""
    blocks = (n + 1) // 2
    counter = seeds.new_empty((4, seeds.shape[0], blocks))
    counter[0] = (positions & _MASK)[:, None]
    counter[1] = ((positions >> 32) & _MASK)[:, None]
    counter[2] = stream
    counter[3] = torch.arange(blocks, device=seeds.device)
    key = torch.stack((seeds & _MASK, (seeds >> 32) & _MASK))[:, :, None]
    word = philox4x32(counter, key) >> 6  # 26 bits of each
    pairs = torch.stack((word[0] << 26 | word[1], word[2] << 26 | word[3]), -1).flatten(1)[:, :n]
    return (pairs * 2 + 1).double() * 2.0**-53
