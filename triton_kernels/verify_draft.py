"""verify_draft: how many drafted tokens stand, and the one token after them, drawn exactly from the target.

Two launches. The first cuts the vocabulary: each of its programs decides the row anew from the k gathered log
probabilities, which takes less than another launch would, and adds up one block of the residual (c q - p)+ and of q.
Token by token that is the one place where the draft breaks off. As a block it is every place that can still be the
outcome: none before a place that stands for certain (c = 1, or the whole draft), and none whose uniform is beyond
9/8 c, since h <= c where the target's probabilities sum to 1. The second launch, a program a row, adds the blocks up in
their order, settles the outcome, and draws by choosing first the block and then the token in it.

Traffic: 2 V log probabilities for each place that is looked at, V where the whole draft stands. Sums are float32 within
a block and float64 across blocks; log c is kept in float64, and uniforms are compared in float64.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from personafast._triton.launch import Config, cdiv, device_of, launch, next_power_of_2
from personafast._triton.philox import uniform

# Streams of `philox`, as `personafast.ops._verify_draft` has them.
_SAMPLE = tl.constexpr(0)
_ACCEPT = tl.constexpr(2)

# By how much the probabilities of a target may exceed 1 in sum: log probabilities of 16 bits stay well below.
_SLACK = tl.constexpr(1.125)


@triton.jit
def _greater(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _log_ratios(p_target, p_draft, p_tokens, s_target_t, s_target_v, s_draft_t, s_draft_v, k, V, K: tl.constexpr):
    """log q(x) - log p(x) of a row's k drafted tokens, float64 and finite: -1e30 for a token that cannot stand.

    What lies beyond the row's length is loaded too, to be left out later: the loads do not wait for the length.
    """
    o_k = tl.arange(0, K)
    m_k = o_k < k
    b_token = tl.load(p_tokens + o_k, mask=m_k, other=0)
    b_token = tl.where(b_token < 0, 0, tl.where(b_token < V, b_token, V - 1))
    o_place = o_k.to(tl.int64)
    b_q = tl.load(p_target + o_place * s_target_t + b_token * s_target_v, mask=m_k, other=0.0).to(tl.float64)
    b_ratio = b_q
    if p_draft is not None:
        b_p = tl.load(p_draft + o_place * s_draft_t + b_token * s_draft_v, mask=m_k, other=0.0)
        b_ratio = b_q - b_p.to(tl.float64)
    # Not a number compares false. Beyond 745 exp overflows or is zero whatever c was before.
    return tl.where((b_ratio > -1e30) & (b_q > float("-inf")), tl.where(b_ratio < 745.0, b_ratio, 745.0), -1e30)


@triton.jit
def _weights(p_target, p_draft, token, scale, o_v, m_v, s_target_v, s_draft_v):
    """(scale q - p)+ and q of a block of tokens, float32; what is not a number stays so."""
    b_log_q = tl.load(p_target + o_v * s_target_v, mask=m_v, other=float("-inf"))
    if p_draft is not None:
        # All is on its way before the first exponential.
        b_log_p = tl.load(p_draft + o_v * s_draft_v, mask=m_v, other=float("-inf"))
        b_q = tl.exp(b_log_q.to(tl.float32))
        b_rest = scale * b_q - tl.exp(b_log_p.to(tl.float32))
        b_rest = tl.where(b_rest < 0.0, 0.0, b_rest)
    else:
        b_q = tl.exp(b_log_q.to(tl.float32))
        b_rest = tl.where(o_v == token, 0.0, scale * b_q)
    return b_rest, b_q


@triton.jit
def _store_masses(
    p_sums,
    p_target,
    p_draft,
    p_tokens,
    s_target_t,
    s_target_v,
    s_draft_t,
    s_draft_v,
    place,
    length,
    scale,
    i_v,
    n_blocks,
    V,
    BLOCK: tl.constexpr,
):
    """The sums of a block at one place of a row: of (scale q - p)+, if a drafted token is there, and of q."""
    o_v = i_v.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_v = o_v < V
    i_place = tl.cast(place, tl.int64)
    p_row = p_target + i_place * s_target_t
    if place < length:
        token = tl.load(p_tokens + i_place)
        token = tl.where(token < 0, 0, tl.where(token < V, token, V - 1))
        p_beside = None
        if p_draft is not None:
            p_beside = p_draft + i_place * s_draft_t
        b_rest, b_q = _weights(p_row, p_beside, token, scale, o_v, m_v, s_target_v, s_draft_v)
        tl.store(p_sums + i_v, tl.sum(b_rest, 0))
    else:
        b_q = tl.exp(tl.load(p_row + o_v * s_target_v, mask=m_v, other=float("-inf")).to(tl.float32))
    tl.store(p_sums + n_blocks + i_v, tl.sum(b_q, 0))


@triton.jit(do_not_specialize=["k"])
def verify_draft_masses_kernel(
    p_masses,
    p_scales,
    p_accepted,
    p_target,
    p_draft,
    p_tokens,
    p_lengths,
    p_seeds,
    p_positions,
    s_target_b,
    s_target_t,
    s_target_v,
    s_draft_b,
    s_draft_t,
    s_draft_v,
    s_tokens_b,
    n_blocks,
    k,
    V,
    WHOLE: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of one block of the vocabulary; masses [B, places, 2, n_blocks], scales [B, k + 1].

    Token by token there is one place; as a block the programs along the second axis take the places in turn. Those of
    the first block write what they have decided, for the second launch to follow: `accepted` token by token, as a block
    c of every place, or -1 where it cannot be the outcome.
    """
    i_b = (tl.program_id(0) // n_blocks).to(tl.int64)
    i_v = tl.program_id(0) % n_blocks
    p_target += i_b * s_target_b
    p_tokens += i_b * s_tokens_b
    if p_draft is not None:
        p_draft += i_b * s_draft_b
    length = tl.load(p_lengths + i_b)
    length = tl.where(length < 0, 0, tl.where(length < k, length, k))

    o_k = tl.arange(0, K)
    b_log = _log_ratios(p_target, p_draft, p_tokens, s_target_t, s_target_v, s_draft_t, s_draft_v, k, V, K)
    b_u = uniform(tl.load(p_seeds + i_b), tl.load(p_positions + i_b), _ACCEPT, o_k)
    if WHOLE:
        # log c_j = S_j - max(0, S_1, ..., S_j) of the sums S of log ratios.
        b_sum = tl.cumsum(b_log, 0)
        b_top = tl.associative_scan(b_sum, 0, _greater)
        b_scale = tl.exp((b_sum - tl.where(b_top > 0.0, b_top, 0.0)).to(tl.float32))
        b_wide = b_scale.to(tl.float64)
        m_last = (o_k == length - 1) & (b_u < b_wide)
        certain = tl.max(tl.where((o_k < length) & ((b_scale == 1.0) | m_last), o_k + 1, 0), 0)
        m_open = (o_k + 1 > certain) & (o_k + 1 < length) & (b_u < _SLACK * b_wide)
        b_scale = tl.where(m_open | (o_k + 1 == certain), b_scale, -1.0)
        for place in range(tl.program_id(1), k + 1, tl.num_programs(1)):
            scale = tl.max(tl.where(o_k + 1 == place, b_scale, -1.0), 0)
            scale = tl.where((place == 0) & (certain == 0), 1.0, scale)
            if i_v == 0:
                tl.store(p_scales + i_b * (k + 1) + place, scale)
            if scale >= 0.0:
                p_sums = p_masses + (i_b * (k + 1) + place) * 2 * n_blocks
                _store_masses(
                    p_sums,
                    p_target,
                    p_draft,
                    p_tokens,
                    s_target_t,
                    s_target_v,
                    s_draft_t,
                    s_draft_v,
                    place,
                    length,
                    scale,
                    i_v,
                    n_blocks,
                    V,
                    BLOCK,
                )
    else:
        m_falls = (o_k < length) & (b_u >= tl.exp(b_log.to(tl.float32)).to(tl.float64))
        place = tl.min(tl.where(m_falls, o_k, length), 0)
        if i_v == 0:
            tl.store(p_accepted + i_b, place)
        _store_masses(
            p_masses + i_b * 2 * n_blocks,
            p_target,
            p_draft,
            p_tokens,
            s_target_t,
            s_target_v,
            s_draft_t,
            s_draft_v,
            place,
            length,
            1.0,
            i_v,
            n_blocks,
            V,
            BLOCK,
        )


@triton.jit
def _first_above(b_weight, b_index, goal, SIZE: tl.constexpr):
    """The first index of any weight at which the sum exceeds `goal`, or the last of any weight; SIZE without weight."""
    b_sum = tl.cumsum(b_weight, 0)
    first = tl.min(tl.where((b_sum > goal) & (b_weight > 0.0), b_index, SIZE), 0)
    last = tl.max(tl.where(b_weight > 0.0, b_index, -1), 0)
    last = tl.where(last < 0, SIZE, last)
    return tl.where(first < SIZE, first, last)


@triton.jit(do_not_specialize=["k"])
def verify_draft_draw_kernel(
    p_out,
    p_accepted,
    p_masses,
    p_scales,
    p_target,
    p_draft,
    p_tokens,
    p_lengths,
    p_seeds,
    p_positions,
    s_target_b,
    s_target_t,
    s_target_v,
    s_draft_b,
    s_draft_t,
    s_draft_v,
    s_tokens_b,
    n_blocks,
    k,
    V,
    WHOLE: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One row: the outcome, the draw, and out [B, k + 1]; K is a power of two above k, BLOCKS not below n_blocks."""
    i_b = tl.program_id(0).to(tl.int64)
    length = tl.load(p_lengths + i_b)
    length = tl.where(length < 0, 0, tl.where(length < k, length, k))
    seed = tl.load(p_seeds + i_b)
    position = tl.load(p_positions + i_b)
    o_k = tl.arange(0, K)
    o_n = tl.arange(0, BLOCKS)
    m_n = o_n < n_blocks
    if WHOLE:
        p_masses += i_b * (k + 1) * 2 * n_blocks
        b_scale = tl.load(p_scales + i_b * (k + 1) + o_k, mask=o_k <= k, other=-1.0).to(tl.float64)
        # Places that cannot be the outcome were not written; they are loaded so that nothing waits for what could.
        m_tile = (o_k <= k)[:, None] & m_n[None, :]
        b_mass = tl.load(p_masses + o_k[:, None] * 2 * n_blocks + o_n[None, :], mask=m_tile, other=0.0)
        b_mass = tl.sum(b_mass.to(tl.float64), 1)
        # The uniform of place j is that of the token before it.
        b_u = uniform(seed, position, _ACCEPT, tl.where(o_k > 0, o_k - 1, 0))
        m_stands = (o_k == 0) | (o_k == length) | (b_scale == 1.0) | (b_u < b_mass / (b_mass + 1.0 - b_scale))
        kept = tl.max(tl.where((b_scale >= 0.0) & m_stands, o_k, 0), 0)
        scale = tl.load(p_scales + i_b * (k + 1) + kept)
        p_masses += kept * 2 * n_blocks
        tl.store(p_accepted + i_b, kept)
    else:
        kept = tl.load(p_accepted + i_b)
        scale = 1.0
        p_masses += i_b * 2 * n_blocks

    # What rests of a place behind the draft was not written.
    whole = kept == length
    b_q = tl.load(p_masses + n_blocks + o_n, mask=m_n, other=0.0).to(tl.float64)
    b_rest = tl.where(whole, 0.0, tl.load(p_masses + o_n, mask=m_n, other=0.0).to(tl.float64))
    # Nothing is left where target and draft agree up to rounding.
    whole = whole | (tl.sum(b_rest, 0) == 0.0)
    b_part = tl.where(whole, b_q, b_rest)
    total = tl.sum(b_part, 0)
    # A block of one number, since the rounds are made for blocks.
    b_u = uniform(seed, position + kept, _SAMPLE, tl.arange(0, 1))
    goal = tl.sum(b_u, 0) * total
    i_v = _first_above(b_part, o_n, goal, BLOCKS)
    goal -= tl.sum(tl.where(o_n < i_v, b_part, 0.0), 0)

    o_block = tl.arange(0, BLOCK)
    o_v = i_v.to(tl.int64) * BLOCK + o_block
    m_v = o_v < V
    p_row = p_target + i_b * s_target_b + kept.to(tl.int64) * s_target_t
    if whole:
        b_weight = tl.exp(tl.load(p_row + o_v * s_target_v, mask=m_v, other=float("-inf")).to(tl.float32))
    else:
        token = tl.load(p_tokens + i_b * s_tokens_b + kept)
        token = tl.where(token < 0, 0, tl.where(token < V, token, V - 1))
        p_beside = None
        if p_draft is not None:
            p_beside = p_draft + i_b * s_draft_b + kept.to(tl.int64) * s_draft_t
        b_weight, _ = _weights(p_row, p_beside, token, scale, o_v, m_v, s_target_v, s_draft_v)
    found = _first_above(b_weight.to(tl.float64), o_block, goal, BLOCK)
    drawn = tl.where((total > 0.0) & (total < float("inf")), i_v.to(tl.int64) * BLOCK + found, -1)

    b_out = tl.load(p_tokens + i_b * s_tokens_b + o_k, mask=o_k < kept, other=-1)
    b_out = tl.where(o_k == kept, drawn, b_out)
    tl.store(p_out + i_b * (k + 1) + o_k, b_out, mask=o_k <= k)


@functools.cache
def verify_draft_config(V: int, places: int, whole: bool) -> tuple[Config, Config]:
    """How both kernels are compiled; `places`, k + 1, is rounded up to a power of two.

    The blocks depend on the vocabulary alone, so that a row's sums have one order in any batch. They are as large as
    registers allow: what a program decides before it sums costs about as much as 2048 tokens.
    """
    block = min(4096, max(32, next_power_of_2(V)))
    shared = {"WHOLE": whole, "K": max(2, places), "BLOCK": block}
    blocks = max(2, next_power_of_2(cdiv(V, block)))
    draw = Config({**shared, "BLOCKS": blocks}, num_warps=max(1, min(8, block // 256)))
    return Config(shared, num_warps=max(1, min(4, block // 256))), draw


def verify_draft(
    target_logp: torch.Tensor,
    draft_logp: torch.Tensor | None,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    block: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the two kernels; arguments as `personafast.ops.verify_draft`, which has checked them, has them."""
    B, k = tokens.shape
    V = target_logp.shape[2]
    out = tokens.new_empty((B, k + 1))
    accepted = torch.empty(B, dtype=torch.int32, device=tokens.device)
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    lengths, seeds, positions = lengths.contiguous(), seeds.contiguous(), positions.contiguous()
    config, draw = verify_draft_config(V, next_power_of_2(k + 1), block)
    n_blocks = cdiv(V, config.constants["BLOCK"])
    masses = torch.empty((B, k + 1 if block else 1, 2, n_blocks), dtype=torch.float32, device=tokens.device)
    scales = torch.empty((B, k + 1), dtype=torch.float32, device=tokens.device) if block else None
    # Few rows have their places side by side; with many, programs that find nothing to do would cost more.
    resident = 8 * device_of(tokens).multiprocessors
    abreast = min(k + 1, max(1, resident // max(1, B * n_blocks))) if block else 1
    inputs = target_logp, draft_logp, tokens, lengths, seeds, positions
    of_draft = (0, 0, 0) if draft_logp is None else draft_logp.stride()
    sizes = *target_logp.stride(), *of_draft, tokens.stride(0), n_blocks, k, V
    grid = (B * n_blocks, abreast, 1)
    launch(verify_draft_masses_kernel, grid, config, masses, scales, accepted, *inputs, *sizes)
    launch(verify_draft_draw_kernel, (B, 1, 1), draw, out, accepted, masses, scales, *inputs, *sizes)
    return out, accepted
