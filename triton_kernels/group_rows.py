"""group_rows: rows of a batch in the order of their slots, as a counting sort on the device that nobody waits for.

Two launches. The first counts, for each block of rows, how many rows every slot has in it; the second adds these counts
up to where the rows of its own block begin, and writes them there. Rows of one slot keep their order. The table of
counts is [blocks, slots + 1] int32, a small part of what the rows themselves are.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from personafast._triton.launch import Config, launch


@triton.jit
def _groups_of_block(p_slots, o_t, T, count):
    """The group of each row: its slot, or `count` for a slot that does not exist; count + 1 beyond the rows."""
    b_slot = tl.load(p_slots + o_t, mask=o_t < T, other=0)
    b_group = tl.where((b_slot >= 0) & (b_slot < count), b_slot, count)
    return tl.where(o_t < T, b_group, count + 1)


@triton.jit(do_not_specialize=["T", "count"])
def group_count_kernel(
    p_slots,
    p_counts,
    T,
    count,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Rows of each group in one block of BLOCK rows."""
    i_block = tl.program_id(0)
    b_group = _groups_of_block(p_slots, i_block * BLOCK + tl.arange(0, BLOCK), T, count)
    for i_g in range(0, count + 1, GROUPS):
        o_g = i_g + tl.arange(0, GROUPS)
        b_count = tl.sum((b_group[:, None] == o_g[None, :]).to(tl.int32), axis=0)
        tl.store(p_counts + i_block.to(tl.int64) * (count + 1) + o_g, b_count, mask=o_g <= count)


@triton.jit(do_not_specialize=["T", "count", "blocks"])
def group_place_kernel(
    p_slots,
    p_counts,
    p_order,
    p_offsets,
    T,
    count,
    blocks,
    BLOCK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """A row's place: the rows of earlier groups, those of its group in earlier blocks, and those before it here."""
    i_block = tl.program_id(0)
    o_row = i_block * BLOCK + tl.arange(0, BLOCK)
    b_group = _groups_of_block(p_slots, o_row, T, count)
    b_place = tl.zeros([BLOCK], dtype=tl.int32)
    for i_other in range(0, BLOCK, GROUPS):
        o_other = i_block * BLOCK + i_other + tl.arange(0, GROUPS)
        b_other = _groups_of_block(p_slots, o_other, T, count)
        m_before = (b_other[None, :] == b_group[:, None]) & (o_other[None, :] < o_row[:, None])
        b_place += tl.sum(m_before.to(tl.int32), axis=1)
    carried = 0
    for i_g in range(0, count + 1, GROUPS):
        o_g = i_g + tl.arange(0, GROUPS)
        b_all = tl.zeros([GROUPS], dtype=tl.int32)
        b_earlier = tl.zeros([GROUPS], dtype=tl.int32)
        for i_b in range(0, blocks, GROUPS):
            o_b = i_b + tl.arange(0, GROUPS)
            m_count = (o_b < blocks)[:, None] & (o_g <= count)[None, :]
            p_count = p_counts + o_b[:, None].to(tl.int64) * (count + 1) + o_g[None, :]
            b_count = tl.load(p_count, mask=m_count, other=0)
            b_all += tl.sum(b_count, axis=0)
            b_earlier += tl.sum(tl.where((o_b < i_block)[:, None], b_count, 0), axis=0)
        b_end = carried + tl.cumsum(b_all, axis=0)
        if i_block == 0:
            tl.store(p_offsets + 1 + o_g, b_end, mask=o_g <= count)
        b_start = b_end - b_all + b_earlier
        b_place += tl.sum(tl.where(b_group[:, None] == o_g[None, :], b_start[None, :], 0), axis=1)
        carried += tl.sum(b_all, axis=0)
    if i_block == 0:
        tl.store(p_offsets, 0)
    tl.store(p_order + b_place, o_row, mask=o_row < T)


@functools.cache
def group_rows_config() -> Config:
    """Blocks of 256 rows, whose order within a group is found by comparing each with each; 32 groups at a time."""
    return Config({"BLOCK": 256, "GROUPS": 32}, num_warps=4, num_stages=1)


def group_rows(slots: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sort rows by slot.

    Args:
        slots: int32 [T].
        count: slots there are; a row with any other belongs to a last group of its own.

    Returns:
        order, int32 [T]: the rows, by group and within a group by number. offsets, int32 [count + 2]: group g is
        order[offsets[g] : offsets[g + 1]], and group `count` that of the rows without one of the slots.
    """
    T = slots.shape[0]
    config = group_rows_config()
    blocks = triton.cdiv(T, config.constants["BLOCK"])
    slots = slots.contiguous()
    order = torch.empty(T, dtype=torch.int32, device=slots.device)
    offsets = torch.empty(count + 2, dtype=torch.int32, device=slots.device)
    counts = torch.empty(blocks, count + 1, dtype=torch.int32, device=slots.device)
    launch(group_count_kernel, (blocks, 1, 1), config, slots, counts, T, count)
    launch(group_place_kernel, (blocks, 1, 1), config, slots, counts, order, offsets, T, count, blocks)
    return order, offsets
