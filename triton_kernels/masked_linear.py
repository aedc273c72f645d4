"""masked_linear: y[t] = (weight * (m + gamma (1 - m))) x[t] + bias, m = masks[slots[t]], the dense weight for slot -1.

Two ways to cut the work; `masked_linear_way` chooses by the number of rows.

*Few rows* (`masked_linear_few_kernel`): bound by memory, so the weight is read once for up to 8 rows, 2 + P / 8 bytes a
weight. Nothing may be wasted on the way: at 8 masks an H200 has 2.6 instructions for each weight and row while memory
delivers them, and this takes 2.2. A lane keeps 8 weights of each of 8 outputs in fp32 registers, and the byte of a mask
that belongs to 8 weights becomes 8 predicates, under each of which one multiply-add is done or not. A weight that is
masked out is never multiplied, and so may be infinite or NaN. Weights, masks and x come through shared memory, several
tiles ahead. A row is summed in the same order whatever the batch.

*Many rows* (`masked_linear_many_kernel`): the rows are put in order by mask (`group_rows`), and a program multiplies a
tile of the weight with rows of one mask on tensor cores, out^T = W x^T: the weight is the operand that comes from
registers, where its mask is applied on the way, once for all rows of the tile.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from personafast._triton.group_rows import group_rows
from personafast._triton.launch import Config, Device, cdiv, device_of, interpreting, launch, next_power_of_2

# Rows that one program of the first kernel takes, and weights that a lane takes at once: a byte of the mask.
FEW_ROWS = 8
FEW_COLUMNS = 32 * 8

# A pair of bf16 as two fp32.
_WIDEN = tl.constexpr("{ .reg .b32 t; shl.b32 t, $2, 16; mov.b32 $0, t; and.b32 t, $2, 0xffff0000; mov.b32 $1, t; }")


def _fma_under_bits(gate: bool) -> tl.constexpr:
    """PTX: $0 = $1 + weights $3.. times x $11.. where $2 has a one; with `gate`, plus weights times $19.. where a zero.

    ptxas turns the eight tests into one R2P, which fills the predicate registers, and a test of the last bit.
    """
    lines = []
    for bit in range(8):
        lines.append(f"and.b32 t, $2, {1 << bit}; setp.ne.b32 p, t, 0;")
        lines.append(f"@p fma.rn.f32 $0, ${3 + bit}, ${11 + bit}, $0;")
        if gate:
            lines.append(f"@!p fma.rn.f32 $0, ${3 + bit}, ${19 + bit}, $0;")
    return tl.constexpr("{ .reg .pred p; .reg .b32 t; mov.f32 $0, $1; " + " ".join(lines) + " }")


_FMA = _fma_under_bits(gate=False)
_FMA_GATED = _fma_under_bits(gate=True)


@triton.jit
def _widen(b, ASM: tl.constexpr):
    """`b` in fp32."""
    if ASM and b.dtype == tl.bfloat16:
        # The compiler takes two instructions for the upper half of a pair, where clearing the lower is enough.
        return tl.inline_asm_elementwise(_WIDEN, "=&f,=&f,r", [b], dtype=tl.float32, is_pure=True, pack=2)
    else:
        return b.to(tl.float32)


@triton.jit
def _by_eights(b):
    """[N, 8 C] as eight tensors [N, C], one for each bit of a byte."""
    b = b.reshape(b.shape[0], b.shape[1] // 8, 2, 2, 2)
    b_even, b_odd = b.split()
    b_04, b_26 = b_even.split()
    b_15, b_37 = b_odd.split()
    b_0, b_4 = b_04.split()
    b_2, b_6 = b_26.split()
    b_1, b_5 = b_15.split()
    b_3, b_7 = b_37.split()
    return b_0, b_1, b_2, b_3, b_4, b_5, b_6, b_7


@triton.jit
def _add_products(b_acc, b_byte, b_w, b_x, b_gamma, SOFT: tl.constexpr, ASM: tl.constexpr):
    """b_acc + the products of the eight weights and eight x whose bit is set; gamma times the others where SOFT."""
    if ASM:
        w0, w1, w2, w3, w4, w5, w6, w7 = b_w
        x0, x1, x2, x3, x4, x5, x6, x7 = b_x
        if SOFT:
            return tl.inline_asm_elementwise(
                _FMA_GATED,
                "=&f,f,r" + ",f" * 24,
                [b_acc, b_byte, w0, w1, w2, w3, w4, w5, w6, w7, x0, x1, x2, x3, x4, x5, x6, x7]
                + [x0 * b_gamma, x1 * b_gamma, x2 * b_gamma, x3 * b_gamma]
                + [x4 * b_gamma, x5 * b_gamma, x6 * b_gamma, x7 * b_gamma],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
        else:
            return tl.inline_asm_elementwise(
                _FMA,
                "=&f,f,r" + ",f" * 16,
                [b_acc, b_byte, w0, w1, w2, w3, w4, w5, w6, w7, x0, x1, x2, x3, x4, x5, x6, x7],
                dtype=tl.float32,
                is_pure=True,
                pack=1,
            )
    else:
        for i in tl.static_range(8):
            m_kept = (b_byte & (1 << i)) != 0
            if SOFT:
                b_acc += b_w[i] * tl.where(m_kept, b_x[i], b_x[i] * b_gamma)
            else:
                b_acc = tl.where(m_kept, b_acc + b_w[i] * b_x[i], b_acc)
        return b_acc


@triton.jit
def _few_sums(
    p_xs,
    p_ms,
    b_gammas,
    b_denses,
    p_w,
    features,
    row_bytes,
    SOFT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """Sums of every row, [BLOCK_O, 32] each: one of the 32 sums of an output is that of every 32nd group of 8."""
    o_k = tl.arange(0, 256)
    o_c = tl.arange(0, 32)
    b_sums = ()
    for _ in tl.static_range(ROWS):
        b_sums = b_sums + (tl.zeros([BLOCK_O, 32], tl.float32),)
    for i_k in tl.range(0, tl.cdiv(features, 256), num_stages=STAGES):
        # The weight comes last: the layout of the last load is the one that the compiler keeps for the products.
        b_ms = ()
        b_xs = ()
        if EVEN:
            for i in tl.static_range(ROWS):
                b_ms = b_ms + (tl.load(p_ms[i] + i_k * 32),)
                b_xs = b_xs + (tl.load(p_xs[i] + i_k * 256),)
            b_w = tl.load(p_w + i_k * 256)
        else:
            m_k = (i_k * 256 + o_k < features)[None, :]
            m_c = (i_k * 32 + o_c < row_bytes)[None, :]
            for i in tl.static_range(ROWS):
                b_ms = b_ms + (tl.load(p_ms[i] + i_k * 32, mask=m_c, other=0),)
                b_xs = b_xs + (tl.load(p_xs[i] + i_k * 256, mask=m_k, other=0.0),)
            b_w = tl.load(p_w + i_k * 256, mask=m_k, other=0.0)
        b_w = _by_eights(_widen(b_w, ASM))
        b_added = ()
        for i in tl.static_range(ROWS):
            b_byte = b_ms[i].to(tl.int32) | b_denses[i]
            b_x = _by_eights(_widen(b_xs[i], ASM))
            b_added = b_added + (_add_products(b_sums[i], b_byte, b_w, b_x, b_gammas[i], SOFT, ASM),)
        b_sums = b_added
    return b_sums


@triton.jit(do_not_specialize=["T", "P"])
def masked_linear_few_kernel(
    p_out,
    p_x,
    p_weight,
    p_masks,
    p_slots,
    p_gamma,
    p_bias,
    s_x,
    s_weight,
    words,
    T,
    outputs,
    features,
    P,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """BLOCK_O outputs of ROWS rows; programs of the same outputs follow each other and share the weight in L2."""
    i_t = (tl.program_id(0) % tl.cdiv(T, ROWS)) * ROWS
    i_o = tl.program_id(0) // tl.cdiv(T, ROWS)
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_in = tl.minimum(o_o, outputs - 1).to(tl.int64)[:, None]
    o_k = tl.arange(0, 256)[None, :]
    row_bytes = words * 4
    o_m = o_in * row_bytes + tl.arange(0, 32)[None, :]
    p_w = p_weight + o_in * s_weight + o_k
    p_xs = ()
    p_ms = ()
    b_gammas = ()
    b_denses = ()
    for i in tl.static_range(ROWS):
        i_row = tl.minimum(i_t + i, T - 1).to(tl.int64)
        b_slot = tl.load(p_slots + i_row).to(tl.int64)
        m_masked = (b_slot >= 0) & (b_slot < P)
        b_slot = tl.where(m_masked, b_slot, 0)
        b_denses = b_denses + (tl.where(m_masked, 0, 255),)
        p_xs = p_xs + (p_x + i_row * s_x + o_k,)
        p_ms = p_ms + (p_masks + b_slot * outputs * row_bytes + o_m,)
        if p_gamma is not None:
            b_gammas = b_gammas + (tl.load(p_gamma + b_slot, mask=m_masked, other=0.0),)
        else:
            b_gammas = b_gammas + (0.0,)
    b_sums = _few_sums(
        p_xs, p_ms, b_gammas, b_denses, p_w, features, row_bytes, p_gamma is not None, ROWS, BLOCK_O, EVEN, STAGES, ASM
    )
    for i in tl.static_range(ROWS):
        b_out = tl.sum(b_sums[i], 1)
        if p_bias is not None:
            b_out += tl.load(p_bias + o_o, mask=o_o < outputs, other=0.0).to(tl.float32)
        p_row = p_out + (i_t + i).to(tl.int64) * outputs
        tl.store(p_row + o_o, b_out.to(p_out.dtype.element_ty), mask=o_o < tl.where(i_t + i < T, outputs, 0))


# A pair of 16-bit weights under the signs of two int32: PRMT makes 16 bits each of them.
_KEEP_NEGATIVE = tl.constexpr("{ .reg .b32 m; prmt.b32 m, $2, $3, 0xffbb; and.b32 $0, $1, m; }")


@triton.jit
def _masked(b_w, b_signs, b_gamma, SOFT: tl.constexpr, ASM: tl.constexpr):
    """`b_w` where `b_signs` is negative, elsewhere gamma times as much, or 0 unless SOFT."""
    if SOFT:
        return tl.where(b_signs < 0, b_w, (b_w.to(tl.float32) * b_gamma).to(b_w.dtype))
    elif ASM and b_w.dtype != tl.float32:
        return tl.inline_asm_elementwise(
            _KEEP_NEGATIVE, "=r,r,r,r", [b_w, b_signs], dtype=b_w.dtype, is_pure=True, pack=2
        )
    else:
        return tl.where(b_signs < 0, b_w, tl.zeros_like(b_w))


@triton.jit(do_not_specialize=["T", "P", "n_t"])
def masked_linear_many_kernel(
    p_out,
    p_x,
    p_weight,
    p_masks,
    p_order,
    p_offsets,
    p_gamma,
    p_bias,
    s_x,
    s_weight,
    words,
    T,
    outputs,
    features,
    P,
    n_t,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    ASM: tl.constexpr,
):
    """BLOCK_O outputs of up to BLOCK_T rows that share a mask; n_t tiles of rows, as many as there can be.

    Eight tiles of rows come together, so that programs that run at once read the same weights and the same x.
    """
    i_first = tl.program_id(0) // (8 * tl.cdiv(outputs, BLOCK_O)) * 8
    n_together = tl.minimum(n_t - i_first, 8)
    i_left = tl.program_id(0) % (8 * tl.cdiv(outputs, BLOCK_O))
    i_t = i_first + i_left % n_together
    i_o = i_left // n_together

    o_g = tl.arange(0, GROUPS)
    b_begin = tl.load(p_offsets + o_g, mask=o_g <= P, other=T)
    b_end = tl.load(p_offsets + o_g + 1, mask=o_g <= P, other=T)
    b_tiles = (b_end - b_begin + BLOCK_T - 1) // BLOCK_T
    m_done = tl.cumsum(b_tiles, 0) <= i_t
    i_g = tl.sum(m_done.to(tl.int32), 0)
    if i_g > P:
        return
    i_row = tl.sum(tl.where(o_g == i_g, b_begin, 0), 0) + (i_t - tl.sum(tl.where(m_done, b_tiles, 0), 0)) * BLOCK_T
    i_end = tl.sum(tl.where(o_g == i_g, b_end, 0), 0)

    o_t = i_row + tl.arange(0, BLOCK_T)
    b_row = tl.load(p_order + tl.minimum(o_t, i_end - 1)).to(tl.int64)
    o_o = i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_in = tl.minimum(o_o, outputs - 1).to(tl.int64)[:, None]
    o_k = tl.arange(0, BLOCK_K)
    p_w = p_weight + o_in * s_weight + o_k[None, :]
    p_xs = p_x + b_row[None, :] * s_x + o_k[:, None]
    m_masked = i_g < P
    b_gamma = 0.0
    if p_gamma is not None:
        b_gamma = tl.load(p_gamma + i_g, mask=m_masked, other=0.0)
    p_m = p_masks + (tl.where(m_masked, i_g, 0).to(tl.int64) * outputs + o_in) * words
    # A left shift by this has the bit of the weight in the sign.
    b_shift = (31 - o_k % 32)[None, :]
    b_dense = tl.where(m_masked, 0, -1)
    b_sum = tl.zeros([BLOCK_O, BLOCK_T], tl.float32)
    for i_k in tl.range(0, tl.cdiv(features, BLOCK_K), num_stages=STAGES):
        i_word = i_k * (BLOCK_K // 32)
        if EVEN:
            b_w = tl.load(p_w + i_k * BLOCK_K)
            b_x = tl.load(p_xs + i_k * BLOCK_K)
        else:
            b_w = tl.load(p_w + i_k * BLOCK_K, mask=(i_k * BLOCK_K + o_k < features)[None, :], other=0.0)
            b_x = tl.load(p_xs + i_k * BLOCK_K, mask=(i_k * BLOCK_K + o_k < features)[:, None], other=0.0)
        b_word = tl.load(p_m + i_word) | b_dense
        if BLOCK_K == 64:
            b_high = tl.load(p_m + tl.minimum(i_word + 1, words - 1)) | b_dense
            b_word = tl.where((o_k < 32)[None, :], b_word, b_high)
        b_w = _masked(b_w, b_word << b_shift, b_gamma, p_gamma is not None, ASM)
        b_sum = tl.dot(b_w, b_x, b_sum, input_precision="ieee")
    if p_bias is not None:
        b_sum += tl.load(p_bias + o_o, mask=o_o < outputs, other=0.0).to(tl.float32)[:, None]
    b_out = tl.trans(b_sum.to(p_out.dtype.element_ty))
    m_out = (o_t < i_end)[:, None] & (o_o < outputs)[None, :]
    tl.store(p_out + b_row[:, None] * outputs + o_o[None, :], b_out, mask=m_out)


@functools.cache
def _few(rows: int, block: int, even: bool, stages: int) -> Config:
    constants = {"ROWS": rows, "BLOCK_O": block, "EVEN": even, "STAGES": stages, "ASM": not interpreting()}
    return Config(constants, num_warps=2, num_stages=stages)


def masked_linear_few_config(
    T: int, outputs: int, features: int, dtype: torch.dtype, soft: bool, device: Device
) -> Config:
    """Two warps that keep 8 outputs each, as many as registers allow; fewer where outputs would not fill the GPU.

    Four stages of 16 KB and four programs leave an SM with 150 KB in flight.
    """
    rows = min(FEW_ROWS, next_power_of_2(T))
    even = features % FEW_COLUMNS == 0
    block = 8 if rows == FEW_ROWS and (soft or dtype == torch.float32 or not even) else 16
    while block > 4 and cdiv(outputs, block) * cdiv(T, rows) < device.multiprocessors:
        block //= 2
    return _few(rows, block, even, 4 if device.shared_bytes >= 160 << 10 else 3)


@functools.cache
def _many(block_t: int, block_o: int, block_k: int, groups: int, even: bool, warps: int, stages: int) -> Config:
    constants = {
        "BLOCK_T": block_t,
        "BLOCK_O": block_o,
        "BLOCK_K": block_k,
        "GROUPS": groups,
        "EVEN": even,
        "STAGES": stages,
        "ASM": not interpreting(),
    }
    return Config(constants, num_warps=warps, num_stages=stages)


def masked_linear_many_config(T: int, features: int, P: int, dtype: torch.dtype, device: Device) -> Config:
    """Tiles as tall as a mask has rows on average, since a tile of one mask is padded to BLOCK_T rows.

    256 rows are what tensor cores of Hopper need to be busy as long as shared memory is with the weights, which pass
    through it twice.
    """
    groups = next_power_of_2(P + 1)
    if dtype == torch.float32:
        return _many(32, 32, 32, groups, features % 32 == 0, 4, 3)
    if features % 8 != 0:  # no row is aligned, and single elements are loaded
        return _many(32, 64, 32, groups, features % 32 == 0, 4, 2)
    roomy = device.shared_bytes >= 160 << 10
    largest = 256 if roomy and device.capability >= 90 else 128
    block_t = min(largest, max(32, next_power_of_2(T // (P + 1))))
    return _many(block_t, 128, 64, groups, features % 64 == 0, 8, 4 if roomy and block_t < 256 else 3)


def masked_linear_way(T: int, P: int) -> str:
    """Which of the two kernels T rows and P masks go to, "few" or "many"; by estimate, until a GPU has measured it.

    The first one's time grows by a pass for every 8 rows, bound by instructions. The second one's grows by a pass for
    every mask in use, of which no more than min(T, P + 1) can be, each two thirds as long: the weight comes from L2.
    """
    return "few" if T <= FEW_ROWS or (T < 6 * min(T, P + 1) and T <= 128) else "many"


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    masks: torch.Tensor,
    slots: torch.Tensor,
    gamma: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Launch one of the two ways; `personafast.ops.masked_linear` has checked shapes and dtypes.

    It refuses float64 and a weight whose columns are not adjacent; such an x goes through a copy. Without masks it is
    the dense layer, for which cuBLAS is there.
    """
    T, features = x.shape
    P, outputs, words = masks.shape
    if P == 0:
        return F.linear(x, weight, bias)
    out = x.new_empty((T, outputs))
    if not (T and outputs):
        return out
    if x.stride(1) != 1:
        x = x.contiguous()
    masks, slots = masks.contiguous(), slots.contiguous()
    gamma = None if gamma is None else gamma.contiguous()
    bias = None if bias is None else bias.contiguous()
    if masked_linear_way(T, P) == "few":
        config = masked_linear_few_config(T, outputs, features, x.dtype, gamma is not None, device_of(x))
        rows, block = config.constants["ROWS"], config.constants["BLOCK_O"]
        grid = (cdiv(outputs, block) * cdiv(T, rows), 1, 1)
        rest = (gamma, bias, x.stride(0), weight.stride(0), words, T, outputs, features, P)
        launch(masked_linear_few_kernel, grid, config, out, x, weight, masks.view(torch.uint8), slots, *rest)
        return out
    order, offsets = group_rows(slots, P)
    config = masked_linear_many_config(T, features, P, x.dtype, device_of(x))
    n_t = T // config.constants["BLOCK_T"] + min(T, P + 1)
    grid = (n_t * cdiv(outputs, config.constants["BLOCK_O"]), 1, 1)
    rest = (gamma, bias, x.stride(0), weight.stride(0), words, T, outputs, features, P, n_t)
    launch(masked_linear_many_kernel, grid, config, out, x, weight, masks, order, offsets, *rest)
    return out
