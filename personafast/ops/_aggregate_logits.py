"""aggregate_logits: the token-level target of several policies, with the support mask that keeps it grammatical."""

from __future__ import annotations

import math

import torch

from personafast.ops import _backend
from personafast.ops._aggregator import Aggregator, check_members, check_rule_shapes, poison, rules_in_use
from personafast.ops._library import FLOATS, check_dims, check_float, check_no_grad, check_shape, fail, register

_OP = "aggregate_logits"

_KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# A geometric blend whose weights sum to 1 up to rounding leaves nothing of the reference: it is no member then.
REFERENCE_SHARE = 1e-6


def _validate(
    ref: torch.Tensor,
    policies: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    min_p: torch.Tensor,
) -> None:
    # Checked in line and explained only when something is wrong: with few rows the checks are a good part of the call.
    if torch.is_grad_enabled():
        check_no_grad(_OP, ref, policies, weights, carried)
    if ref.dim() != 2 or ref.dtype not in FLOATS:
        check_dims(_OP, "ref", ref, 2, "[B, V]")
        check_float(_OP, "ref", ref)
    batch, vocabulary = ref.shape
    if policies.dim() != 3 or policies.dtype not in FLOATS:
        check_float(_OP, "policies", policies)
        check_dims(_OP, "policies", policies, 3, "[N, B, V]")
    members = policies.shape[0]
    if policies.shape != (members, batch, vocabulary):
        check_shape(_OP, "policies", policies, (members, batch, vocabulary), "[N, B, V]")
    if (
        weights.dtype not in FLOATS
        or weights.shape != (batch, members)
        or (carried is not None and (carried.dtype not in FLOATS or carried.shape != (batch, members)))
    ):
        check_members(_OP, batch, members, weights, carried)
    if aggregator.dtype != torch.int32 or aggregator.shape != (batch,) or p.dtype not in FLOATS or p.shape != (batch,):
        check_rule_shapes(_OP, batch, aggregator, p)
    if min_p.dtype not in FLOATS or min_p.shape != (batch,):
        check_float(_OP, "min_p", min_p)
        check_shape(_OP, "min_p", min_p, (batch,), "[B]")


def _check_min_p(min_p: torch.Tensor) -> bool:
    """Whether some row may have a support mask; on a CPU values outside [0, 1] raise."""
    if min_p.device.type != "cpu":
        return True
    values = min_p.tolist()
    for row, value in enumerate(values):
        if not 0.0 <= value <= 1.0:
            fail(_OP, f"`min_p` of row {row} is {value:g}, expected 0 to 1")
    return any(values)


def _supported(logp: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    return logp >= logp.amax(-1, keepdim=True) + min_p.float().log()[..., None]


def reference(
    ref: torch.Tensor,
    policies: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    """The specification of `aggregate_logits` in plain torch, row by row."""
    rules_in_use(_OP, aggregator, weights)
    _check_min_p(min_p)
    out = torch.empty(ref.shape, dtype=torch.float32, device=ref.device)
    for row in range(ref.shape[0]):
        logp0 = ref[row].float().log_softmax(0)
        used = [i for i in range(policies.shape[0]) if weights[row, i] != 0]
        weight = weights[row, used].float()
        logps = [policies[i, row].float().log_softmax(0) for i in used]
        members, normalised = logps, True
        if not used:
            members, target = [logp0], logp0
        elif aggregator[row] == Aggregator.LINEAR:
            log_mix = weight.log() if carried is None else weight.log() + carried[row, used].float()
            if log_mix.logsumexp(0) > -math.inf:
                log_mix = log_mix - log_mix.logsumexp(0)
            target = (log_mix[:, None] + torch.stack(logps)).logsumexp(0)
        else:
            rest = 1 - weight.sum()
            factors = [(w, logp) for w, logp in zip(weight, logps, strict=True)]
            if rest.abs() > REFERENCE_SHARE:
                factors.append((rest, logp0))
            if rest > REFERENCE_SHARE:
                members = [*logps, logp0]
            target = torch.stack([factor * logp for factor, logp in factors]).sum(0)
            barred = torch.stack([logp == -math.inf for _, logp in factors]).any(0)
            target = torch.where(barred, -math.inf, target)
            normalised = len(factors) == 1 and bool(factors[0][0] == 1)
        if min_p[row] > 0:
            support = torch.stack([_supported(logp, min_p[row]) for logp in members]).any(0)
            # NaN is in no support, and stays, lest the row pass for an empty one.
            target, normalised = torch.where(support | target.isnan(), target, -math.inf), False
        if target.amax() == -math.inf:
            target, normalised = torch.where(_supported(logp0, min_p[row]), logp0, -math.inf), False
        out[row] = target if normalised else target - target.logsumexp(0)
    return poison(out, aggregator)


def _blend(logp0: torch.Tensor, logp: torch.Tensor, rest: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sum rest * logp0 + sum_i weight_i * logp_i, where 0 * (-inf) is 0 and an impossible token stays impossible."""

    def total(logp0: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
        result = rest[:, None] * logp0
        for i in range(logp.shape[0]):
            result.addcmul_(weight[i, :, None], logp[i])
        return result

    target = total(logp0, logp)
    if logp0.device.type == "cpu" and bool(target.isfinite().all()):
        return target
    barred = ((logp == -math.inf) & (weight != 0)[:, :, None]).any(0)
    barred |= (logp0 == -math.inf) & (rest != 0)[:, None]
    return torch.where(barred, -math.inf, total(_without_infinity(logp0), _without_infinity(logp)))


def _without_infinity(logp: torch.Tensor) -> torch.Tensor:
    return torch.where(logp == -math.inf, 0.0, logp)


def _mixture(logp: torch.Tensor, weight: torch.Tensor, carried: torch.Tensor | None) -> torch.Tensor:
    """Log of sum_i m_i pi_i, m_i proportional to weight_i exp(carried_i); -inf everywhere if every m_i is 0."""
    log_mix = weight.log()
    if carried is not None:
        log_mix = torch.where(weight == 0, -math.inf, log_mix + carried.float().T)
    total = log_mix.logsumexp(0)
    log_mix = torch.where(total == -math.inf, -math.inf, log_mix - total)
    return (log_mix[:, :, None] + logp).logsumexp(0)


def _vectorised(
    ref: torch.Tensor,
    policies: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    on_cpu = ref.device.type == "cpu"
    any_linear, any_geometric = rules_in_use(_OP, aggregator, weights)
    any_min_p = _check_min_p(min_p)
    if ref.numel() == 0:
        return ref.new_empty(ref.shape, dtype=torch.float32)
    logp0 = ref.float().log_softmax(-1)  # [B, V]
    logp = policies.float().log_softmax(-1)  # [N, B, V]
    weight = weights.float().T  # [N, B]
    absent = weight == 0
    rest = 1 - weight.sum(0)  # [B]
    rest = torch.where(rest.abs() <= REFERENCE_SHARE, 0.0, rest)
    # A row without weights is the geometric blend with nothing but the reference in it, whatever its rule.
    geometric = absent.all(0) | (aggregator == int(Aggregator.GEOMETRIC))
    any_geometric = any_geometric or not on_cpu or bool(geometric.any())

    if any_geometric:
        target = _blend(logp0, logp, rest, weight)
        if any_linear:
            target = torch.where(geometric[:, None], target, _mixture(logp, weight, carried))
    else:
        target = _mixture(logp, weight, carried)

    # One member at coefficient 1 is normalised already, and so is a mixture: there, no second rounding.
    alone = (~absent).sum(0) + (rest != 0) == 1
    normalised = ~geometric | (alone & ((rest == 1) | (weight == 1).any(0)))
    if any_min_p:
        floor = min_p.float().log()
        limit = torch.where(absent, math.inf, logp.amax(-1) + floor)  # [N, B]
        limit0 = torch.where(geometric & (rest > REFERENCE_SHARE), logp0.amax(-1) + floor, math.inf)
        support = (logp0 >= limit0[:, None]) | (logp >= limit[:, :, None]).any(0)
        whole = min_p == 0
        # NaN is in no support, and stays, lest the row pass for an empty one.
        target = torch.where(support | whole[:, None] | target.isnan(), target, -math.inf)
        normalised = normalised & whole
    norm = target.logsumexp(-1)
    empty = norm == -math.inf
    result = target - torch.where(normalised | empty, 0.0, norm)[:, None]
    if not on_cpu or bool(empty.any()):
        only = torch.where(_supported(logp0, min_p), logp0, -math.inf).log_softmax(-1)
        result = torch.where(empty[:, None], only, result)
    return poison(result, aggregator)


def _kernel_refuses(
    ref: torch.Tensor,
    policies: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    min_p: torch.Tensor,
) -> str | None:
    if ref.dtype not in _KERNEL_DTYPES or policies.dtype not in _KERNEL_DTYPES:
        return "dtype torch.float64"
    small = weights.is_cpu and aggregator.is_cpu and min_p.is_cpu and (carried is None or carried.is_cpu)
    if not (ref.is_cpu and policies.is_cpu and small):
        return "tensors of several devices"
    return None


def _cpp(
    ref: torch.Tensor,
    policies: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    if ref.dtype != policies.dtype:
        ref, policies = ref.float(), policies.float()
    if ref.stride(1) != 1:
        ref = ref.contiguous()
    if policies.stride(2) != 1:
        policies = policies.contiguous()
    weights, min_p, aggregator = weights.float().contiguous(), min_p.float().contiguous(), aggregator.contiguous()
    carried = None if carried is None else carried.float().contiguous()
    out = torch.empty(ref.shape, dtype=torch.float32)
    wrong = _backend.module("cpu").aggregate_logits(
        out.data_ptr(),
        ref.data_ptr(),
        ref.stride(0),
        policies.data_ptr(),
        policies.stride(0),
        policies.stride(1),
        weights.data_ptr(),
        0 if carried is None else carried.data_ptr(),
        aggregator.data_ptr(),
        min_p.data_ptr(),
        ref.shape[0],
        policies.shape[0],
        ref.shape[1],
        _KERNEL_DTYPES[ref.dtype],
        torch.get_num_threads(),
    )
    if wrong >= 0:
        rules_in_use(_OP, aggregator, weights)
        _check_min_p(min_p)
    return out


def _run(
    ref: torch.Tensor,
    policies: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    _validate(ref, policies, weights, carried, aggregator, p, min_p)
    backend = _backend.pick(_OP, ref.device.type)
    if backend == "cpu":
        why = _kernel_refuses(ref, policies, weights, carried, aggregator, min_p)
        if why is None:
            return _cpp(ref, policies, weights, carried, aggregator, min_p)
        _backend.refuse(_OP, why)
    form = reference if backend == "reference" else _vectorised
    return form(ref, policies, weights, carried, aggregator, p, min_p)


def _fake(
    ref: torch.Tensor,
    policies: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    _validate(ref, policies, weights, carried, aggregator, p, min_p)
    return ref.new_empty(ref.shape, dtype=torch.float32)


_op = register(
    "aggregate_logits(Tensor ref, Tensor policies, Tensor weights, Tensor? carried, Tensor aggregator, Tensor p,"
    " Tensor min_p) -> Tensor",
    _run,
    _fake,
    kernels=("cpu",),
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
    """Log probabilities of the token-level target of several policies (MOD, arXiv 2406.18853; MPG, arXiv 2511.01891).

    With pi_0 and pi_i the softmax of the reference's and of each policy's logits, in fp32:
    linear log sum_i w_i exp(carried_i) pi_i; geometric log pi_0 + sum_i w_i (log pi_i - log pi_0); both normalised.
    Then the support mask: a token stays iff its probability under at least one member is at least min_p times that
    member's largest; the others get -inf and the rest is normalised again. Members are the policies of non-zero
    weight, and the reference where the geometric rule leaves it a share, 1 - sum_i w_i > 1e-6, or where every weight
    is zero: the target is then the reference under both rules. At min_p = 0 one policy at weight 1 gives log_softmax
    of its logits, bit for bit in torch (the backend `reference`, and where no kernel runs), up to rounding in the C++
    kernel. A member of weight zero counts for nothing, infinite logits included; a token that
    another member, or a reference with a coefficient, excludes is excluded; a row that would be left without any
    token is the reference's.

    Args:
        ref: floating [B, V] raw logits.
        policies: floating [N, B, V] raw logits; N may be 0.
        weights: floating [B, N], not normalised; negative only under the geometric rule.
        carried: floating [B, N] log ratios of the text so far, or None for 0. The geometric rule does not depend on it.
        aggregator: int32 [B] of `Aggregator` codes.
        p: floating [B], the exponent of rules that have one; the linear and the geometric have none.
        min_p: floating [B] in [0, 1]; 0 keeps every token.

    Returns:
        float32 [B, V].

    Raises:
        PersonafastError: a shape or dtype does not fit, an input requires a gradient, or (on a CPU) a code is unknown,
            a weight negative under the linear rule, or min_p outside [0, 1]. On a GPU a row of the first two is NaN.
    """
    return _op(ref, policies, weights, carried, aggregator, p, min_p)
