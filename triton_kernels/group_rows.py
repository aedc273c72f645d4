"""group_rows: the rows of a batch in the order of their slots, and where the rows of each slot begin.

One program a slot reads all slots twice: it counts those before its own, then writes its rows one after the other. No
program waits for another, nothing is read back to the host, and the order is that of a stable sort.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from personafast._triton.launch import Config, launch


@triton.jit
def _group(p_slots, o_t, T, count):
    """Groups of the rows `o_t`: slots outside [0, count) are group `count`, rows beyond T group count + 1."""
    b_slot = tl.load(p_slots + o_t, mask=o_t < T, other=0)
    b_group = tl.where((b_slot >= 0) & (b_slot < count), b_slot, count)
    return tl.where(o_t < T, b_group, count + 1)


@triton.jit(do_not_specialize=["T", "count"])
def group_rows_kernel(p_slots, p_order, p_offsets, T, count, BLOCK: tl.constexpr):
    """The rows of group i_g, in blocks of BLOCK rows; the last group, of all other slots, also writes the end."""
    i_g = tl.program_id(0)
    o_b = tl.arange(0, BLOCK)
    b_before = tl.zeros([BLOCK], tl.int32)
    for i_b in range(0, T, BLOCK):
        b_before += (_group(p_slots, i_b + o_b, T, count) < i_g).to(tl.int32)
    b_next = tl.sum(b_before, 0)
    tl.store(p_offsets + i_g, b_next)
    for i_b in range(0, T, BLOCK):
        m_mine = _group(p_slots, i_b + o_b, T, count) == i_g
        b_rank = tl.cumsum(m_mine.to(tl.int32), 0)
        tl.store(p_order + b_next + b_rank - 1, i_b + o_b, mask=m_mine)
        b_next += tl.sum(m_mine.to(tl.int32), 0)
    if i_g == count:
        tl.store(p_offsets + i_g + 1, T)


@functools.cache
def group_rows_config(block: int) -> Config:
    """Four rows a thread."""
    return Config({"BLOCK": block}, num_warps=block // 128)


def group_rows(slots: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort the rows of a batch by slot, on the device.

    Args:
        slots: int32 [T].
        count: number of slots; a row of any slot outside [0, count) is in a group of its own, the last.

    Returns:
        (order int32 [T], offsets int32 [count + 2]): the rows of group g are order[offsets[g] : offsets[g + 1]], from
        the first row of the batch to the last.
    """
    T = slots.shape[0]
    order = torch.empty_like(slots, memory_format=torch.contiguous_format)
    offsets = slots.new_empty(count + 2)
    config = group_rows_config(512 if T <= 512 else 1024)
    launch(group_rows_kernel, (count + 1, 1, 1), config, slots.contiguous(), order, offsets, T, count)
    return order, offsets
