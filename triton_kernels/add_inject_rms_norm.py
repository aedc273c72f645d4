"""add_inject_rms_norm: residual add, injection and RMSNorm of the sum, each row read once and written twice.

residual_out[t] = (update[t] + residual[t]) + scale[t] * bank[slots[t]]
normed[t] = residual_out[t] / sqrt(mean(residual_out[t]^2) + eps) * weight

A program takes one row. What it has read stays in its registers until the root is known, so that 4 T H elements move,
where the three steps apart move 7; bank and weight come from cache. Rows wider than 20480 go by in tiles, and the
second pass reads back the residual_out that the first has written, from L1 or L2. A row's squares are added up within
its program, in one order: the result depends on no other row.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from personafast._triton.launch import Config, launch
from personafast._triton.rows import whole_row


@triton.jit
def _sum(b_update, b_residual, b_added, b_scale, m_steered):
    """(update + residual) + scale * bank in fp32."""
    b_total = b_update.to(tl.float32) + b_residual.to(tl.float32)
    return tl.where(m_steered, b_total + b_added.to(tl.float32) * b_scale, b_total)


@triton.jit(do_not_specialize=["n_bank"])
def add_inject_rms_norm_kernel(
    p_normed,
    p_residual_out,
    p_update,
    p_residual,
    p_bank,
    p_slots,
    p_scale,
    p_weight,
    s_update,
    s_residual,
    s_bank,
    n_bank,
    H,
    eps,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    HELD: tl.constexpr,
):
    """One row t, in TILES tiles of BLOCK columns, which stay in registers if HELD."""
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK)
    p_update += i_t * s_update
    p_residual += i_t * s_residual
    p_normed += i_t * H
    p_residual_out += i_t * H
    stored = p_residual_out.dtype.element_ty
    b_updates, b_residuals = (), ()
    if HELD:
        for i in tl.static_range(TILES):
            o_c = i * BLOCK + o_h
            b_updates = b_updates + (tl.load(p_update + o_c, mask=o_c < H, other=0.0),)
            b_residuals = b_residuals + (tl.load(p_residual + o_c, mask=o_c < H, other=0.0),)
        # Otherwise the compiler moves these loads behind the wait for the slot.
        tl.debug_barrier()
    b_slot = tl.load(p_slots + i_t).to(tl.int64)
    b_scale = 1.0
    if p_scale is not None:
        b_scale = tl.load(p_scale + i_t)
    m_steered = (b_slot >= 0) & (b_slot < n_bank)
    p_bank += b_slot * s_bank
    b_end = tl.where(m_steered, H, 0)  # nothing of the bank is read where nothing is injected
    b_squares = tl.zeros([BLOCK], tl.float32)
    if HELD:
        b_added, b_sums, b_weights = (), (), ()
        for i in tl.static_range(TILES):
            o_c = i * BLOCK + o_h
            b_added = b_added + (tl.load(p_bank + o_c, mask=o_c < b_end, other=0.0),)
        for i in tl.static_range(TILES):
            b_sum = _sum(b_updates[i], b_residuals[i], b_added[i], b_scale, m_steered).to(stored)
            b_squares += b_sum.to(tl.float32) * b_sum.to(tl.float32)
            b_sums = b_sums + (b_sum,)
        for i in tl.static_range(TILES):
            o_c = i * BLOCK + o_h
            b_weights = b_weights + (tl.load(p_weight + o_c, mask=o_c < H, other=0.0),)
        for i in tl.static_range(TILES):
            o_c = i * BLOCK + o_h
            tl.store(p_residual_out + o_c, b_sums[i], mask=o_c < H)
        b_inverse = tl.rsqrt(tl.sum(b_squares, 0) / H + eps)
        for i in tl.static_range(TILES):
            o_c = i * BLOCK + o_h
            b_normed = b_sums[i].to(tl.float32) * b_inverse * b_weights[i].to(tl.float32)
            tl.store(p_normed + o_c, b_normed.to(stored), mask=o_c < H)
    else:
        for i in range(TILES):
            o_c = i * BLOCK + o_h
            b_update = tl.load(p_update + o_c, mask=o_c < H, other=0.0)
            b_residual = tl.load(p_residual + o_c, mask=o_c < H, other=0.0)
            b_add = tl.load(p_bank + o_c, mask=o_c < b_end, other=0.0)
            b_sum = _sum(b_update, b_residual, b_add, b_scale, m_steered).to(stored)
            tl.store(p_residual_out + o_c, b_sum, mask=o_c < H)
            b_squares += b_sum.to(tl.float32) * b_sum.to(tl.float32)
        b_inverse = tl.rsqrt(tl.sum(b_squares, 0) / H + eps)
        for i in range(TILES):
            o_c = i * BLOCK + o_h
            b_weight = tl.load(p_weight + o_c, mask=o_c < H, other=0.0).to(tl.float32)
            b_sum = tl.load(p_residual_out + o_c, mask=o_c < H, other=0.0).to(tl.float32)
            tl.store(p_normed + o_c, (b_sum * b_inverse * b_weight).to(stored), mask=o_c < H)


@functools.cache
def add_inject_rms_norm_config(H: int) -> Config:
    """Block and options for rows of H columns. Products and sums stay apart: residual_out has the reference's bits."""
    constants, num_warps = whole_row(H)
    return Config(constants, num_warps=num_warps, enable_fp_fusion=False)


def add_inject_rms_norm(
    update: torch.Tensor,
    residual: torch.Tensor,
    bank: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `add_inject_rms_norm_kernel`; `personafast.ops.add_inject_rms_norm` has checked shapes and dtypes.

    Columns must be adjacent for the wide loads, so other layouts go through a copy.
    """
    T, H = update.shape
    update, residual, bank = (x if x.stride(1) == 1 else x.contiguous() for x in (update, residual, bank))
    normed = torch.empty((T, H), dtype=update.dtype, device=update.device)
    residual_out = torch.empty_like(normed)
    launch(
        add_inject_rms_norm_kernel,
        (T, 1, 1),
        add_inject_rms_norm_config(H),
        normed,
        residual_out,
        update,
        residual,
        bank,
        slots.contiguous(),
        None if scale is None else scale.contiguous(),
        weight.contiguous(),
        update.stride(0),
        residual.stride(0),
        bank.stride(0),
        bank.shape[0],
        H,
        float(eps),
    )
    return normed, residual_out
