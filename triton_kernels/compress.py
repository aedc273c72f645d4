"""compress: the weights that a mask keeps, row by row, the mask without bits beyond the last feature, and the offsets.

Count, sum the counts up, copy. How many values there are decides what is allocated, so between the two launches the
host reads one number: this prepares a layer once, and is nothing to be captured in a graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from personafast._triton.launch import Config, launch


@triton.jit
def _count(b_bits):
    """Bits of every word; LLVM knows the idiom for popc."""
    b_bits = b_bits - ((b_bits >> 1) & 0x55555555)
    b_bits = (b_bits & 0x33333333) + ((b_bits >> 2) & 0x33333333)
    b_bits = (b_bits + (b_bits >> 4)) & 0x0F0F0F0F
    return ((b_bits * 0x01010101) >> 24) & 0x3F


@triton.jit
def compress_count_kernel(p_counts, p_bitmap, p_mask, s_mask, s_mask_column, words, features, WORDS: tl.constexpr):
    """One row of W words: the bits up to I, and how many there are."""
    i_o = tl.program_id(0).to(tl.int64)
    b_count = tl.zeros([WORDS], tl.int32)
    for i in range(0, words, WORDS):
        o_w = i + tl.arange(0, WORDS)
        m_w = o_w < words
        b_bits = tl.load(p_mask + i_o * s_mask + o_w.to(tl.int64) * s_mask_column, mask=m_w, other=0)
        n_bits = tl.minimum(features - o_w * 32, 32)
        b_bits = tl.where(n_bits < 32, b_bits & ((1 << (n_bits & 31)) - 1), b_bits)
        tl.store(p_bitmap + i_o * words + o_w, b_bits, mask=m_w)
        b_count += _count(b_bits)
    tl.store(p_counts + i_o, tl.sum(b_count, 0).to(tl.int64))


@triton.jit
def compress_copy_kernel(
    p_values, p_weight, p_bitmap, p_offsets, s_weight, s_weight_column, words, features, BLOCK: tl.constexpr
):
    """One row of W words: every kept weight to its place."""
    i_o = tl.program_id(0).to(tl.int64)
    b_first = tl.load(p_offsets + i_o)
    for i in range(0, features, BLOCK):
        o_i = i + tl.arange(0, BLOCK)
        m_i = o_i < features
        b_kept = (tl.load(p_bitmap + i_o * words + o_i // 32, mask=m_i, other=0) >> (o_i % 32)) & 1
        b_place = tl.cumsum(b_kept, 0) - b_kept
        m_kept = b_kept != 0
        b_weight = tl.load(p_weight + i_o * s_weight + o_i.to(tl.int64) * s_weight_column, mask=m_kept)
        tl.store(p_values + b_first + b_place, b_weight, mask=m_kept)
        b_first += tl.sum(b_kept, 0)


_COUNT = Config({"WORDS": 128}, num_warps=1)
_COPY = Config({"BLOCK": 1024}, num_warps=4)


def compress_bitmap(mask: torch.Tensor, features: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask without bits beyond `features`, and the offsets of the rows; the host reads nothing."""
    outputs, words = mask.shape
    bitmap = mask.new_empty((outputs, words))
    offsets = mask.new_zeros((outputs + 1,), dtype=torch.int64)
    strides = (mask.stride(0), mask.stride(1))
    launch(compress_count_kernel, (outputs, 1, 1), _COUNT, offsets[1:], bitmap, mask, *strides, words, features)
    return bitmap, offsets.cumsum(0)


def compress_values(weight: torch.Tensor, bitmap: torch.Tensor, offsets: torch.Tensor, values: torch.Tensor) -> None:
    """Copy the kept weights to `values`, which is as long as the last offset says."""
    outputs, features = weight.shape
    strides = (weight.stride(0), weight.stride(1))
    launch(
        compress_copy_kernel,
        (outputs, 1, 1),
        _COPY,
        values,
        weight,
        bitmap,
        offsets,
        *strides,
        bitmap.shape[1],
        features,
    )


def compress(weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch both kernels; shapes and dtypes are those of `personafast.ops.compress`, which has checked them."""
    bitmap, offsets = compress_bitmap(mask, weight.shape[1])
    values = weight.new_empty(int(offsets[-1]))
    compress_values(weight, bitmap, offsets, values)
    return values, bitmap, offsets
