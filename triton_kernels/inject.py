"""inject: hidden[t] += scale[t] * bank[slots[t]], in place, rows of slot -1 untouched.

A program takes one row and one block of columns, reads its slot and leaves if there is nothing to add: 2 T H elements
of traffic, and at decode sizes a single wave whose cost is its launch.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from personafast._triton.launch import Config, launch


@triton.jit
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
):
    """One row t by one block of BLOCK columns; sums in fp32, rounded once to the dtype of hidden."""
    i_t = tl.program_id(0).to(tl.int64)
    i_h = tl.program_id(1).to(tl.int64)
    b_slot = tl.load(p_slots + i_t).to(tl.int64)
    if (b_slot >= 0) & (b_slot < n_bank):
        o_h = i_h * BLOCK + tl.arange(0, BLOCK)
        m_h = o_h < H
        p_row = p_hidden + i_t * s_hidden + o_h
        b_added = tl.load(p_bank + b_slot * s_bank + o_h, mask=m_h, other=0.0).to(tl.float32)
        if p_scale is not None:
            b_added = b_added * tl.load(p_scale + i_t)
        b_hidden = tl.load(p_row, mask=m_h, other=0.0).to(tl.float32)
        tl.store(p_row, (b_hidden + b_added).to(p_hidden.dtype.element_ty), mask=m_h)


@functools.cache
def inject_config(H: int) -> Config:
    """Block and options for rows of H columns: 8 elements a thread (16 bytes of bf16), at most 1024 columns a program.

    Product and sum stay apart, so that the bits are those of the reference.
    """
    block = min(1024, max(128, triton.next_power_of_2(H)))
    return Config({"BLOCK": block}, num_warps=max(1, block // 256), enable_fp_fusion=False)


def inject_(hidden: torch.Tensor, bank: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Launch `inject_kernel`; the shapes and dtypes are those of `personafast.ops.inject_`, which has checked them.

    Columns must be adjacent for the wide loads, so other layouts go through a copy.
    """
    T, H = hidden.shape
    target = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    source = bank if bank.stride(1) == 1 else bank.contiguous()
    config = inject_config(H)
    launch(
        inject_kernel,
        (T, triton.cdiv(H, config.constants["BLOCK"]), 1),
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
