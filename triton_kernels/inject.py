"""inject: hidden[t] += scale[t] * bank[slots[t]], in place, rows of slot -1 untouched.

A program takes one row and one block of columns, 32 bytes of it a thread, reads its slot and leaves if there is
nothing to add: 2 T H elements of traffic, since the bank comes from cache, and one more row for every distinct slot.

The slot says where the bank is read, so two waits are in sequence. Where all programs run at once, as in decoding,
hidden is asked for before the slot has come: a row of slot -1 is then read for nothing, which is little where the
launch is what it costs. Where there are several waves, the others' loads fill the wait, and such a row is not read.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from personafast._triton.launch import Config, cdiv, launch, next_power_of_2
from personafast._triton.rows import in_one_wave


@triton.jit(do_not_specialize=["n_bank"])
def inject_kernel(
    p_hidden,
    p_bank,
    p_slots,
    p_scale,
    s_hidden,
    s_bank,
    n_bank,
    H,
    BLOCK: tl.constexpr,
    EAGER: tl.constexpr,
):
    """One row t by one block of BLOCK columns; sums in fp32, rounded once to the dtype of hidden."""
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p_row = p_hidden + i_t * s_hidden + o_h
    if EAGER:
        b_hidden = tl.load(p_row, mask=o_h < H, other=0.0)
        # Otherwise the compiler moves this load behind the wait for the slot.
        tl.debug_barrier()
    b_slot = tl.load(p_slots + i_t).to(tl.int64)
    m_steered = (b_slot >= 0) & (b_slot < n_bank)
    if not EAGER:
        if not m_steered:
            return
    m_h = o_h < tl.where(m_steered, H, 0)
    if not EAGER:
        b_hidden = tl.load(p_row, mask=m_h, other=0.0)
    b_added = tl.load(p_bank + b_slot * s_bank + o_h, mask=m_h, other=0.0).to(tl.float32)
    if p_scale is not None:
        b_added = b_added * tl.load(p_scale + i_t)
    tl.store(p_row, (b_hidden.to(tl.float32) + b_added).to(p_hidden.dtype.element_ty), mask=m_h)


@functools.cache
def inject_config(H: int, itemsize: int, eager: bool) -> Config:
    """Block and options for rows of H columns: of 2, 4 and 8 KiB, the block that leaves the fewest threads idle.

    Product and sum stay apart, so that the bits are those of the reference.
    """
    sizes = [(8192 >> halved) // itemsize for halved in range(3)]
    block = min(sizes, key=lambda size: cdiv(H, size) * size)
    if H <= sizes[-1]:
        block = max(128, next_power_of_2(H))
    constants = {"BLOCK": block, "EAGER": eager}
    return Config(constants, num_warps=max(1, block * itemsize // 1024), enable_fp_fusion=False)


def inject_(hidden: torch.Tensor, bank: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Launch `inject_kernel`; the shapes and dtypes are those of `personafast.ops.inject_`, which has checked them.

    Columns must be adjacent for the wide loads, so other layouts go through a copy.
    """
    T, H = hidden.shape
    target = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    source = bank if bank.stride(1) == 1 else bank.contiguous()
    config = inject_config(H, hidden.element_size(), True)
    blocks = -(-H // config.constants["BLOCK"])
    if not in_one_wave(hidden, T * blocks, config.options["num_warps"]):
        config = inject_config(H, hidden.element_size(), False)
    launch(
        inject_kernel,
        (T, blocks, 1),
        config,
        target,
        source,
        slots.contiguous(),
        None if scale is None else scale.contiguous(),
        target.stride(0),
        source.stride(0),
        bank.shape[0],
        H,
    )
    if target is not hidden:
        hidden.copy_(target)
