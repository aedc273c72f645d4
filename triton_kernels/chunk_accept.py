"""chunk_accept: the longest prefix of a chunk that rejection sampling lets stand.

A program a row. A few hundred numbers in all: what it costs is its launch, which `chunk_scores_accept` saves.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from personafast._triton.launch import Config, launch, next_power_of_2


@triton.jit
def accepted_prefix(b_scores, b_bound, b_u, length, o_k, m_k):
    """The largest count o_k + 1 <= length with u < score - bound, or 0.

    Compared in float64 if one of the three is, else in float32; a comparison with NaN rejects.
    """
    if (b_scores.dtype == tl.float64) | (b_bound.dtype == tl.float64) | (b_u.dtype == tl.float64):
        m_stands = b_u.to(tl.float64) < b_scores.to(tl.float64) - b_bound.to(tl.float64)
    else:
        m_stands = b_u.to(tl.float32) < b_scores.to(tl.float32) - b_bound.to(tl.float32)
    return tl.max(tl.where(m_k & m_stands & (o_k < length), o_k + 1, 0), 0)


@triton.jit(do_not_specialize=["k"])
def chunk_accept_kernel(
    p_accepted,
    p_scores,
    p_bound,
    p_u,
    p_lengths,
    s_scores_b,
    s_scores_k,
    s_bound_b,
    s_bound_k,
    s_u_b,
    s_u_k,
    k,
    K: tl.constexpr,
):
    """One row of k scores; K is a power of two not below k."""
    i_b = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, K)
    m_k = o_k < k
    b_scores = tl.load(p_scores + i_b * s_scores_b + o_k * s_scores_k, mask=m_k, other=0.0)
    b_bound = tl.load(p_bound + i_b * s_bound_b + o_k * s_bound_k, mask=m_k, other=0.0)
    b_u = tl.load(p_u + i_b * s_u_b + o_k * s_u_k, mask=m_k, other=0.0)
    length = tl.load(p_lengths + i_b)
    tl.store(p_accepted + i_b, accepted_prefix(b_scores, b_bound, b_u, length, o_k, m_k))


@functools.cache
def chunk_accept_config(k: int) -> Config:
    """A thread a token, up to four warps; `k` is a power of two."""
    return Config({"K": k}, num_warps=max(1, min(4, k // 32)))


def chunk_accept(
    scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Launch `chunk_accept_kernel`; arguments as `personafast.ops.chunk_accept`, which has checked them, has them."""
    B, k = scores.shape
    accepted = torch.empty_like(lengths, memory_format=torch.contiguous_format)
    launch(
        chunk_accept_kernel,
        (B, 1, 1),
        chunk_accept_config(next_power_of_2(max(2, k))),
        accepted,
        scores,
        log_bound,
        log_u,
        lengths.contiguous(),
        *scores.stride(),
        *log_bound.stride(),
        *log_u.stride(),
        k,
    )
    return accepted
