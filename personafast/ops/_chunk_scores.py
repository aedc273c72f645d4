"""chunk_scores: how much better the policies like every prefix of a proposed chunk than the reference does."""

from __future__ import annotations

import math

import torch

from personafast.ops import _backend, _cuda, _means
from personafast.ops._aggregator import Aggregator, check_members, check_rule_shapes, poison, rules_in_use
from personafast.ops._chunk_accept import CUDA_LIMIT, LIMIT, cuda_refuses
from personafast.ops._library import (
    FLOATS,
    check_devices,
    check_dims,
    check_float,
    check_no_grad,
    check_shape,
    register,
)

_OP = "chunk_scores"

# Weights that sum to 1 up to their rounding sum to 1: an exponent near 0 would make much of the rest.
WHOLE = 1e-6

# Of so many policies the CUDA kernels keep the log ratios of 32 tokens in the shared memory of any GPU.
_CUDA_MEMBERS = 256


def validate(
    op: str,
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> None:
    """What `op`, which is `chunk_scores` or has it for its beginning, asks of these arguments."""
    # Checked in line and explained only when something is wrong: the checks are a good part of a call this small.
    if torch.is_grad_enabled():
        check_no_grad(op, ref_logp, policy_logp, weights, carried)
    if ref_logp.dim() != 2 or policy_logp.dim() != 3:
        check_dims(op, "ref_logp", ref_logp, 2, "[B, k]")
        check_dims(op, "policy_logp", policy_logp, 3, "[N, B, k]")
    if ref_logp.dtype not in FLOATS or policy_logp.dtype not in FLOATS:
        check_float(op, "ref_logp", ref_logp)
        check_float(op, "policy_logp", policy_logp)
    batch, chunk = ref_logp.shape
    members = policy_logp.shape[0]
    if policy_logp.shape != (members, batch, chunk):
        check_shape(op, "policy_logp", policy_logp, (members, batch, chunk), "[N, B, k]")
    if (
        weights.dtype not in FLOATS
        or weights.shape != (batch, members)
        or (carried is not None and (carried.dtype not in FLOATS or carried.shape != (batch, members)))
    ):
        check_members(op, batch, members, weights, carried)
    if aggregator.dtype != torch.int32 or aggregator.shape != (batch,) or p.dtype not in FLOATS or p.shape != (batch,):
        check_rule_shapes(op, batch, aggregator, p)


def reference(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> torch.Tensor:
    """The specification of `chunk_scores` in plain torch, row by row, all in the log domain."""
    rules_in_use(_OP, aggregator, weights, p)
    scores = torch.zeros(ref_logp.shape, dtype=torch.float32, device=ref_logp.device)
    for row in range(ref_logp.shape[0]):
        ref = ref_logp[row].float()
        rule, weight = int(aggregator[row]), weights[row].float()
        members = [i for i in range(policy_logp.shape[0]) if weight[i] != 0]
        ratios = []
        for i in members:
            steps = torch.where(ref == -math.inf, -math.inf, policy_logp[i, row].float() - ref)
            ratios.append(steps.cumsum(0) if carried is None else carried[row, i].float() + steps.cumsum(0))
        if ratios:
            stacked, weight = torch.stack(ratios), weight[members][:, None]
            if rule == Aggregator.GEOMETRIC:
                impossible = (stacked == -math.inf).any(0)
                scores[row] = torch.where(impossible, -math.inf, (weight * stacked).sum(0))
            else:
                size = weight.abs().sum()
                one = slice(row, row + 1)
                scores[row] = _means.join(stacked[:, None], (weight / size)[:, None], aggregator[one], p[one], {rule})
                scores[row] += _scale(size[None], aggregator[one], p[one])
        scores[row].masked_fill_((ref == -math.inf).cumsum(0) > 0, -math.inf)
    return poison(scores, aggregator, weights, p)


def _scale(size: torch.Tensor, aggregator: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """What the log of a row's mean [B] owes to the size of its weights; the means are of weights that sum to 1."""
    linear, power = aggregator == int(Aggregator.LINEAR), aggregator == int(Aggregator.POWER)
    exponent = torch.where(linear, 1.0, p.float())
    power = power & (exponent.abs() >= _means.SMALLEST_EXPONENT) & ((size - 1).abs() > WHOLE)
    return torch.where(linear | power, size.log() / torch.where(linear | power, exponent, 1.0), 0.0)


def _vectorised(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> torch.Tensor:
    rules = rules_in_use(_OP, aggregator, weights, p)
    ref = ref_logp.float()
    barred = ref == -math.inf
    weight = weights.float().T[:, :, None]  # [N, B, 1]
    ratio = torch.where(barred, -math.inf, policy_logp.float() - ref).cumsum(2)  # [N, B, k]
    if carried is not None:
        ratio = ratio + carried.float().T[:, :, None]
    scores = torch.zeros_like(ref)
    if rules != {int(Aggregator.GEOMETRIC)}:
        joined = _means.join(ratio, _means.normalised(weight), aggregator, p, rules)
        scores = joined + _scale(weights.float().abs().sum(1), aggregator, p)[:, None]
    if int(Aggregator.GEOMETRIC) in rules:
        impossible = ((ratio == -math.inf) & (weight != 0)).any(0)
        terms = torch.where((weight == 0) | impossible, 0.0, weight * ratio)
        blend = torch.where(impossible, -math.inf, terms.sum(0))
        scores = torch.where((aggregator == int(Aggregator.GEOMETRIC))[:, None], blend, scores)
    # A row that no policy shapes has the reference for its target: log 1.
    scores = torch.where((weights == 0).all(1)[:, None], 0.0, scores)
    return poison(torch.where(barred.cumsum(1) > 0, -math.inf, scores), aggregator, weights, p)


def _cpp(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> torch.Tensor:
    ref = ref_logp.float().contiguous()
    policies = policy_logp.float().contiguous()
    weights = weights.float().contiguous()
    aggregator, p = aggregator.contiguous(), p.float().contiguous()
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
        p.data_ptr(),
        batch,
        members,
        chunk,
    )
    if wrong >= 0:
        rules_in_use(_OP, aggregator, weights, p)
    return scores


def on_cuda_refuses(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> str | None:
    """Why the CUDA kernel cannot take these tensors, all of one device; None if it can."""
    if policy_logp.shape[0] > _CUDA_MEMBERS:
        return f"more than {_CUDA_MEMBERS} policies"
    return cuda_refuses(ref_logp, policy_logp, weights, carried, aggregator, p)


def _on_cuda(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> torch.Tensor:
    scores = torch.empty_like(ref_logp)
    _cuda.launch(
        "chunk_scores_cuda",
        scores.get_device(),
        scores.data_ptr(),
        ref_logp.data_ptr(),
        policy_logp.data_ptr(),
        weights.data_ptr(),
        0 if carried is None else carried.data_ptr(),
        aggregator.data_ptr(),
        p.data_ptr(),
        scores.shape[0],
        policy_logp.shape[0],
        scores.shape[1],
    )
    return scores


def run(
    op: str,
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> torch.Tensor:
    """`chunk_scores` of valid arguments, on the backend that is picked for `op`."""
    size = policy_logp.shape[0] * policy_logp.shape[2]
    backend = _backend.pick(op, ref_logp.device.type, size)
    if backend == "cpu":
        small = weights.is_cpu and aggregator.is_cpu and p.is_cpu and (carried is None or carried.is_cpu)
        if ref_logp.is_cpu and policy_logp.is_cpu and small:
            return _cpp(ref_logp, policy_logp, weights, carried, aggregator, p)
        _backend.refuse(op, "tensors of several devices")
    elif backend in ("triton", "cuda"):
        others = {"policy_logp": policy_logp, "weights": weights, "carried": carried}
        check_devices(op, ref_logp.device, **others, aggregator=aggregator, p=p)
        rules_in_use(op, aggregator, weights, p)
        if backend == "cuda":
            why = on_cuda_refuses(ref_logp, policy_logp, weights, carried, aggregator, p)
            if why is None:
                return _on_cuda(ref_logp, policy_logp, weights, carried, aggregator, p)
            backend = _backend.instead(op, ref_logp.device.type, backend, why, size)
        if backend == "triton":
            return _backend.module("triton").chunk_scores(ref_logp, policy_logp, weights, carried, aggregator, p)
    form = reference if backend == "reference" else _vectorised
    return form(ref_logp, policy_logp, weights, carried, aggregator, p)


def _run(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> torch.Tensor:
    validate(_OP, ref_logp, policy_logp, weights, carried, aggregator, p)
    return run(_OP, ref_logp, policy_logp, weights, carried, aggregator, p)


def _fake(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
) -> torch.Tensor:
    validate(_OP, ref_logp, policy_logp, weights, carried, aggregator, p)
    return ref_logp.new_empty(ref_logp.shape, dtype=torch.float32)


_op = register(
    "chunk_scores(Tensor ref_logp, Tensor policy_logp, Tensor weights, Tensor? carried, Tensor aggregator, Tensor p)"
    " -> Tensor",
    _run,
    _fake,
    kernels=("cpu", "triton", "cuda"),
    limits={"triton": LIMIT, "cuda": CUDA_LIMIT},
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

    With L[i, b, j] = carried[b, i] + sum over j' <= j of (policy_logp[i, b, j'] - ref_logp[b, j']), S[b, j] is the log
    of the members' joint ratio, and exp L_i the ratio r_i of one:

    - LINEAR (sum_i w_i r_i)+, where less than 1e-5 of what negative weights take away from counts as 0.
    - GEOMETRIC prod_i r_i^w_i.
    - POWER (sum_i w_i r_i^p)^(1/p), and prod_i r_i^(w_i / sum w) at p = 0 (|p| < 1e-9); a sum of weights within 1e-6
      of 1 is 1.
    - JENSEN_SHANNON s / (1 - s), log s = sum_i (w_i / sum w) log sigmoid(L_i).
    - MIN and MAX the least and the greatest r_i.

    A weight of zero leaves its member out, and without members S = 0, the reference itself. A token that a member
    cannot produce makes that member's L -inf from there on, and S with it under every rule but LINEAR, MAX and POWER
    with p > 0, where it adds nothing; after a token that the reference cannot propose S is -inf. No NaN comes out
    unless one goes in. On a GPU one launch, which `chunk_scores_accept` makes of this and `chunk_accept` together.

    Args:
        ref_logp: floating [B, k], the reference's log probability of each token.
        policy_logp: floating [N, B, k], each policy's; N may be 0.
        weights: floating [B, N], not normalised; negative only under the linear and the geometric rule.
        carried: floating [B, N] log ratios of the text before the chunk, or None for 0.
        aggregator: int32 [B] of `Aggregator` codes.
        p: floating [B], the exponent of POWER; the other rules have none.

    Returns:
        float32 [B, k].

    Raises:
        PersonafastError: a shape or dtype does not fit, an input requires a gradient, or (on a CPU) a code is unknown,
            a weight negative where its rule allows none, or the exponent of a POWER row not finite. On a GPU a row of
            the last three is NaN.
    """
    return _op(ref_logp, policy_logp, weights, carried, aggregator, p)
