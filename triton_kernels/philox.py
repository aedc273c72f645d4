"""Philox4x32-10: the numbers of `personafast.ops.philox`, bit for bit, inside a kernel and as a kernel of their own.

`uniform` costs ten rounds of integer arithmetic for two numbers and touches no memory, so a kernel draws what it needs
where it needs it. The rounds are Triton's own; what is ours is the counter and how 53 bits are made of two words.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from personafast._triton.launch import Config, cdiv, launch, next_power_of_2


@triton.jit
def uniform(b_seed, b_position, stream, o_number):
    """Numbers `o_number` of a row's stream, float64 in (0, 1): odd multiples of 2**-53, of the shape of `o_number`.

    The seed is the key; the counter is (position low, position high, stream, block), and a block gives two numbers.
    """
    b_low = b_position.to(tl.uint32) + (o_number * 0).to(tl.uint32)
    b_high = (b_position >> 32).to(tl.uint32) + (o_number * 0).to(tl.uint32)
    b_stream = (o_number * 0 + stream).to(tl.uint32)
    b_0, b_1, b_2, b_3 = tl.philox(b_seed, b_low, b_high, b_stream, (o_number // 2).to(tl.uint32))
    m_odd = o_number % 2 == 1
    b_upper = (tl.where(m_odd, b_2, b_0) >> 6).to(tl.int64)
    b_lower = (tl.where(m_odd, b_3, b_1) >> 6).to(tl.int64)
    return (((b_upper << 26) | b_lower) * 2 + 1).to(tl.float64) * 1.1102230246251565e-16


@triton.jit(do_not_specialize=["B", "n", "stream"])
def philox_uniform_kernel(p_out, p_seeds, p_positions, stream, B, n, BLOCK: tl.constexpr):
    """BLOCK numbers of the rows' n each, rows one after the other."""
    o_out = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_out = o_out < n.to(tl.int64) * B
    i_row = o_out // n
    b_seed = tl.load(p_seeds + i_row, mask=m_out, other=0)
    b_position = tl.load(p_positions + i_row, mask=m_out, other=0)
    tl.store(p_out + o_out, uniform(b_seed, b_position, stream, (o_out - i_row * n).to(tl.int32)), mask=m_out)


@functools.cache
def philox_uniform_config(numbers: int) -> Config:
    """One number a thread, and few threads where few numbers are drawn; `numbers` is rounded up to a power of two."""
    block = min(128, max(32, numbers))
    return Config({"BLOCK": block}, num_warps=block // 32)


def philox_uniform(seeds: torch.Tensor, positions: torch.Tensor, stream: int, n: int = 1) -> torch.Tensor:
    """Launch `philox_uniform_kernel`; arguments as `personafast.ops.philox.uniform`, which has checked them."""
    B = seeds.shape[0]
    out = torch.empty((B, n), dtype=torch.float64, device=seeds.device)
    config = philox_uniform_config(next_power_of_2(max(1, min(128, B * n))))
    grid = (cdiv(B * n, config.constants["BLOCK"]), 1, 1)
    launch(philox_uniform_kernel, grid, config, out, seeds.contiguous(), positions.contiguous(), stream, B, n)
    return out
