"""pack_mask and unpack_mask: one bit a weight, 32 weights a word, the least significant bit first.

A program takes one row and up to 128 words of it, 16 weights a thread: 16 bytes of booleans to read or to write, half
a word. A byte and a bit a weight move, whatever direction.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from personafast._triton.launch import Config, cdiv, launch, next_power_of_2


@triton.jit
def pack_mask_kernel(p_mask, p_packed, s_mask, n_features, n_words, BLOCK: tl.constexpr):
    """BLOCK words of a row; any byte but zero is a set bit, and the bits beyond the features are zero."""
    i_o = tl.program_id(0).to(tl.int64)
    o_w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_bit = tl.arange(0, 32)
    o_i = o_w[:, None] * 32 + o_bit[None, :]
    b_mask = tl.load(p_mask + i_o * s_mask + o_i, mask=o_i < n_features, other=0)
    b_word = tl.sum((b_mask != 0).to(tl.int32) << o_bit[None, :], 1)
    tl.store(p_packed + i_o * n_words + o_w, b_word, mask=o_w < n_words)


@triton.jit
def unpack_mask_kernel(p_packed, p_mask, s_packed, n_features, n_words, BLOCK: tl.constexpr):
    """BLOCK words of a row; the bits beyond the features are ignored."""
    i_o = tl.program_id(0).to(tl.int64)
    o_w = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_bit = tl.arange(0, 32)
    b_word = tl.load(p_packed + i_o * s_packed + o_w, mask=o_w < n_words, other=0)
    o_i = o_w[:, None] * 32 + o_bit[None, :]
    b_mask = (b_word[:, None] >> o_bit[None, :]) & 1
    tl.store(p_mask + i_o * n_features + o_i, b_mask.to(tl.uint8), mask=o_i < n_features)


@functools.cache
def mask_bits_config(words: int) -> Config:
    """Words of a row that a program takes: two threads a word."""
    block = min(128, max(16, next_power_of_2(words)))
    return Config({"BLOCK": block}, num_warps=block // 16)


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """Launch `pack_mask_kernel`; `personafast.ops.pack_mask` has checked the argument."""
    rows, features = mask.shape
    mask = (mask if mask.stride(1) == 1 else mask.contiguous()).view(torch.uint8)
    words = cdiv(features, 32)
    packed = torch.empty((rows, words), dtype=torch.int32, device=mask.device)
    config = mask_bits_config(words)
    grid = (rows, cdiv(words, config.constants["BLOCK"]), 1)
    launch(pack_mask_kernel, grid, config, mask, packed, mask.stride(0), features, words)
    return packed


def unpack_mask(packed: torch.Tensor, features: int) -> torch.Tensor:
    """Launch `unpack_mask_kernel`; `personafast.ops.unpack_mask` has checked the arguments."""
    rows, words = packed.shape
    packed = packed if packed.stride(1) == 1 else packed.contiguous()
    mask = torch.empty((rows, features), dtype=torch.bool, device=packed.device)
    config = mask_bits_config(words)
    grid = (rows, cdiv(words, config.constants["BLOCK"]), 1)
    launch(unpack_mask_kernel, grid, config, packed, mask.view(torch.uint8), packed.stride(0), features, words)
    return mask
