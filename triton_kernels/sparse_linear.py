"""sparse_linear: y[t] = W x[t] + bias, of W only the kept weights (`values`) and one bit a weight (`bitmap`).

16 bits a kept weight and 1 a weight: 9 bits a weight at one half kept, where a dense pass reads 16. What is saved in
bytes is paid in instructions, since every bit has to find its value; so the kernel is made around that.

A warp takes some outputs and walks along their rows by 256 features, a byte of the bitmap a lane. Where the values of
a byte begin is a running sum along the row: the counts of four rows share one 32-bit scan over the lanes, 8 bits each.
From there a lane goes through its byte bit by bit, loads a value where one is kept and leaves 0 elsewhere; the
addresses of a warp lie within 512 bytes. Rows of x that are multiplied by the same weights share all of this.

The products are left to the tensor cores, without any exchange between lanes, though the operand layout of
`mma.m16n8k16` spreads a product over the lanes. Let lane 4 g + q hold four weights of output r, four of output r + 1
and the four x they meet. Taken for operands, these are rows g and g + 8 of A and column g of B: element (g, g) of the
product is what the lanes 4 g to 4 g + 3 want to add up for r, and (g + 8, g) the same for r + 1. The rest of the 16 x 8
sums is not used. That is one instruction for 8 weights a lane and row of x, where conversion and multiply-add would
take 16, and sums are in fp32.

The kernel needs a 16-bit dtype and rows of x that 16-byte loads can read. All else (fp32, odd widths, the interpreter)
takes `sparse_linear_any_kernel`, the same walk in plain Triton. For many rows of x the weight is put together once by
`sparse_expand_kernel` and multiplied by cuBLAS.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from personafast._triton.launch import Config, Device, cdiv, device_of, interpreting, launch, next_power_of_2

# Features that a warp takes at a time, and the least number of values for which its start can be moved inwards.
TILE = tl.constexpr(256)

# Rows of x up to which the weight is decoded in registers, 16 rows at a time; above, it is put together in memory. An
# estimate by bytes and instructions, until a GPU run has measured it.
EXPANDED_ABOVE = 48

# A byte of the bitmap ($6) and the address of its first value ($5:$4) to eight 16-bit weights. The upper half of the
# address stays, which the launcher sees to: a 64-bit addition under a predicate takes four instructions.
_SPREAD = "\n".join(
    [
        "{ .reg .pred p; .reg .b32 t, low; .reg .b64 a;",
        "mov.b32 low, $4;",
        *(
            f".reg .b32 h{bit}; and.b32 t, $6, {1 << bit}; setp.ne.u32 p, t, 0; mov.b64 a, {{low, $5}};\n"
            f"mov.b32 h{bit}, 0; @p ld.global.nc.L2::256B.u16 h{bit}, [a]; @p add.u32 low, low, 2;"
            for bit in range(8)
        ),
        *(f"mad.lo.u32 ${pair}, h{2 * pair + 1}, 65536, h{2 * pair};" for pair in range(4)),
        "}",
    ]
)
_MMA = (
    "mma.sync.aligned.m16n8k16.row.col.f32.{0}.{0}.f32 "
    "{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9}}, {{$10,$11,$12,$13}};"
)
SPREAD = tl.constexpr(_SPREAD)
MMA_BF16 = tl.constexpr(_MMA.format("bf16"))
MMA_FP16 = tl.constexpr(_MMA.format("f16"))


@triton.jit
def _popcount(b_bits):
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [b_bits], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def _multiply(b_w0, b_w1, b_w2, b_w3, b_x0, b_x1, b_c0, b_c1, b_c2, b_c3, DTYPE: tl.constexpr):
    """Two outputs (w0 and w2, w1 and w3: two weights a word) by four x, added to the sums c."""
    return tl.inline_asm_elementwise(
        MMA_BF16 if DTYPE == tl.bfloat16 else MMA_FP16,
        "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f",
        [b_w0, b_w1, b_w2, b_w3, b_x0, b_x1, b_c0, b_c1, b_c2, b_c3],
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32),
        is_pure=True,
        pack=1,
    )


@triton.jit
def _pairs(b_w, PAIRS: tl.constexpr, WARPS: tl.constexpr):
    """[2 PAIRS, WARPS, 32] to the even and the odd outputs, each [PAIRS, 1, WARPS, 32]."""
    b_even, b_odd = tl.split(b_w.reshape(PAIRS, 2, WARPS, 32).permute(0, 2, 3, 1))
    return b_even[:, None], b_odd[:, None]


@triton.jit(do_not_specialize=["T", "s_bitmap"])
def sparse_linear_kernel(
    p_out,
    p_x,
    p_values,
    p_bitmap,
    p_offsets,
    p_bias,
    n_values,
    T,
    outputs,
    features,
    s_x,
    s_bitmap,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    WARPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """2 PAIRS outputs by ROWS rows of x; the features are split among WARPS warps.

    `s_bitmap` is in bytes, `s_x` in 16 bytes.
    """
    OUTPUTS: tl.constexpr = 2 * PAIRS
    DTYPE: tl.constexpr = p_values.dtype.element_ty
    o_r = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    o_t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    o_w = tl.arange(0, WARPS)
    o_l = tl.arange(0, 32)
    # An output beyond the last one is that one again.
    o_row = tl.minimum(o_r, outputs - 1)
    p_bytes = p_bitmap.to(tl.pointer_type(tl.uint8), bitcast=True) + o_row.to(tl.int64)[:, None, None] * s_bitmap
    n_bytes = features // 8
    n_part = tl.cdiv(n_bytes, 32 * WARPS) * 32
    o_part = o_w * n_part

    # Offsets that are not of these values: nothing outside is read.
    b_first = tl.load(p_offsets + o_row)
    b_first = tl.minimum(tl.maximum(b_first, 0), n_values)
    b_left = tl.minimum(n_values - b_first, 0x7FFFFFFF).to(tl.int32)[:, None]
    b_base = tl.zeros([OUTPUTS, WARPS], tl.int32)
    if WARPS > 1:
        b_count = tl.zeros([OUTPUTS, WARPS, 32], tl.int32)
        for i in range(0, n_part, 32):
            o_byte = (o_part + i)[:, None] + o_l[None, :]
            b_bits = tl.load(p_bytes + o_byte[None], mask=(o_byte < n_bytes)[None], other=0).to(tl.int32)
            b_count += _popcount(b_bits)
        b_counted = tl.sum(b_count, 2)
        b_base = tl.cumsum(b_counted, 1) - b_counted

    # Addresses by their lower halves. A warp of counts is at most 256, four of 8 bits are an int32: the last lane's
    # sum may run over into the next row's, but what is left after its own count is taken off again does not.
    b_high = (p_values.to(tl.int64) >> 32).to(tl.int32)
    b_start = (p_values.to(tl.int64) + b_first * 2).to(tl.int32)[:, None]
    b_shift = (tl.arange(0, 4) * 8)[None, :, None, None]
    p_x_rows = p_x.to(tl.pointer_type(tl.int32), bitcast=True)
    p_x_rows += tl.minimum(o_t, T - 1).to(tl.int64)[:, None, None] * (s_x * 4)
    b_c0 = tl.zeros([PAIRS, ROWS, WARPS, 32], tl.float32)
    b_c1 = tl.zeros([PAIRS, ROWS, WARPS, 32], tl.float32)
    b_c2 = tl.zeros([PAIRS, ROWS, WARPS, 32], tl.float32)
    b_c3 = tl.zeros([PAIRS, ROWS, WARPS, 32], tl.float32)
    o_byte = o_part[:, None] + o_l[None, :]
    b_next = tl.load(p_bytes + o_byte[None], mask=(o_byte < n_bytes)[None], other=0).to(tl.int32)
    for i in range(0, n_part, 32):
        b_bits = b_next
        # The next bits on their way before these are looked at: their values wait for them.
        o_byte = (o_part + i)[:, None] + o_l[None, :]
        # The four pairs of x that belong to a lane's byte. Written as one row of adjacent ones, which are laid over the
        # lanes in fours; of two axes the older compilers would take another one for that of the lanes.
        o_x = (o_part + i)[:, None] * 4 + tl.arange(0, 128)[None, :]
        if EVEN:
            # Under a mask that is the same for all lanes. Of a minimum the compiler does not see that its bytes are
            # adjacent; older ones then lay them over the lanes another way than x, and send every weight through shared
            # memory.
            b_next = tl.load(p_bytes + (o_byte + 32)[None], mask=(o_l < n_part - i - 32)[None, None]).to(tl.int32)
            b_x = tl.load(p_x_rows + o_x[None])
        else:
            b_next = tl.load(p_bytes + (o_byte + 32)[None], mask=(o_byte + 32 < n_bytes)[None], other=0).to(tl.int32)
            b_x = tl.load(p_x_rows + o_x[None], mask=(o_x < n_bytes * 4)[None], other=0)
        b_count = _popcount(b_bits)
        b_packed = tl.sum(b_count.reshape(OUTPUTS // 4, 4, WARPS, 32) << b_shift, 1)
        b_before = (((tl.cumsum(b_packed, 2) - b_packed)[:, None] >> b_shift) & 255).reshape(OUTPUTS, WARPS, 32)
        b_total = tl.sum(b_count, 2)
        # A bitmap that is not of these values: their end is read again instead of what lies behind it.
        b_low = b_start + 2 * tl.minimum(b_base, b_left - b_total)
        b_base += b_total
        b_w0, b_w1, b_w2, b_w3 = tl.inline_asm_elementwise(
            SPREAD,
            "=r,=r,=r,=r,r,r,r",
            [b_low[:, :, None] + 2 * b_before, b_high, b_bits],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        b_even0, b_odd0 = _pairs(b_w0, PAIRS, WARPS)
        b_even1, b_odd1 = _pairs(b_w1, PAIRS, WARPS)
        b_even2, b_odd2 = _pairs(b_w2, PAIRS, WARPS)
        b_even3, b_odd3 = _pairs(b_w3, PAIRS, WARPS)
        b_x02, b_x13 = tl.split(b_x.reshape(ROWS, WARPS, 32, 2, 2))
        b_x0, b_x2 = tl.split(b_x02)
        b_x1, b_x3 = tl.split(b_x13)
        b_c0, b_c1, b_c2, b_c3 = _multiply(
            b_even0, b_odd0, b_even1, b_odd1, b_x0[None], b_x1[None], b_c0, b_c1, b_c2, b_c3, DTYPE
        )
        b_c0, b_c1, b_c2, b_c3 = _multiply(
            b_even2, b_odd2, b_even3, b_odd3, b_x2[None], b_x3[None], b_c0, b_c1, b_c2, b_c3, DTYPE
        )

    # Lane 4 g + q has columns 2 q and 2 q + 1 of the rows g (c0, c1) and g + 8 (c2, c3).
    b_lane = tl.inline_asm_elementwise(
        "mov.u32 $0, %laneid; // $1", "=r,r", [o_l], dtype=tl.int32, is_pure=True, pack=1
    )
    b_column = (b_lane // 4 - b_lane % 4 * 2)[None, None, None, :]
    b_even = tl.where(b_column == 0, b_c0, 0.0) + tl.where(b_column == 1, b_c1, 0.0)
    b_odd = tl.where(b_column == 0, b_c2, 0.0) + tl.where(b_column == 1, b_c3, 0.0)
    b_sums = tl.join(tl.sum(tl.sum(b_even, 3), 2), tl.sum(tl.sum(b_odd, 3), 2))
    b_sums = b_sums.permute(0, 2, 1).reshape(OUTPUTS, ROWS)
    if p_bias is not None:
        b_sums += tl.load(p_bias + o_row).to(tl.float32)[:, None]
    p_sums = p_out + o_t.to(tl.int64)[None, :] * outputs + o_r[:, None]
    tl.store(p_sums, b_sums.to(DTYPE), mask=(o_r < outputs)[:, None] & (o_t < T)[None, :])


@triton.jit
def _spread(p_values, b_first, b_left, b_bits, b_place, BIT: tl.constexpr):
    """The weights at one bit of every byte, and where the next ones are."""
    m_kept = (b_bits >> BIT) & 1
    b_w = tl.load(p_values + b_first + b_place, mask=(m_kept != 0) & (b_place < b_left), other=0.0)
    return b_w, b_place + m_kept


@triton.jit
def _walk(p_bytes, b_base, i, n_bytes):
    """The next 32 bytes of each row: bits, the place of their first values in the row, and that of the next tile."""
    o_byte = i + tl.arange(0, 32)
    b_bits = tl.load(p_bytes + o_byte[None, :], mask=(o_byte < n_bytes)[None, :], other=0).to(tl.int32)
    b_count = b_bits - ((b_bits >> 1) & 0x55)
    b_count = (b_count & 0x33) + ((b_count >> 2) & 0x33)
    b_count = (b_count + (b_count >> 4)) & 0xF
    b_place = tl.cumsum(b_count, 1) - b_count + b_base[:, None]
    return o_byte, b_bits, b_place, b_base + tl.sum(b_count, 1)


@triton.jit(do_not_specialize=["T", "s_bitmap"])
def sparse_linear_any_kernel(
    p_out,
    p_x,
    p_values,
    p_bitmap,
    p_offsets,
    p_bias,
    n_values,
    T,
    outputs,
    features,
    s_x,
    s_x_column,
    s_bitmap,
    OUTPUTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """OUTPUTS outputs by ROWS rows of x of any dtype and layout; a warp a program."""
    DTYPE: tl.constexpr = p_values.dtype.element_ty
    o_r = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    o_t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < outputs
    m_t = (o_t < T)[:, None]
    p_bytes = p_bitmap.to(tl.pointer_type(tl.uint8), bitcast=True)
    p_bytes += tl.minimum(o_r, outputs - 1).to(tl.int64)[:, None] * s_bitmap
    b_first = tl.load(p_offsets + o_r, mask=m_r, other=0)
    b_first = tl.minimum(tl.maximum(b_first, 0), n_values)[:, None]
    b_left = tl.minimum(n_values - b_first, 0x7FFFFFFF).to(tl.int32)
    b_base = tl.zeros([OUTPUTS], tl.int32)
    p_x_rows = p_x + o_t.to(tl.int64)[:, None] * s_x
    b_sums = tl.zeros([OUTPUTS, ROWS, 32], tl.float32)
    n_bytes = tl.cdiv(features, 8)
    for i in range(0, n_bytes, 32):
        o_byte, b_bits, b_place, b_base = _walk(p_bytes, b_base, i, n_bytes)
        for bit in tl.static_range(8):
            b_w, b_place = _spread(p_values, b_first, b_left, b_bits, b_place, bit)
            o_i = o_byte * 8 + bit
            b_x = tl.load(
                p_x_rows + o_i.to(tl.int64)[None, :] * s_x_column, mask=m_t & (o_i < features)[None, :], other=0.0
            )
            # A bit beyond I would meet a zero of x, and infinity times zero is not zero.
            b_w = tl.where((o_i < features)[None, :], b_w.to(tl.float32), 0.0)
            b_sums += b_w[:, None, :] * b_x.to(tl.float32)[None, :, :]
    b_out = tl.sum(b_sums, 2)
    if p_bias is not None:
        b_out += tl.load(p_bias + o_r, mask=m_r, other=0.0).to(tl.float32)[:, None]
    p_y = p_out + o_t.to(tl.int64)[None, :] * outputs + o_r[:, None]
    tl.store(p_y, b_out.to(DTYPE), mask=m_r[:, None] & (o_t < T)[None, :])


@triton.jit(do_not_specialize=["s_bitmap"])
def sparse_expand_kernel(
    p_weight,
    p_values,
    p_bitmap,
    p_offsets,
    n_values,
    outputs,
    features,
    s_bitmap,
    OUTPUTS: tl.constexpr,
):
    """OUTPUTS rows of the dense weight; a warp a program."""
    o_r = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    m_r = o_r < outputs
    p_bytes = p_bitmap.to(tl.pointer_type(tl.uint8), bitcast=True)
    p_bytes += tl.minimum(o_r, outputs - 1).to(tl.int64)[:, None] * s_bitmap
    b_first = tl.load(p_offsets + o_r, mask=m_r, other=0)
    b_first = tl.minimum(tl.maximum(b_first, 0), n_values)[:, None]
    b_left = tl.minimum(n_values - b_first, 0x7FFFFFFF).to(tl.int32)
    b_base = tl.zeros([OUTPUTS], tl.int32)
    p_rows = p_weight + o_r.to(tl.int64)[:, None] * features
    n_bytes = tl.cdiv(features, 8)
    for i in range(0, n_bytes, 32):
        o_byte, b_bits, b_place, b_base = _walk(p_bytes, b_base, i, n_bytes)
        b_w0, b_place = _spread(p_values, b_first, b_left, b_bits, b_place, 0)
        b_w1, b_place = _spread(p_values, b_first, b_left, b_bits, b_place, 1)
        b_w2, b_place = _spread(p_values, b_first, b_left, b_bits, b_place, 2)
        b_w3, b_place = _spread(p_values, b_first, b_left, b_bits, b_place, 3)
        b_w4, b_place = _spread(p_values, b_first, b_left, b_bits, b_place, 4)
        b_w5, b_place = _spread(p_values, b_first, b_left, b_bits, b_place, 5)
        b_w6, b_place = _spread(p_values, b_first, b_left, b_bits, b_place, 6)
        b_w7, b_place = _spread(p_values, b_first, b_left, b_bits, b_place, 7)
        b_even = tl.join(tl.join(b_w0, b_w4), tl.join(b_w2, b_w6))
        b_odd = tl.join(tl.join(b_w1, b_w5), tl.join(b_w3, b_w7))
        b_w = tl.join(b_even, b_odd).reshape(OUTPUTS, TILE)
        o_i = i * 8 + tl.arange(0, TILE)
        tl.store(p_rows + o_i[None, :], b_w, mask=m_r[:, None] & (o_i < features)[None, :])


@functools.cache
def sparse_linear_config(T: int, outputs: int, features: int, device: Device) -> Config:
    """Four outputs a program, at most 8 rows of x; one warp where that gives every multiprocessor 16, else up to 8."""
    warps = 1
    while warps < 8 and cdiv(outputs, 4) * warps < 16 * device.multiprocessors and warps * TILE.value < features:
        warps *= 2
    rows = min(8, next_power_of_2(max(T, 1)))
    even = features % (TILE.value * warps) == 0
    return Config({"PAIRS": 2, "ROWS": rows, "WARPS": warps, "EVEN": even}, num_warps=warps)


@functools.cache
def sparse_linear_any_config(T: int) -> Config:
    """Four outputs a program and at most 8 rows of x, so that the sums stay in registers."""
    return Config({"OUTPUTS": 4, "ROWS": min(8, next_power_of_2(max(T, 1)))}, num_warps=1)


_EXPAND = Config({"OUTPUTS": 4}, num_warps=1)


def _fits(x: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether `sparse_linear_kernel` can take the call."""
    address = values.data_ptr()
    return (
        not interpreting()
        and x.dtype != torch.float32
        and x.shape[1] % 8 == 0
        and (x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0)
        and values.numel() >= TILE.value
        # The upper half of the address is the same for all values.
        and address >> 32 == (address + 2 * values.numel()) >> 32
    )


def sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmap: torch.Tensor,
    row_offsets: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Launch a kernel; shapes and dtypes are those of `personafast.ops.sparse_linear`, which has checked them.

    Compressed weights that are not contiguous go through a copy.
    """
    T, features = x.shape
    outputs = bitmap.shape[0]
    values, bitmap, row_offsets = values.contiguous(), bitmap.contiguous(), row_offsets.contiguous()
    if T > EXPANDED_ABOVE:
        return F.linear(x, _expanded(values, bitmap, row_offsets, features), bias)
    out = x.new_empty((T, outputs))
    compressed = (values, bitmap, row_offsets, None if bias is None else bias.contiguous(), values.numel())
    if _fits(x, values):
        config = sparse_linear_config(T, outputs, features, device_of(x))
        grid = (cdiv(outputs, 4), cdiv(T, config.constants["ROWS"]), 1)
        launch(
            sparse_linear_kernel,
            grid,
            config,
            out,
            x,
            *compressed,
            T,
            outputs,
            features,
            x.stride(0) // 8,
            4 * bitmap.shape[1],
        )
    else:
        config = sparse_linear_any_config(T)
        grid = (cdiv(outputs, config.constants["OUTPUTS"]), cdiv(T, config.constants["ROWS"]), 1)
        strides = (x.stride(0), x.stride(1), 4 * bitmap.shape[1])
        launch(sparse_linear_any_kernel, grid, config, out, x, *compressed, T, outputs, features, *strides)
    return out


def _expanded(values: torch.Tensor, bitmap: torch.Tensor, row_offsets: torch.Tensor, features: int) -> torch.Tensor:
    """The dense weight [O, I]."""
    outputs = bitmap.shape[0]
    weight = values.new_empty((outputs, features))
    launch(
        sparse_expand_kernel,
        (cdiv(outputs, _EXPAND.constants["OUTPUTS"]), 1, 1),
        _EXPAND,
        weight,
        values,
        bitmap,
        row_offsets,
        values.numel(),
        outputs,
        features,
        4 * bitmap.shape[1],
    )
    return weight
