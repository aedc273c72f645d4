"""steer: ablate, clamp, add with the norm kept or replace, by the mode of each row's slot, in place.

Every mode makes of a row h and its direction d the row (keep h + add d) ratio; keep, add and ratio follow from at most
two sums over the row. Ablating and clamping need h.d and d.d, adding with the norm kept |h|^2 and |h + add d|^2,
replacing none, so one pass has the two of any mode and rows of different modes run the same instructions.

A program takes one row, which stays in its registers between the sums and the result: 2 T H elements, the directions
from cache. Rows wider than 20480 go by in tiles, twice, the second time from L1 or L2. A row for which there is nothing
to do is not written. Sums stay within a program and have one order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from personafast._triton.launch import Config, launch
from personafast._triton.rows import in_one_wave, whole_row

ABLATE, CLAMP = tl.constexpr(0), tl.constexpr(1)
NORM_PRESERVING, REPLACE = tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _terms(b_hidden, b_direction, b_given, m_preserve):
    """(h, d, what the two sums of a row are of); b_given is the multiple of d that the parameters give."""
    b_h = b_hidden.to(tl.float32)
    b_d = b_direction.to(tl.float32)
    b_second = tl.where(m_preserve, b_h + b_given * b_d, b_d)
    return b_h, b_d, b_h * tl.where(m_preserve, b_h, b_d), b_second * b_second


@triton.jit
def _plan(b_firsts, b_seconds, b_mode, b_a, b_p0, b_p1):
    """(keep, add, ratio, whether the row changes) from what the sums of a row are of, added up over its warps once."""
    b_first, b_second = tl.split(tl.sum(tl.join(b_firsts, b_seconds), 0))
    m_along = (b_mode == ABLATE) | (b_mode == CLAMP)
    m_preserve = b_mode == NORM_PRESERVING
    b_inverse = tl.rsqrt(b_second)
    b_coordinate = b_first * b_inverse
    b_held = tl.maximum(b_coordinate, b_p0, propagate_nan=tl.PropagateNan.ALL)
    b_held = tl.minimum(b_held, b_p1, propagate_nan=tl.PropagateNan.ALL)
    b_change = tl.where(b_mode == ABLATE, -b_a * b_p0 * b_coordinate, b_a * (b_held - b_coordinate))
    b_add = tl.where(m_along, b_change * b_inverse, b_a * b_p0)
    b_keep = tl.where(b_mode == REPLACE, 1.0 - b_a, 1.0)
    b_ratio = tl.where(m_preserve, tl.sqrt(b_first) * b_inverse, 1.0)
    m_nothing = ((b_keep == 1.0) & (b_add == 0.0)) | ((m_along | m_preserve) & (b_second == 0.0))
    m_known = (b_mode >= ABLATE) & (b_mode <= REPLACE)
    return b_keep, b_add, b_ratio, m_known & (m_nothing == 0)


@triton.jit(do_not_specialize=["n_slots"])
def steer_kernel(
    p_hidden,
    p_directions,
    p_slots,
    p_mode,
    p_params,
    p_scale,
    s_hidden,
    s_directions,
    n_slots,
    H,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
    HELD: tl.constexpr,
    EAGER: tl.constexpr,
):
    """One row t, in TILES tiles of BLOCK columns, which stay in registers if HELD; fp32 until the one rounding."""
    i_t = tl.program_id(0).to(tl.int64)
    o_h = tl.arange(0, BLOCK)
    p_hidden += i_t * s_hidden
    stored = p_hidden.dtype.element_ty
    b_rows = ()
    if EAGER:
        for i in tl.static_range(TILES):
            o_c = i * BLOCK + o_h
            b_rows = b_rows + (tl.load(p_hidden + o_c, mask=o_c < H, other=0.0),)
        # Otherwise the compiler moves these loads behind the wait for the slot.
        tl.debug_barrier()
    b_slot = tl.load(p_slots + i_t).to(tl.int64)
    m_steered = (b_slot >= 0) & (b_slot < n_slots)
    if not EAGER:
        if not m_steered:
            return
    b_a = 1.0
    if p_scale is not None:
        b_a = tl.load(p_scale + i_t)
    b_mode = tl.load(p_mode + b_slot, mask=m_steered, other=-1)
    b_p0 = tl.load(p_params + 2 * b_slot, mask=m_steered, other=0.0)
    b_p1 = tl.load(p_params + 2 * b_slot + 1, mask=m_steered, other=0.0)
    p_directions += b_slot * s_directions
    b_end = tl.where(m_steered, H, 0)
    m_preserve = b_mode == NORM_PRESERVING
    b_firsts = tl.zeros([BLOCK], tl.float32)
    b_seconds = tl.zeros([BLOCK], tl.float32)
    if HELD:
        b_directions, b_hs, b_ds = (), (), ()
        for i in tl.static_range(TILES):
            o_c = i * BLOCK + o_h
            if not EAGER:
                b_rows = b_rows + (tl.load(p_hidden + o_c, mask=o_c < b_end, other=0.0),)
            b_directions = b_directions + (tl.load(p_directions + o_c, mask=o_c < b_end, other=0.0),)
        for i in tl.static_range(TILES):
            b_h, b_d, b_first, b_second = _terms(b_rows[i], b_directions[i], b_a * b_p0, m_preserve)
            b_firsts += b_first
            b_seconds += b_second
            b_hs = b_hs + (b_h,)
            b_ds = b_ds + (b_d,)
        b_keep, b_add, b_ratio, m_changes = _plan(b_firsts, b_seconds, b_mode, b_a, b_p0, b_p1)
        for i in tl.static_range(TILES):
            o_c = i * BLOCK + o_h
            b_h = (b_keep * b_hs[i] + b_add * b_ds[i]) * b_ratio
            tl.store(p_hidden + o_c, b_h.to(stored), mask=o_c < tl.where(m_changes, H, 0))
    else:
        for i in range(TILES):
            o_c = i * BLOCK + o_h
            b_hidden = tl.load(p_hidden + o_c, mask=o_c < b_end, other=0.0)
            b_direction = tl.load(p_directions + o_c, mask=o_c < b_end, other=0.0)
            b_h, b_d, b_first, b_second = _terms(b_hidden, b_direction, b_a * b_p0, m_preserve)
            b_firsts += b_first
            b_seconds += b_second
        b_keep, b_add, b_ratio, m_changes = _plan(b_firsts, b_seconds, b_mode, b_a, b_p0, b_p1)
        if m_changes:
            for i in range(TILES):
                o_c = i * BLOCK + o_h
                b_h = tl.load(p_hidden + o_c, mask=o_c < H, other=0.0).to(tl.float32)
                b_d = tl.load(p_directions + o_c, mask=o_c < H, other=0.0).to(tl.float32)
                b_h = (b_keep * b_h + b_add * b_d) * b_ratio
                tl.store(p_hidden + o_c, b_h.to(stored), mask=o_c < H)


@functools.cache
def steer_config(H: int, eager: bool) -> Config:
    """Block and options for rows of H columns."""
    constants, num_warps = whole_row(H)
    return Config({**constants, "EAGER": eager and constants["HELD"]}, num_warps=num_warps, enable_fp_fusion=True)


def steer_(
    hidden: torch.Tensor,
    directions: torch.Tensor,
    slots: torch.Tensor,
    mode: torch.Tensor,
    params: torch.Tensor,
    scale: torch.Tensor | None,
) -> None:
    """Launch `steer_kernel`; the shapes and dtypes are those of `personafast.ops.steer_`, which has checked them.

    Columns must be adjacent for the wide loads, so other layouts go through a copy.
    """
    T, H = hidden.shape
    target = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    directions = directions if directions.stride(1) == 1 else directions.contiguous()
    launch(
        steer_kernel,
        (T, 1, 1),
        steer_config(H, in_one_wave(hidden, T, whole_row(H)[1])),
        target,
        directions,
        slots.contiguous(),
        mode.contiguous(),
        params.contiguous(),
        None if scale is None else scale.contiguous(),
        target.stride(0),
        directions.stride(0),
        directions.shape[0],
        H,
    )
    if target is not hidden:
        hidden.copy_(target)
