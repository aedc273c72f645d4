"""aggregate_logits: several policies' logits joined into the log probabilities of one target.

Three launches, whatever the rules, the policies and the rows. The first leaves maximum and sum of exponentials of every
chunk of every member, one member a program, so that a single row of a batch fills the GPU. The second joins those of
its row, takes the logits of all members for one block of tokens, applies the row's rule and its support mask, and
leaves maximum and sum of its targets; the third subtracts what they amount to. Each row follows a rule of its own: all
branch on it alike. Logits of members of weight zero, and of a reference that a rule has no use for, are not read.

The floor is (N + 2) B V elements. Logits are read twice and targets written twice and read once, but up to 50 MB of
them all but the first time from the L2 cache. What is summed over blocks is summed in their order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from personafast._triton.launch import Config, cdiv, launch, next_power_of_2
from personafast._triton.means import GEOMETRIC, JENSEN_SHANNON, LINEAR, at_fault, join, product

# As in `personafast.ops._aggregate_logits`.
REFERENCE_SHARE = tl.constexpr(1e-6)


@triton.jit
def log_sum(b_max, b_sum):
    """(largest of the maxima, or 0 where it is -inf; log of the sum of e^(x - it)) over the last axis."""
    axis: tl.constexpr = len(b_max.shape) - 1
    b_top = tl.max(b_max, axis, keep_dims=True)
    b_top = tl.where(b_top == -float("inf"), 0.0, b_top)
    b_total = tl.sum(b_sum * tl.exp(b_max - b_top), axis, keep_dims=True)
    return b_top, tl.log(b_total)


@triton.jit
def partial_sum(b_x):
    """(maximum, sum of e^(x - maximum)) of a block; 0 where all is -inf, and NaN is in the sum."""
    b_max = tl.max(b_x, 0)
    return b_max, tl.sum(tl.exp(b_x - tl.where(b_max == -float("inf"), 0.0, b_max)), 0)


@triton.jit
def members_of(p_weights, s_weights_b, s_weights_n, b_rule, i_b, N, MEMBERS: tl.constexpr):
    """(weights, whether the blend is geometric, what it leaves of the reference, whether the reference is read).

    A row without weights is the geometric blend with nothing but the reference in it, whatever its rule.
    """
    o_n = tl.arange(0, MEMBERS)
    b_weight = tl.load(p_weights + i_b * s_weights_b + o_n * s_weights_n, mask=o_n < N, other=0.0).to(tl.float32)
    b_rest = 1.0 - tl.sum(b_weight, 0)
    b_rest = tl.where(tl.abs(b_rest) <= REFERENCE_SHARE, 0.0, b_rest)
    m_geometric = (tl.sum((b_weight != 0).to(tl.int32), 0) == 0) | (b_rule == GEOMETRIC)
    m_reference = (m_geometric & (b_rest != 0)) | (b_rule == JENSEN_SHANNON)
    return b_weight, m_geometric, b_rest, m_reference


@triton.jit
def aggregate_logits_weigh_kernel(
    p_parts,
    p_ref,
    p_policies,
    p_weights,
    p_aggregator,
    s_ref,
    s_policies_n,
    s_policies_b,
    s_weights_b,
    s_weights_n,
    N,
    V,
    MEMBERS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Maximum and sum of one chunk of one member, the reference last, to `p_parts` [B, N + 1, 2, chunks]."""
    i_c = tl.program_id(0)
    i_n = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    o_v = i_c * CHUNK + tl.arange(0, CHUNK)
    b_weight, m_geometric, b_rest, m_reference = members_of(
        p_weights, s_weights_b, s_weights_n, tl.load(p_aggregator + i_b), i_b, N, MEMBERS
    )
    if i_n < N:
        m_used = tl.sum(tl.where(tl.arange(0, MEMBERS) == i_n, (b_weight != 0).to(tl.int32), 0), 0) > 0
        p_row = p_policies + i_n.to(tl.int64) * s_policies_n + i_b * s_policies_b
        b_x = tl.load(p_row + o_v, mask=o_v < tl.where(m_used, V, 0), other=-float("inf")).to(tl.float32)
    else:
        n_v = tl.where(m_reference, V, 0)
        b_x = tl.load(p_ref + i_b * s_ref + o_v, mask=o_v < n_v, other=-float("inf")).to(tl.float32)
    b_max, b_sum = partial_sum(b_x)
    n_chunks = tl.num_programs(0)
    p_part = p_parts + (i_b * (N + 1) + i_n) * 2 * n_chunks + i_c
    tl.store(p_part, b_max)
    tl.store(p_part + n_chunks, b_sum)


@triton.jit
def aggregate_logits_join_kernel(
    p_out,
    p_norms,
    p_parts,
    p_ref,
    p_policies,
    p_weights,
    p_carried,
    p_aggregator,
    p_p,
    p_min_p,
    s_ref,
    s_policies_n,
    s_policies_b,
    s_weights_b,
    s_weights_n,
    s_carried_b,
    s_carried_n,
    N,
    V,
    n_chunks,
    MEMBERS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Target of one block of one row, up to its norm, whose partial sums go to `p_norms` [B, 2, blocks]."""
    i_v = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    o_v = i_v * BLOCK + tl.arange(0, BLOCK)
    o_n = tl.arange(0, MEMBERS)
    m_v = o_v < V
    b_rule = tl.load(p_aggregator + i_b)
    b_p = tl.load(p_p + i_b).to(tl.float32)
    b_min_p = tl.load(p_min_p + i_b).to(tl.float32)
    b_weight, m_geometric, b_rest, m_reference = members_of(
        p_weights, s_weights_b, s_weights_n, b_rule, i_b, N, MEMBERS
    )
    m_used = b_weight != 0
    b_given = tl.load(p_weights + i_b * s_weights_b + o_n * s_weights_n, mask=o_n < N, other=0.0)
    m_fault = at_fault(b_rule, b_given, b_p)

    # The logits, less each member's maximum; then less the log of its sum of exponentials.
    p_rows = p_policies + o_n.to(tl.int64) * s_policies_n + i_b * s_policies_b
    m_rows = m_used[:, None] & m_v[None, :]
    b_x = tl.load(p_rows[:, None] + o_v[None, :], mask=m_rows, other=-float("inf")).to(tl.float32)
    n_v = tl.where(m_reference, V, 0)
    b_x0 = tl.load(p_ref + i_b * s_ref + o_v, mask=o_v < n_v, other=-float("inf")).to(tl.float32)
    o_c = tl.arange(0, CHUNKS)
    m_c = o_c < n_chunks
    p_part = p_parts + i_b * (N + 1) * 2 * n_chunks + o_c
    p_part0 = p_part + N * 2 * n_chunks
    b_top, b_size = tl.zeros([MEMBERS], tl.float32), tl.zeros([MEMBERS], tl.float32)
    for i_n in tl.static_range(MEMBERS):
        m_n = o_c < tl.where(i_n < N, n_chunks, 0)
        p_n = p_part + i_n * 2 * n_chunks
        b_top_n, b_size_n = log_sum(
            tl.load(p_n, mask=m_n, other=-float("inf")), tl.load(p_n + n_chunks, mask=m_n, other=0.0)
        )
        b_top = tl.where(o_n == i_n, b_top_n, b_top)
        b_size = tl.where(o_n == i_n, b_size_n, b_size)
    b_top0, b_size0 = log_sum(
        tl.load(p_part0, mask=m_c, other=-float("inf")), tl.load(p_part0 + n_chunks, mask=m_c, other=0.0)
    )
    b_x = b_x - b_top[:, None]
    b_x0 = b_x0 - b_top0
    # The support, first: the differences themselves are not needed after it.
    m_masked = ~(b_min_p == 0)
    m_kept = m_v
    if m_masked:
        b_floor = tl.log(b_min_p)
        m_open = m_used & ((b_weight > 0) | (b_rule != LINEAR))
        m_kept = tl.max((m_open[:, None] & (b_x >= b_floor)).to(tl.int32), 0) > 0
        if m_geometric & (b_rest > REFERENCE_SHARE):
            m_kept = m_kept | (b_x0 >= b_floor)
    b_logp = b_x - b_size[:, None]
    b_logp0 = b_x0 - b_size0

    if m_geometric:
        b_target = product(b_logp, b_weight[:, None])
        if b_rest != 0:
            b_target = tl.where(b_logp0 == -float("inf"), -float("inf"), b_target + b_rest * b_logp0)
    else:
        b_share = b_weight / tl.sum(tl.abs(b_weight), 0)
        b_offset = tl.where(m_used, 0.0, -float("inf"))
        if p_carried is not None:
            b_carried = tl.load(p_carried + i_b * s_carried_b + o_n * s_carried_n, mask=m_used, other=-float("inf"))
            b_offset = b_carried.to(tl.float32)
        # What all members have in common does not count, except beside the reference.
        b_terms = tl.where(m_used, tl.log(tl.where(m_used, tl.abs(b_share), 1.0)) + b_offset, -float("inf"))
        b_most = tl.max(b_terms, 0)
        b_most = tl.where(tl.abs(b_most) < float("inf"), b_most, 0.0)
        b_common = b_most + tl.log(tl.sum(tl.exp(b_terms - b_most), 0))
        b_shift = tl.where(b_common == -float("inf"), -float("inf"), b_offset - b_common)
        b_base = tl.zeros([BLOCK], dtype=tl.float32)
        if b_rule == JENSEN_SHANNON:
            b_base = b_logp0
            b_shift = b_offset
        # After a token that the reference excludes there is no ratio: such a token is excluded.
        m_excluded = b_base == -float("inf")
        b_base = tl.where(m_excluded, 0.0, b_base)
        b_logs = b_logp + b_shift[:, None] - b_base[None, :]
        b_target = tl.where(m_excluded, -float("inf"), join(b_logs, b_share[:, None], b_rule, b_p) + b_base)

    # NaN is in no support, and stays, lest the row pass for an empty one.
    b_target = tl.where(m_kept | (b_target != b_target), b_target, -float("inf"))
    b_target = tl.where(m_fault, float("nan"), b_target)
    tl.store(p_out + i_b * V + o_v, b_target, mask=m_v)

    # One member at coefficient 1 is normalised already, and so is a mixture: their sums are made those of the norm 1.
    n_used = tl.sum(m_used.to(tl.int32), 0)
    m_signs = tl.sum((b_weight < 0).to(tl.int32), 0) == 0
    m_one = (b_rest == 1) | (tl.sum((b_weight == 1).to(tl.int32), 0) > 0)
    m_product = (n_used + (b_rest != 0).to(tl.int32) == 1) & m_one
    m_mean = m_signs & ((b_rule == LINEAR) | ((n_used == 1) & (b_rule != JENSEN_SHANNON)))
    m_normalised = ((m_geometric & m_product) | ((not m_geometric) & m_mean)) & (not m_masked)
    b_max, b_sum = partial_sum(tl.where(m_v, b_target, -float("inf")))
    b_max = tl.where(m_normalised, tl.where(i_v == 0, 0.0, -float("inf")), b_max)
    b_sum = tl.where(m_normalised, tl.where(i_v == 0, 1.0, 0.0), b_sum)
    n_blocks = tl.num_programs(0)
    tl.store(p_norms + i_b * 2 * n_blocks + i_v, b_max)
    tl.store(p_norms + (i_b * 2 + 1) * n_blocks + i_v, b_sum)


@triton.jit
def aggregate_logits_shift_kernel(p_out, p_norms, V, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """Subtracts the row's norm from one block of targets, unless there is nothing to subtract."""
    i_v = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    n_blocks = tl.num_programs(0)
    o_b = tl.arange(0, BLOCKS)
    m_b = o_b < n_blocks
    p_norm = p_norms + i_b * 2 * n_blocks + o_b
    b_top, b_size = log_sum(
        tl.load(p_norm, mask=m_b, other=-float("inf")), tl.load(p_norm + n_blocks, mask=m_b, other=0.0)
    )
    b_norm = tl.sum(b_top + b_size, 0)
    # A row of which nothing is left stays so.
    if (b_norm != 0) & (b_norm != -float("inf")):
        o_v = i_v * BLOCK + tl.arange(0, BLOCK)
        m_v = o_v < V
        p_row = p_out + i_b * V + o_v
        tl.store(p_row, tl.load(p_row, mask=m_v, other=0.0) - b_norm, mask=m_v)


@functools.cache
def aggregate_logits_configs(N: int, V: int) -> tuple[Config, Config, Config]:
    """Those of the three launches; a program's logits are at most 8192, and 16-byte loads of a row cover its block."""
    members = next_power_of_2(max(1, N))
    chunk = 4096
    block = 1024 if members <= 8 else 8192 // members
    chunks = next_power_of_2(cdiv(V, chunk))
    blocks = next_power_of_2(cdiv(V, block))
    return (
        Config({"MEMBERS": members, "CHUNK": chunk}, num_warps=8, enable_fp_fusion=True),
        Config(
            {"MEMBERS": members, "CHUNKS": chunks, "BLOCK": block},
            num_warps=4 if members <= 8 else 8,
            enable_fp_fusion=True,
        ),
        Config({"BLOCKS": blocks, "BLOCK": block}, num_warps=4, enable_fp_fusion=True),
    )


def aggregate_logits(
    ref: torch.Tensor,
    policies: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """Launch the three kernels; the arguments are those of `personafast.ops.aggregate_logits`, which has checked them.

    Tokens must be adjacent for the wide loads, so other layouts go through a copy. A program holds the logits of all
    policies, so they cannot be many.
    """
    B, V = ref.shape
    N = policies.shape[0]
    out = torch.empty((B, V), dtype=torch.float32, device=ref.device)
    if out.numel() == 0:
        return out
    ref = ref if ref.stride(1) == 1 else ref.contiguous()
    policies = policies if policies.stride(2) == 1 else policies.contiguous()
    aggregator, p, min_p = aggregator.contiguous(), p.contiguous(), min_p.contiguous()
    weigh, join_, shift = aggregate_logits_configs(N, V)
    chunks, blocks = cdiv(V, weigh.constants["CHUNK"]), cdiv(V, join_.constants["BLOCK"])
    sums = torch.empty(2 * B * ((N + 1) * chunks + blocks), dtype=torch.float32, device=ref.device)
    parts, norms = sums[: 2 * B * (N + 1) * chunks], sums[2 * B * (N + 1) * chunks :]
    strides = (ref.stride(0), policies.stride(0), policies.stride(1), weights.stride(0), weights.stride(1))
    launch(
        aggregate_logits_weigh_kernel,
        (chunks, N + 1, B),
        weigh,
        parts,
        ref,
        policies,
        weights,
        aggregator,
        *strides,
        N,
        V,
    )
    launch(
        aggregate_logits_join_kernel,
        (blocks, B, 1),
        join_,
        out,
        norms,
        parts,
        ref,
        policies,
        weights,
        carried,
        aggregator,
        p,
        min_p,
        *strides,
        0 if carried is None else carried.stride(0),
        0 if carried is None else carried.stride(1),
        N,
        V,
        chunks,
    )
    launch(aggregate_logits_shift_kernel, (blocks, B, 1), shift, out, norms, V)
    return out
