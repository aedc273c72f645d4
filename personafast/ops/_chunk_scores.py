"""chunk_scores: how much better the policies like every prefix of a proposed chunk than the reference does."""

from __future__ import annotations

import math

import torch

from personafast.ops import _backend
from personafast.ops._aggregator import Aggregator, check_members, check_rule_shapes, poison, rules_in_use
from personafast.ops._library import FLOATS, check_dims, check_float, check_no_grad, check_shape, register

_OP = "chunk_scores"


def _validate(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> None:
    # Checked in line and explained only when something is wrong: the checks are a good part of a call this small.
    if torch.is_grad_enabled():
        check_no_grad(_OP, ref_logp, policy_logp, weights, carried)
    if ref_logp.dim() != 2 or policy_logp.dim() != 3:
        check_dims(_OP, "ref_logp", ref_logp, 2, "[B, k]")
        check_dims(_OP, "policy_logp", policy_logp, 3, "[N, B, k]")
    if ref_logp.dtype not in FLOATS or policy_logp.dtype not in FLOATS:
        check_float(_OP, "ref_logp", ref_logp)
        check_float(_OP, "policy_logp", policy_logp)
    batch, chunk = ref_logp.shape
    members = policy_logp.shape[0]
    if policy_logp.shape != (members, batch, chunk):
        check_shape(_OP, "policy_logp", policy_logp, (members, batch, chunk), "[N, B, k]")
    if (
        weights.dtype not in FLOATS
        or weights.shape != (batch, members)
        or (carried is not None and (carried.dtype not in FLOATS or carried.shape != (batch, members)))
    ):
        check_members(_OP, batch, members, weights, carried)
    if aggregator.dtype != torch.int32 or aggregator.shape != (batch,) or p.dtype not in FLOATS or p.shape != (batch,):
        check_rule_shapes(_OP, batch, aggregator, p)


def reference(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> torch.Tensor:
    """The specification of `chunk_scores` in plain torch, row by row, all in the log domain."""
    rules_in_use(_OP, aggregator, weights)
    scores = torch.zeros(ref_logp.shape, dtype=torch.float32, device=ref_logp.device)
    for row in range(ref_logp.shape[0]):
        ref = ref_logp[row].float()
        members = [i for i in range(policy_logp.shape[0]) if weights[row, i] != 0]
        terms = []
        for i in members:
            steps = torch.where(ref == -math.inf, -math.inf, policy_logp[i, row].float() - ref)
            ratio = steps.cumsum(0) if carried is None else carried[row, i].float() + steps.cumsum(0)
            weight = weights[row, i].float()
            if aggregator[row] == Aggregator.LINEAR:
                terms.append(weight.log() + ratio)
            else:
                terms.append(torch.where(ratio == -math.inf, -math.inf, weight * ratio))
        if terms:
            stacked = torch.stack(terms)
            if aggregator[row] == Aggregator.LINEAR:
                scores[row] = stacked.logsumexp(0)
            else:
                scores[row] = torch.where((stacked == -math.inf).any(0), -math.inf, stacked.sum(0))
        scores[row].masked_fill_((ref == -math.inf).cumsum(0) > 0, -math.inf)
    return poison(scores, aggregator)


def _vectorised(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> torch.Tensor:
    linear, geometric = rules_in_use(_OP, aggregator, weights)
    ref = ref_logp.float()
    barred = ref == -math.inf
    weight = weights.float().T[:, :, None]  # [N, B, 1]
    ratio = torch.where(barred, -math.inf, policy_logp.float() - ref).cumsum(2)  # [N, B, k]
    if carried is not None:
        ratio = ratio + carried.float().T[:, :, None]
    scores = None
    if linear:
        plain = (weights == 0).all(1)[:, None]
        # logsumexp of nothing is -inf, but a row that no policy shapes has the reference for its target: log 1.
        scores = torch.where(plain, 0.0, torch.where(weight == 0, -math.inf, weight.log() + ratio).logsumexp(0))
    if geometric:
        impossible = ((ratio == -math.inf) & (weight != 0)).any(0)
        terms = torch.where((weight == 0) | impossible, 0.0, weight * ratio)
        blend = torch.where(impossible, -math.inf, terms.sum(0))
        if scores is None:
            scores = blend
        else:
            scores = torch.where(aggregator[:, None] == int(Aggregator.GEOMETRIC), blend, scores)
    if scores is None:
        return ref.new_empty(ref.shape)
    return poison(torch.where(barred.cumsum(1) > 0, -math.inf, scores), aggregator)


def _cpp(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
) -> torch.Tensor:
    ref = ref_logp.float().contiguous()
    policies = policy_logp.float().contiguous()
    weights = weights.float().contiguous()
    aggregator = aggregator.contiguous()
    if carried is not None:
        carried = carried.float().contiguous()
    scores = torch.empty_like(ref)
    batch, chunk = ref.shape
    members = policies.shape[0]
    wrong = _backend.module("cpu").chunk_scores(
        scores.data_ptr(),
        ref.data_ptr(),
        policies.data_ptr(),
        weights.data_ptr(),
        0 if carried is None else carried.data_ptr(),
        aggregator.data_ptr(),
        batch,
        members,
        chunk,
    )
    if wrong >= 0:
        rules_in_use(_OP, aggregator, weights)
    return scores


def _run(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> torch.Tensor:
    _validate(ref_logp, policy_logp, weights, carried, aggregator, p)
    backend = _backend.pick(_OP, ref_logp.device.type)
    if backend == "cpu":
        small = weights.is_cpu and aggregator.is_cpu and (carried is None or carried.is_cpu)
        if ref_logp.is_cpu and policy_logp.is_cpu and small:
            return _cpp(ref_logp, policy_logp, weights, carried, aggregator)
        _backend.refuse(_OP, "tensors of several devices")
    form = reference if backend == "reference" else _vectorised
    return form(ref_logp, policy_logp, weights, carried, aggregator, p)


def _fake(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> torch.Tensor:
    _validate(ref_logp, policy_logp, weights, carried, aggregator, p)
    return ref_logp.new_empty(ref_logp.shape, dtype=torch.float32)


_op = register(
    "chunk_scores(Tensor ref_logp, Tensor policy_logp, Tensor weights, Tensor? carried, Tensor aggregator, Tensor p)"
    " -> Tensor",
    _run,
    _fake,
    kernels=("cpu",),
)


def chunk_scores(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> torch.Tensor:
    """Log of the aggregated density ratio of every prefix of a chunk (MPG, arXiv 2511.01891, section 3).

    With L[i, b, j] = carried[b, i] + sum over j' <= j of (policy_logp[i, b, j'] - ref_logp[b, j']):
    linear S[b, j] = logsumexp_i(log w[b, i] + L[i, b, j]); geometric S[b, j] = sum_i w[b, i] L[i, b, j].
    A weight of zero leaves its member out, and without members S = 0, the reference itself. A token that a member
    cannot produce makes that member's L -inf from there on, and a geometric S with it; after a token that the
    reference cannot propose S is -inf. No NaN comes out unless one goes in.

    Args:
        ref_logp: floating [B, k], the reference's log probability of each token.
        policy_logp: floating [N, B, k], each policy's; N may be 0.
        weights: floating [B, N], not normalised; negative only under the geometric rule.
        carried: floating [B, N] log ratios of the text before the chunk, or None for 0.
        aggregator: int32 [B] of `Aggregator` codes.
        p: floating [B], the exponent of rules that have one; the linear and the geometric have none.

    Returns:
        float32 [B, k].

    Raises:
        PersonafastError: a shape or dtype does not fit, an input requires a gradient, or (on a CPU) a code is unknown
            or a weight negative under the linear rule. On a GPU such a row is NaN.
    """
    return _op(ref_logp, policy_logp, weights, carried, aggregator, p)
