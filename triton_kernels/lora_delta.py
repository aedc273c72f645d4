"""lora_delta_: out[t] += scale[m] B[m, :, :r] A[m, :r] x[t] with m = slots[t], r = ranks[m].

Two launches. Shrink computes A x of every row, in pieces of the features so that few adapters still fill the machine,
and writes the pieces' sums in fp32, [pieces, T, R]; expand adds the pieces up in their order, multiplies by B and adds
the result to `out`, rounded once. The factors of the adapters in use are read once, 2 R (I + O) bytes each at 16 bit;
beside that it is x, and `out` in and out. (A bank of few bytes of A is read whole, see EAGER_BYTES.)

Up to MOST_ROWS rows nothing is sorted: a program belongs to an adapter (or, in a bank of more adapters than rows, to
the first row that has it), reads the slots of all rows, and takes the rows that match, 16 at a time. Beyond, the rows
are grouped first (`group_rows`), and a program takes up to 64 rows of one group.

Expand is a programmatic dependent launch from compute capability 9.0 on: it starts while shrink still runs, finds its
rows, fetches B and `out`, and then waits. What it reads before it waits was complete before shrink began, because
shrink itself is an ordinary launch, which waits for all work before it; and shrink writes nothing but the sums. Every
program of expand waits, also one without rows: so expand never ends before shrink, and what comes after it in the
stream, a next call that gets the same memory for its sums too, finds both complete.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from personafast._triton.group_rows import group_rows
from personafast._triton.launch import Config, Device, cdiv, device_of, launch, next_power_of_2

# Rows up to which every program looks through all slots itself.
MOST_ROWS = 256

# Bytes of all A up to which they are fetched before it is known which adapters have rows: a microsecond of memory at
# worst, where waiting for the slots takes half of one.
EAGER_BYTES = 4 << 20


@triton.jit
def _rows_of_program(p_slots, i_group, T, M, WIDTH: tl.constexpr, BY_ROW: tl.constexpr):
    """(adapter, how many of the WIDTH rows have it, for each whether it does).

    BY_ROW: the adapter is that of row i_group, and the rows are none if an earlier row has the same.
    """
    o_t = tl.arange(0, WIDTH)
    b_slots = tl.load(p_slots + o_t, mask=o_t < T, other=-1)
    b_slots = tl.where((b_slots >= 0) & (b_slots < M), b_slots, -1)
    i_m = i_group
    if BY_ROW:
        i_m = tl.load(p_slots + i_group)
        first = tl.min(tl.where(b_slots == i_m, o_t, WIDTH), axis=0)
        i_m = tl.where((first == i_group) & (i_m >= 0), i_m, -2)  # no row has the adapter -2
    m_match = b_slots == i_m
    count = tl.sum(m_match.to(tl.int32), axis=0)
    return i_m.to(tl.int64), count, m_match


@triton.jit
def _row_tile(m_match, count, i_tile, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """(rows i_tile * ROWS, ... of those that match, which of them there are)."""
    o_t = tl.arange(0, WIDTH)
    if WIDTH == ROWS:
        return o_t.to(tl.int64), m_match
    b_place = tl.cumsum(m_match.to(tl.int32), axis=0) - 1
    o_place = i_tile * ROWS + tl.arange(0, ROWS)
    m_here = m_match[None, :] & (b_place[None, :] == o_place[:, None])
    b_rows = tl.sum(tl.where(m_here, o_t[None, :], 0), axis=1)
    return b_rows.to(tl.int64), o_place < count


@triton.jit
def _group_tile(p_order, p_offsets, i_tile, M, ROWS: tl.constexpr):
    """(adapter, rows, which of them there are, whether there is one) of one tile of rows that `group_rows` sorted.

    Group g may have the tiles from offsets[g] // ROWS + g on: those of all groups are apart, whatever their sizes.
    """
    count = 0
    for i_g in range(0, M, 128):
        o_g = i_g + tl.arange(0, 128)
        b_offset = tl.load(p_offsets + o_g, mask=o_g < M, other=0)
        count += tl.sum(((b_offset // ROWS + o_g <= i_tile) & (o_g < M)).to(tl.int32), axis=0)
    i_m = count - 1
    start = tl.load(p_offsets + i_m)
    end = tl.load(p_offsets + i_m + 1)
    o_place = start + (i_tile - start // ROWS - i_m) * ROWS + tl.arange(0, ROWS)
    m_rows = o_place < end
    b_rows = tl.load(p_order + o_place, mask=m_rows, other=0)
    return tl.cast(i_m, tl.int64), b_rows.to(tl.int64), m_rows, tl.max(m_rows.to(tl.int32), axis=0) > 0


@triton.jit
def _rank(p_ranks, i_m, used, R):
    """The adapter's rank, at most R; 0 if it has no rows."""
    return tl.minimum(tl.load(p_ranks + i_m, mask=used, other=0), R)


@triton.jit
def _project(
    p_x,
    p_a,
    b_kept,
    b_rows,
    m_rows,
    o_r,
    m_r,
    i_first,
    s_x_t,
    s_x_i,
    s_a_r,
    s_a_i,
    n_in,
    STEPS: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """A x of a tile of rows [ROWS, BLOCK_R], over STEPS blocks of features; b_kept is A's block, or None."""
    b_inner = tl.zeros([b_rows.shape[0], o_r.shape[0]], dtype=tl.float32)
    for i_step in range(STEPS):
        o_i = i_first + i_step * BLOCK_I + tl.arange(0, BLOCK_I).to(tl.int64)
        m_i = o_i < n_in
        p_row = p_x + b_rows[:, None] * s_x_t + o_i[None, :] * s_x_i
        b_x = tl.load(p_row, mask=m_rows[:, None] & m_i[None, :], other=0.0)
        if b_kept is not None:
            b_a = b_kept
        else:
            p_rank = p_a + o_r[:, None] * s_a_r + o_i[None, :] * s_a_i
            b_a = tl.load(p_rank, mask=m_r[:, None] & m_i[None, :], other=0.0)
        b_inner = tl.dot(b_x, tl.trans(b_a), b_inner, input_precision="ieee")
    return b_inner


@triton.jit
def _inner(p_inner, b_rows, m_rows, o_r, T, SPLITS: tl.constexpr, RANK: tl.constexpr):
    """A x of a tile of rows [ROWS, BLOCK_R]: the pieces that shrink left, added up in an order that is compiled in.

    Loaded as a matrix of SPLITS * ROWS rows, so that the pieces of a number are in one thread for the most part.
    """
    PIECES: tl.constexpr = triton.next_power_of_2(SPLITS)
    ROWS: tl.constexpr = b_rows.shape[0]
    o_split = tl.arange(0, PIECES)[:, None]
    b_line = tl.reshape(o_split.to(tl.int64) * T + b_rows[None, :], [PIECES * ROWS])
    m_line = tl.reshape((o_split < SPLITS) & m_rows[None, :], [PIECES * ROWS])
    b_piece = tl.load(p_inner + b_line[:, None] * RANK + o_r[None, :], mask=m_line[:, None], other=0.0)
    return tl.sum(tl.reshape(b_piece, [PIECES, ROWS, o_r.shape[0]]), axis=0)


@triton.jit
def _factors(p_b, o_r, m_r, o_o, m_o, s_b_o, s_b_r):
    """A block of B, [BLOCK_R, BLOCK_O]."""
    return tl.load(p_b + o_r[:, None] * s_b_r + o_o[None, :] * s_b_o, mask=m_r[:, None] & m_o[None, :], other=0.0)


@triton.jit
def _product(b_inner, b_b):
    """b_inner @ b_b of an fp32 b_inner that is not rounded to 16 bit: tensor cores multiply it in two parts.

    For fp16 a power of two first brings the largest number of a row to some 2 ** 14, so that neither part overflows.
    """
    if b_b.dtype == tl.float32:
        return tl.dot(b_inner, b_b, input_precision="ieee")
    b_power = tl.full([b_inner.shape[0]], 1.0, dtype=tl.float32)
    if b_b.dtype == tl.float16:
        b_bits = tl.max(tl.abs(b_inner), axis=1).to(tl.int32, bitcast=True) & 0x7F800000
        b_bits = tl.minimum(tl.maximum(b_bits, 0x0D800000), 0x71800000)  # 2 ** -100 to 2 ** 100
        b_power = (b_bits - (14 << 23)).to(tl.float32, bitcast=True)
        b_inner = b_inner * (0x7F000000 - b_bits + (14 << 23)).to(tl.float32, bitcast=True)[:, None]
    b_high = b_inner.to(b_b.dtype)
    b_low = b_inner - b_high.to(tl.float32)
    b_low = tl.where(b_low == b_low, b_low, 0.0)  # of an infinity nothing is left
    b_sum = tl.dot(b_low.to(b_b.dtype), b_b)
    b_sum = tl.dot(b_high, b_b, b_sum)
    return b_sum * b_power[:, None]


@triton.jit(do_not_specialize=["T", "M"])
def lora_shrink_kernel(
    p_x,
    p_a,
    p_inner,
    p_slots,
    p_ranks,
    s_x_t,
    s_x_i,
    s_a_m,
    s_a_r,
    s_a_i,
    T,
    M,
    R,
    n_in,
    WIDTH: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STEPS: tl.constexpr,
    EAGER: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One adapter's rows by STEPS * BLOCK_I features by BLOCK_R ranks."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    i_split = tl.program_id(1).to(tl.int64)
    i_first = i_split * STEPS * BLOCK_I
    o_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_i = i_first + tl.arange(0, BLOCK_I)
    b_a = None
    if EAGER:
        p_block = p_a + tl.program_id(0).to(tl.int64) * s_a_m + o_r[:, None].to(tl.int64) * s_a_r + o_i[None, :] * s_a_i
        b_a = tl.load(p_block, mask=(o_r < R)[:, None] & (o_i < n_in)[None, :], other=0.0)
    i_m, count, m_match = _rows_of_program(p_slots, tl.program_id(0), T, M, WIDTH, BY_ROW)
    m_r = o_r < _rank(p_ranks, i_m, count > 0, R)
    p_a += i_m * s_a_m
    if EAGER:
        b_a = tl.where(m_r[:, None], b_a, 0.0)
    elif STEPS == 1:
        p_block = p_a + o_r[:, None].to(tl.int64) * s_a_r + o_i[None, :] * s_a_i
        b_a = tl.load(p_block, mask=m_r[:, None] & (o_i < n_in)[None, :], other=0.0)
    if tl.max(m_r.to(tl.int32), axis=0) > 0:
        for i_tile in range(tl.cdiv(count, ROWS)):
            b_rows, m_rows = _row_tile(m_match, count, i_tile, WIDTH, ROWS)
            b_inner = _project(
                p_x,
                p_a,
                b_a,
                b_rows,
                m_rows,
                o_r.to(tl.int64),
                m_r,
                i_first,
                s_x_t,
                s_x_i,
                s_a_r,
                s_a_i,
                n_in,
                STEPS,
                BLOCK_I,
            )
            p_row = p_inner + (i_split * T + b_rows[:, None]) * RANK + o_r[None, :]
            tl.store(p_row, b_inner, mask=m_rows[:, None])


@triton.jit(do_not_specialize=["T", "M"])
def lora_expand_kernel(
    p_out,
    p_inner,
    p_b,
    p_slots,
    p_scale,
    p_ranks,
    s_out_t,
    s_out_o,
    s_b_m,
    s_b_o,
    s_b_r,
    T,
    M,
    R,
    n_out,
    WIDTH: tl.constexpr,
    BY_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One adapter's rows by BLOCK_O outputs."""
    o_o = tl.program_id(1).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < n_out
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)
    i_m, count, m_match = _rows_of_program(p_slots, tl.program_id(0), T, M, WIDTH, BY_ROW)
    rank = _rank(p_ranks, i_m, count > 0, R)
    scale = tl.load(p_scale + i_m, mask=count > 0, other=0.0)
    p_b += i_m * s_b_m
    b_b = _factors(p_b, o_r, o_r < rank, o_o, m_o, s_b_o, s_b_r)
    if rank > 0:
        for i_tile in range(tl.cdiv(count, ROWS)):
            b_rows, m_rows = _row_tile(m_match, count, i_tile, WIDTH, ROWS)
            p_row = p_out + b_rows[:, None] * s_out_t + o_o[None, :] * s_out_o
            m_out = m_rows[:, None] & m_o[None, :]
            b_out = tl.load(p_row, mask=m_out, other=0.0)
            if DEPENDENT:
                tl.extra.cuda.gdc_wait()
            b_delta = _product(_inner(p_inner, b_rows, m_rows, o_r, T, SPLITS, RANK), b_b)
            if RANK > BLOCK_R:
                for i_r in range(BLOCK_R, rank, BLOCK_R):
                    b_next = _factors(p_b, i_r + o_r, i_r + o_r < rank, o_o, m_o, s_b_o, s_b_r)
                    b_inner = _inner(p_inner, b_rows, m_rows, i_r + o_r, T, SPLITS, RANK)
                    b_delta += _product(b_inner, b_next)
            tl.store(p_row, (b_out.to(tl.float32) + b_delta * scale).to(b_out.dtype), mask=m_out)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()


@triton.jit(do_not_specialize=["T", "M"])
def lora_shrink_grouped_kernel(
    p_x,
    p_a,
    p_inner,
    p_order,
    p_offsets,
    p_ranks,
    s_x_t,
    s_x_i,
    s_a_m,
    s_a_r,
    s_a_i,
    T,
    M,
    R,
    n_in,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STEPS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """ROWS rows of one adapter by STEPS * BLOCK_I features by BLOCK_R ranks."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    i_split = tl.program_id(1).to(tl.int64)
    o_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    i_m, b_rows, m_rows, used = _group_tile(p_order, p_offsets, tl.program_id(0), M, ROWS)
    m_r = o_r < _rank(p_ranks, i_m, used, R)
    if tl.max(m_r.to(tl.int32), axis=0) > 0:
        b_inner = _project(
            p_x,
            p_a + i_m * s_a_m,
            None,
            b_rows,
            m_rows,
            o_r,
            m_r,
            i_split * STEPS * BLOCK_I,
            s_x_t,
            s_x_i,
            s_a_r,
            s_a_i,
            n_in,
            STEPS,
            BLOCK_I,
        )
        p_row = p_inner + (i_split * T + b_rows[:, None]) * RANK + o_r[None, :]
        tl.store(p_row, b_inner, mask=m_rows[:, None])


@triton.jit(do_not_specialize=["T", "M"])
def lora_expand_grouped_kernel(
    p_out,
    p_inner,
    p_b,
    p_order,
    p_offsets,
    p_scale,
    p_ranks,
    s_out_t,
    s_out_o,
    s_b_m,
    s_b_o,
    s_b_r,
    T,
    M,
    R,
    n_out,
    ROWS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_O: tl.constexpr,
    SPLITS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """ROWS rows of one adapter by BLOCK_O outputs."""
    blocks_o = tl.cdiv(n_out, BLOCK_O)
    o_o = (tl.program_id(0) % blocks_o).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    m_o = o_o < n_out
    o_r = tl.arange(0, BLOCK_R).to(tl.int64)
    i_m, b_rows, m_rows, used = _group_tile(p_order, p_offsets, tl.program_id(0) // blocks_o, M, ROWS)
    rank = _rank(p_ranks, i_m, used, R)
    scale = tl.load(p_scale + i_m)
    p_b += i_m * s_b_m
    b_b = _factors(p_b, o_r, o_r < rank, o_o, m_o, s_b_o, s_b_r)
    p_row = p_out + b_rows[:, None] * s_out_t + o_o[None, :] * s_out_o
    m_out = m_rows[:, None] & m_o[None, :]
    b_out = tl.load(p_row, mask=m_out, other=0.0)
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
    if rank > 0:
        b_delta = _product(_inner(p_inner, b_rows, m_rows, o_r, T, SPLITS, RANK), b_b)
        if RANK > BLOCK_R:
            for i_r in range(BLOCK_R, rank, BLOCK_R):
                b_b = _factors(p_b, i_r + o_r, i_r + o_r < rank, o_o, m_o, s_b_o, s_b_r)
                b_delta += _product(_inner(p_inner, b_rows, m_rows, i_r + o_r, T, SPLITS, RANK), b_b)
        tl.store(p_row, (b_out.to(tl.float32) + b_delta * scale).to(b_out.dtype), mask=m_out)


class Plan(NamedTuple):
    """How the two kernels are compiled, and what the grids are made of."""

    shrink: Config
    expand: Config
    rows: int  # of a tile
    splits: int  # pieces of the features
    rank: int  # R, padded
    blocks_r: int
    blocks_o: int


@functools.cache
def lora_delta_config(
    width: int,
    by_row: bool,
    features: int,
    outputs: int,
    adapters: int,
    R: int,
    itemsize: int,
    device: Device,
    dependent: bool,
) -> Plan:
    """Blocks for up to `width` rows, or for rows that are grouped first if it is 0.

    Tiles of A and B are 8 to 16 KiB a program at 16 bit. Up to MOST_ROWS rows the features are cut into the same pieces
    whatever the batch, so that a row's result does not depend on it. fp32 is multiplied without tensor cores, from
    smaller blocks that fit into the registers.
    """
    rank = max(16, next_power_of_2(R))
    wide = itemsize > 2
    if width:
        block_r = 16 if wide else rank if rank <= 64 else 32
        block_i = 64 if wide else {16: 256, 32: 128, 64: 128}[block_r]
        steps = cdiv(cdiv(features, block_i), 16 if rank <= 32 else 8)
        groups = width if by_row else adapters
        block_o = 64 if wide else {16: 256, 32: 128, 64: 128}[block_r]
        while block_o > 64 and groups * cdiv(outputs, block_o) < device.multiprocessors:
            block_o //= 2
        rows, common = 16, {"WIDTH": width, "BY_ROW": by_row}
        eager = {"EAGER": steps == 1 and not by_row and adapters * R * features * itemsize <= EAGER_BYTES}
        warps, stages = 4, 3 if steps > 1 else 1
    else:
        block_r = min(rank, 32 if wide else 64)
        block_i = 32 if wide else 64
        steps = cdiv(cdiv(features, block_i), 4 if rank <= 32 else 2)
        block_o = 64 if wide or rank > 32 else 128
        rows, common, eager = 32 if wide else 64, {}, {}
        warps, stages = 8 if rank > 32 else 4, 3
    splits = cdiv(features, block_i * steps)
    common.update(ROWS=rows, RANK=rank)
    shrink = Config(
        {**common, "BLOCK_R": block_r, "BLOCK_I": block_i, "STEPS": steps, **eager, "DEPENDENT": dependent},
        num_warps=warps,
        num_stages=stages,
    )
    expand = Config(
        {
            **common,
            "BLOCK_R": block_r if width else min(rank, 32 if rank <= 64 else 16),
            "BLOCK_O": block_o,
            "SPLITS": splits,
            "DEPENDENT": dependent,
        },
        num_warps=4 if width else 8,
        num_stages=1,
        **({"launch_pdl": True} if dependent else {}),
    )
    return Plan(shrink, expand, rows, splits, rank, cdiv(R, block_r), cdiv(outputs, block_o))


def lora_delta_(
    out: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor,
    ranks: torch.Tensor,
) -> None:
    """Launch shrink and expand; shapes and dtypes are those of `personafast.ops.lora_delta_`, which has checked them.

    Any strides do. 16-byte loads need the features of x and A, and the outputs of B and `out`, to be adjacent: B as the
    transposed view of an [M, R, O] tensor.
    """
    T, n_in = x.shape
    M, n_out, R = B.shape
    if not (T and n_in and M and n_out and R):
        return
    device = device_of(x)
    width = 0 if T > MOST_ROWS else max(16, 1 << (T - 1).bit_length())
    dependent = device.capability >= 90 and not x.is_cpu
    plan = lora_delta_config(width, width > 0 and M > T, n_in, n_out, M, R, x.element_size(), device, dependent)
    inner = torch.empty(plan.splits, T, plan.rank, dtype=torch.float32, device=x.device)
    ranks, scale = ranks.contiguous(), scale.contiguous()
    if width:
        shrink, expand = lora_shrink_kernel, lora_expand_kernel
        rows: tuple[torch.Tensor, ...] = (slots.contiguous(),)
        groups = min(M, T)
        grid = groups, plan.blocks_o, 1
    else:
        shrink, expand = lora_shrink_grouped_kernel, lora_expand_grouped_kernel
        rows = group_rows(slots, M)
        groups = T // plan.rows + M
        grid = groups * plan.blocks_o, 1, 1
    launch(
        shrink,
        (groups, plan.splits, plan.blocks_r),
        plan.shrink,
        x,
        A,
        inner,
        *rows,
        ranks,
        *x.stride(),
        *A.stride(),
        T,
        M,
        R,
        n_in,
    )
    launch(
        expand,
        grid,
        plan.expand,
        out,
        inner,
        B,
        *rows,
        scale,
        ranks,
        *out.stride(),
        *B.stride(),
        T,
        M,
        R,
        n_out,
    )
