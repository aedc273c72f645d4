"""token_logprobs: log_softmax(softcap(logit_scale (lm_head hidden[t] + bias)) / temperature[t])[tokens[t]].

The head is read once, 2 V H bytes at 16 bit, and no logit is stored. A program multiplies a tile of the vocabulary by a
tile of rows on the tensor cores, the head being the side that is long, and leaves of its logits their maximum and sum
of exponentials, and the logit of a row's token if that is one of its own. A second launch joins the partial sums of a
row, in the order of the vocabulary. With rows that fit one tile the head comes from memory once and the rows from the
L2 cache once a tile, which is why tiles are long: 256 tokens by 64 rows leave a quarter of the traffic to the rows.
Programs of the last wave find the memory idle, so that it costs little that it is not full.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from personafast._triton.elementary import tanh
from personafast._triton.launch import Config, cdiv, device_of, launch, next_power_of_2


@triton.jit(do_not_specialize=["T"])
def token_logprobs_kernel(
    p_parts,
    p_hidden,
    p_head,
    p_tokens,
    p_temperature,
    p_bias,
    s_hidden,
    s_head,
    logit_scale,
    softcap,
    T,
    V,
    H,
    BLOCK_V: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PART: tl.constexpr,
    EVEN: tl.constexpr,
    CAPPED: tl.constexpr,
):
    """BLOCK_V tokens by BLOCK_T rows. `p_parts` holds maxima [T, tiles], sums [T, tiles] and the tokens' logits [T]."""
    # Rows first: programs that share a tile of the head run side by side, and find it in the L2 cache.
    n_rows = tl.cdiv(T, BLOCK_T)
    i_v = tl.program_id(0) // n_rows
    i_t = tl.program_id(0) % n_rows
    n_tiles = tl.cdiv(V, PART)
    o_v = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_h = tl.arange(0, BLOCK_H)
    m_v = o_v < V
    m_t = o_t < T
    # What is past the end is the last row again: a load without a mask, and its logits do not count.
    p_w = p_head + tl.minimum(o_v, V - 1).to(tl.int64)[:, None] * s_head + o_h[None, :]
    p_x = p_hidden + tl.minimum(o_t, T - 1).to(tl.int64)[None, :] * s_hidden + o_h[:, None]
    b_logits = tl.zeros([BLOCK_V, BLOCK_T], dtype=tl.float32)
    for i_h in range(0, tl.cdiv(H, BLOCK_H)):
        if EVEN:
            b_w = tl.load(p_w)
            b_x = tl.load(p_x)
        else:
            b_w = tl.load(p_w, mask=o_h[None, :] < H - i_h * BLOCK_H, other=0.0)
            b_x = tl.load(p_x, mask=o_h[:, None] < H - i_h * BLOCK_H, other=0.0)
        b_logits = tl.dot(b_w, b_x, b_logits, input_precision="ieee")
        p_w += BLOCK_H
        p_x += BLOCK_H
    if p_bias is not None:
        b_logits += tl.load(p_bias + o_v, mask=m_v, other=0.0).to(tl.float32)[:, None]
    b_logits *= logit_scale
    if CAPPED:
        b_logits = softcap * tanh(b_logits / softcap)
    if p_temperature is not None:
        b_logits = b_logits / tl.load(p_temperature + o_t, mask=m_t, other=1.0)[None, :]
    b_logits = tl.where(m_v[:, None], b_logits, -float("inf"))

    n_parts = T.to(tl.int64) * n_tiles
    b_token = tl.load(p_tokens + o_t, mask=m_t, other=-1).to(tl.int64)
    b_token = tl.where((b_token >= 0) & (b_token < V), b_token, -1).to(tl.int32)
    m_own = o_v[:, None] == b_token[None, :]
    p_own = p_parts + 2 * n_parts + o_t[None, :] + tl.zeros([BLOCK_V, BLOCK_T], dtype=tl.int32)
    tl.store(p_own, b_logits, mask=m_own)

    b_tiles = tl.reshape(b_logits, [BLOCK_V // PART, PART, BLOCK_T])
    b_max = tl.max(b_tiles, 1)
    # Where every token is barred the sum is 0, and not that of exp(-inf + inf). A NaN is in the sum, if not in b_max.
    b_shift = tl.where(b_max == -float("inf"), 0.0, b_max)
    b_sum = tl.sum(tl.exp(b_tiles - b_shift[:, None, :]), 1)
    o_tile = i_v * (BLOCK_V // PART) + tl.arange(0, BLOCK_V // PART)
    m_part = (o_tile < n_tiles)[:, None] & m_t[None, :]
    o_part = o_t.to(tl.int64)[None, :] * n_tiles + o_tile[:, None]
    tl.store(p_parts + o_part, b_max, mask=m_part)
    tl.store(p_parts + n_parts + o_part, b_sum, mask=m_part)


@triton.jit(do_not_specialize=["T"])
def token_logprobs_join_kernel(p_out, p_parts, p_tokens, T, V, n_tiles, BLOCK: tl.constexpr):
    """One row: the partial sums of its n_tiles tiles, and NaN for a token that is none."""
    i_t = tl.program_id(0).to(tl.int64)
    o_v = tl.arange(0, BLOCK)
    m_v = o_v < n_tiles
    n_parts = T.to(tl.int64) * n_tiles
    b_token = tl.load(p_tokens + i_t).to(tl.int64)
    b_max = tl.load(p_parts + i_t * n_tiles + o_v, mask=m_v, other=-float("inf"))
    b_sum = tl.load(p_parts + n_parts + i_t * n_tiles + o_v, mask=m_v, other=0.0)
    m_known = (b_token >= 0) & (b_token < V)
    b_logit = tl.load(p_parts + 2 * n_parts + i_t, mask=m_known, other=float("nan"))
    b_top = tl.max(b_max, 0)
    b_top = tl.where(b_top == -float("inf"), 0.0, b_top)
    b_total = tl.sum(b_sum * tl.exp(b_max - b_top), 0)
    tl.store(p_out + i_t, (b_logit - b_top) - tl.log(b_total))


# Rows a tile: what tensor cores take at least, and what leaves registers for two tiles of warps.
LEAST_ROWS, MOST_ROWS = 16, 128


@functools.cache
def token_logprobs_config(block_t: int, H: int, itemsize: int, capped: bool, shared_bytes: int) -> Config:
    """Tiles for `block_t` rows, and as many loads in flight as fit shared memory, up to 4.

    The tile of tokens does not depend on the rows, so a row's bits do not depend on how many others there are.
    float32 is multiplied without tensor cores, which would round it, from tiles that fit the registers.
    """
    if itemsize == 4:
        constants = {"BLOCK_V": 64, "BLOCK_T": min(block_t, 64), "BLOCK_H": 16, "PART": 64}
        return Config(
            {**constants, "EVEN": H % 16 == 0, "CAPPED": capped}, num_warps=4, num_stages=3, enable_fp_fusion=True
        )
    # 256 x 128 of 64 columns, three deep, is 144 KiB.
    block_v = 256 if shared_bytes >= 160 << 10 and block_t <= 64 else 128
    stages = min(4, shared_bytes // ((block_v + block_t) * 64 * itemsize))
    constants = {"BLOCK_V": block_v, "BLOCK_T": block_t, "BLOCK_H": 64, "PART": 128}
    return Config(
        {**constants, "EVEN": H % 64 == 0, "CAPPED": capped}, num_warps=8, num_stages=stages, enable_fp_fusion=True
    )


@functools.cache
def token_logprobs_join_config(tiles: int) -> Config:
    """A row's partial sums at once, 4 a thread."""
    block = max(32, next_power_of_2(tiles))
    return Config({"BLOCK": block}, num_warps=min(8, max(1, block // 128)), enable_fp_fusion=True)


def token_logprobs(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float,
) -> torch.Tensor:
    """Launch both kernels; the arguments are those of `personafast.ops.token_logprobs`, which has checked them.

    Columns of `lm_head` must be adjacent; those of `hidden`, which is small, are made so.
    """
    T, H = hidden.shape
    V = lm_head.shape[0]
    rows = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    tokens = tokens.contiguous()
    block_t = min(MOST_ROWS, max(LEAST_ROWS, next_power_of_2(max(1, T))))
    config = token_logprobs_config(block_t, H, hidden.itemsize, softcap > 0, device_of(hidden).shared_bytes)
    tiles = cdiv(V, config.constants["PART"])
    out = torch.empty(T, dtype=torch.float32, device=hidden.device)
    parts = torch.empty((2 * tiles + 1) * T, dtype=torch.float32, device=hidden.device)
    launch(
        token_logprobs_kernel,
        (cdiv(V, config.constants["BLOCK_V"]) * cdiv(T, config.constants["BLOCK_T"]), 1, 1),
        config,
        parts,
        rows,
        lm_head,
        tokens,
        None if temperature is None else temperature.contiguous(),
        None if bias is None else bias.contiguous(),
        rows.stride(0),
        lm_head.stride(0),
        float(logit_scale),
        float(softcap),
        T,
        V,
        H,
    )
    launch(token_logprobs_join_kernel, (T, 1, 1), token_logprobs_join_config(tiles), out, parts, tokens, T, V, tiles)
    return out
