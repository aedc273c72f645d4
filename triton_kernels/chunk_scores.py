"""chunk_scores: the log of the aggregated density ratio of every prefix; and with it, in one launch, what is accepted.

A program takes a row: the [N, k] log ratios of its members lie in registers, are cumulated in float64 and joined in
float32 under the row's own rule, one branch of six. A few hundred numbers a row: what it costs is its launch, so
`chunk_scores_accept` compares the scores with their bounds before they have left the registers.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from personafast._triton.chunk_accept import accepted_prefix
from personafast._triton.launch import Config, launch, next_power_of_2
from personafast._triton.means import GEOMETRIC, LINEAR, POWER, SMALLEST_EXPONENT, at_fault, join, product

# Weights whose sum is this close to 1 sum to 1, as in `personafast.ops._chunk_scores`.
_WHOLE = tl.constexpr(1e-6)


@triton.jit
def _scale(size, rule, p):
    """What the log of the row's mean owes to the size of its weights, where the mean is of weights that sum to 1."""
    m_power = (rule == POWER) & (tl.abs(p) >= SMALLEST_EXPONENT) & (tl.abs(size - 1.0) > _WHOLE)
    exponent = tl.where(m_power, p, 1.0)
    return tl.where(m_power | (rule == LINEAR), tl.log(size) / exponent, 0.0)


@triton.jit(do_not_specialize=["n_members", "k"])
def chunk_scores_kernel(
    p_scores,
    p_accepted,
    p_ref,
    p_policy,
    p_weights,
    p_carried,
    p_rule,
    p_exponent,
    p_bound,
    p_u,
    p_lengths,
    s_ref_b,
    s_ref_k,
    s_policy_n,
    s_policy_b,
    s_policy_k,
    s_weights_b,
    s_weights_n,
    s_carried_b,
    s_carried_n,
    s_bound_b,
    s_bound_k,
    s_u_b,
    s_u_k,
    n_members,
    k,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """One row: scores [B, k], and accepted [B] unless that is None. N and K are powers of two, not below the sizes."""
    i_b = tl.program_id(0).to(tl.int64)
    o_n = tl.arange(0, N)
    o_k = tl.arange(0, K)
    m_n = o_n < n_members
    m_k = o_k < k
    if p_accepted is not None:
        # Loaded before anything waits for the rest.
        b_bound = tl.load(p_bound + i_b * s_bound_b + o_k * s_bound_k, mask=m_k, other=0.0)
        b_u = tl.load(p_u + i_b * s_u_b + o_k * s_u_k, mask=m_k, other=0.0)
        length = tl.load(p_lengths + i_b)
    rule = tl.load(p_rule + i_b)
    exponent = tl.load(p_exponent + i_b).to(tl.float32)
    b_given = tl.load(p_weights + i_b * s_weights_b + o_n * s_weights_n, mask=m_n, other=0.0)[:, None]
    b_weight = b_given.to(tl.float32)

    b_ref = tl.load(p_ref + i_b * s_ref_b + o_k * s_ref_k, mask=m_k, other=0.0).to(tl.float32)
    m_barred = b_ref == float("-inf")
    o_policy = o_n.to(tl.int64)[:, None] * s_policy_n + o_k[None, :] * s_policy_k
    b_policy = tl.load(p_policy + i_b * s_policy_b + o_policy, mask=m_n[:, None] & m_k[None, :], other=0.0)
    b_step = b_policy.to(tl.float32).to(tl.float64) - b_ref.to(tl.float64)[None, :]
    b_ratio = tl.cumsum(tl.where(m_barred[None, :], float("-inf"), b_step), 1)
    if p_carried is not None:
        b_carried = tl.load(p_carried + i_b * s_carried_b + o_n * s_carried_n, mask=m_n, other=0.0)
        b_ratio += b_carried.to(tl.float32).to(tl.float64)[:, None]
    b_ratio = b_ratio.to(tl.float32)

    size = tl.sum(tl.sum(tl.abs(b_weight), 1), 0)
    if size == 0.0:
        # A row that no policy shapes has the reference for its target: log 1.
        b_scores = tl.zeros([K], tl.float32)
    elif rule == GEOMETRIC:
        b_scores = product(b_ratio, b_weight)
    else:
        b_scores = join(b_ratio, b_weight / size, rule, exponent) + _scale(size, rule, exponent)
    b_scores = tl.where(tl.cumsum(m_barred.to(tl.int32), 0) > 0, float("-inf"), b_scores)
    if at_fault(rule, b_given, exponent):
        b_scores = tl.full([K], float("nan"), tl.float32)
    tl.store(p_scores + i_b * k + o_k, b_scores, mask=m_k)
    if p_accepted is not None:
        tl.store(p_accepted + i_b, accepted_prefix(b_scores, b_bound, b_u, length, o_k, m_k))


@functools.cache
def chunk_scores_config(members: int, k: int) -> Config:
    """One warp for 256 log ratios, up to eight; `members` and `k` are powers of two.

    Products and sums stay apart: what is joined is as in plain torch.
    """
    return Config({"N": members, "K": k}, num_warps=max(1, min(8, members * k // 256)), enable_fp_fusion=False)


def chunk_scores(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> torch.Tensor:
    """Launch `chunk_scores_kernel` for the scores; arguments as those of `personafast.ops.chunk_scores`."""
    return _launch(ref_logp, policy_logp, weights, carried, aggregator, p, None, None, None)[0]


def chunk_scores_accept(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    log_bound: torch.Tensor,
    log_u: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch `chunk_scores_kernel` for both; arguments as those of `personafast.ops.chunk_scores_accept`."""
    scores, accepted = _launch(ref_logp, policy_logp, weights, carried, aggregator, p, log_bound, log_u, lengths)
    assert accepted is not None
    return scores, accepted


def _launch(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    log_bound: torch.Tensor | None,
    log_u: torch.Tensor | None,
    lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    N, B, k = policy_logp.shape
    scores = torch.empty((B, k), dtype=torch.float32, device=ref_logp.device)
    accepted = None if lengths is None else torch.empty(B, dtype=torch.int32, device=ref_logp.device)
    config = chunk_scores_config(next_power_of_2(max(2, N)), next_power_of_2(max(2, k)))
    launch(
        chunk_scores_kernel,
        (B, 1, 1),
        config,
        scores,
        accepted,
        ref_logp,
        policy_logp,
        weights,
        carried,
        aggregator.contiguous(),
        p.contiguous(),
        log_bound,
        log_u,
        None if lengths is None else lengths.contiguous(),
        *ref_logp.stride(),
        *policy_logp.stride(),
        *weights.stride(),
        *((0, 0) if carried is None else carried.stride()),
        *((0, 0) if log_bound is None else log_bound.stride()),
        *((0, 0) if log_u is None else log_u.stride()),
        N,
        k,
    )
    return scores, accepted
