"""aggregate_logits: the token-level target of several policies, with the support mask that keeps it grammatical."""

from __future__ import annotations

import math

import torch

from personafast.ops import _backend, _means
from personafast.ops._aggregator import Aggregator, check_members, check_rule_shapes, poison, rules_in_use
from personafast.ops._library import FLOATS, check_dims, check_float, check_no_grad, check_shape, fail, register

_OP = "aggregate_logits"

_KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# A geometric blend whose weights sum to 1 up to rounding leaves nothing of the reference: it is no member then.
REFERENCE_SHARE = 1e-6

# Policies whose logits of a block of tokens the Triton kernel keeps in registers.
MOST_MEMBERS = 32


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
    rules_in_use(_OP, aggregator, weights, p)
    _check_min_p(min_p)
    out = torch.empty(ref.shape, dtype=torch.float32, device=ref.device)
    for row in range(ref.shape[0]):
        rule = int(aggregator[row])
        logp0 = ref[row].float().log_softmax(0)
        weight = weights[row].float()
        used = [i for i in range(policies.shape[0]) if weight[i] != 0]
        weight = weight[used]
        logps = [policies[i, row].float().log_softmax(0) for i in used]
        members, normalised = logps, False
        if not used:
            members, target, normalised = [logp0], logp0, True
        elif rule == Aggregator.GEOMETRIC:
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
        else:
            share = weight / weight.abs().sum()
            offset = torch.zeros_like(share) if carried is None else carried[row, used].float()
            logs = torch.stack(logps)
            if rule == Aggregator.JENSEN_SHANNON:
                logs = logs + offset[:, None] - logp0
            else:
                # What all members have in common does not count.
                common = (share.abs().log() + offset).logsumexp(0)
                logs = logs + torch.where(common == -math.inf, -math.inf, offset - common)[:, None]
                normalised = len(used) == 1 or (rule == Aggregator.LINEAR and bool((weight > 0).all()))
            target = _means.join(
                logs[:, None], share[:, None, None], aggregator[row : row + 1], p[row : row + 1], {rule}
            )[0]
            if rule == Aggregator.JENSEN_SHANNON:
                target = torch.where(logp0 == -math.inf, -math.inf, logp0 + target)
            if rule == Aggregator.LINEAR:
                members = [logp for w, logp in zip(weight, logps, strict=True) if w > 0]
        if min_p[row] > 0:
            support = torch.zeros_like(target, dtype=torch.bool)
            for logp in members:
                support |= logp >= logp.amax() + min_p[row].float().log()
            # NaN is in no support, and stays, lest the row pass for an empty one.
            target, normalised = torch.where(support | target.isnan(), target, -math.inf), False
        if not normalised and target.amax() != -math.inf:
            target = target - target.logsumexp(0)
        out[row] = target
    return poison(out, aggregator, weights, p)


def _blend(logp0: torch.Tensor, logp: torch.Tensor, rest: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Sum rest * logp0 + sum_i weight_i * logp_i, where 0 * x is 0 for every x and an impossible token stays so."""

    def total(logp0: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
        result = rest[:, None] * logp0
        for i in range(logp.shape[0]):
            result.addcmul_(weight[i, :, None], logp[i])
        return result

    target = total(logp0, logp)
    if logp0.device.type == "cpu" and bool(target.isfinite().all()):
        return target
    used0, used = (rest != 0)[:, None], (weight != 0)[:, :, None]
    impossible0, impossible = logp0 == -math.inf, logp == -math.inf
    target = total(
        torch.where(used0 & ~impossible0, logp0, 0.0),
        torch.where(used & ~impossible, logp, 0.0),
    )
    return torch.where((used & impossible).any(0) | (used0 & impossible0), -math.inf, target)


def _join(
    logp0: torch.Tensor,
    logp: torch.Tensor,
    weight: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    rules: frozenset[int],
) -> torch.Tensor:
    """Target [B, V] of the rules whose weights [N, B] are normalised, up to its own normalisation."""
    share = _means.normalised(weight)
    jensen_shannon = (aggregator == int(Aggregator.JENSEN_SHANNON))[:, None]
    offset = torch.zeros_like(weight) if carried is None else torch.where(weight == 0, -math.inf, carried.float().T)
    # What all members have in common does not count, except beside the reference.
    common = (share.abs().log() + offset).logsumexp(0)
    shifted = torch.where(common == -math.inf, -math.inf, offset - common)
    if int(Aggregator.JENSEN_SHANNON) not in rules:
        return _means.join(logp + shifted[:, :, None], share[:, :, None], aggregator, p, rules)
    # After a token that the reference excludes there is no ratio: such a token is excluded.
    excluded = logp0 == -math.inf
    base = torch.where(jensen_shannon & ~excluded, logp0, 0.0)
    logs = logp + torch.where(jensen_shannon[:, 0], offset, shifted)[:, :, None] - base
    joined = _means.join(logs, share[:, :, None], aggregator, p, rules)
    return torch.where(jensen_shannon & excluded, -math.inf, joined + base)


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
    rules = rules_in_use(_OP, aggregator, weights, p)
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
    if rules == {int(Aggregator.GEOMETRIC)}:
        target = _blend(logp0, logp, rest, weight)
    else:
        target = _join(logp0, logp, weight, carried, aggregator, p, rules)
        if not on_cpu or bool(geometric.any()):
            target = torch.where(geometric[:, None], _blend(logp0, logp, rest, weight), target)

    # One member at coefficient 1 is normalised already, and so is a mixture: there, no second rounding.
    alone = (~absent).sum(0) + (geometric & (rest != 0)) == 1
    whole = alone & (aggregator != int(Aggregator.JENSEN_SHANNON)) & (weight >= 0).all(0)
    mixture = (aggregator == int(Aggregator.LINEAR)) & (weight >= 0).all(0)
    normalised = torch.where(geometric, alone & ((rest == 1) | (weight == 1).any(0)), whole | mixture)
    if any_min_p:
        floor = min_p.float().log()
        closed = absent | ((weight < 0) & (aggregator == int(Aggregator.LINEAR)))
        limit = torch.where(closed, math.inf, logp.amax(-1) + floor)  # [N, B]
        limit0 = torch.where(geometric & (rest > REFERENCE_SHARE), logp0.amax(-1) + floor, math.inf)
        support = (logp0 >= limit0[:, None]) | (logp >= limit[:, :, None]).any(0)
        unmasked = min_p == 0
        # NaN is in no support, and stays, lest the row pass for an empty one.
        target = torch.where(support | unmasked[:, None] | target.isnan(), target, -math.inf)
        normalised = normalised & unmasked
    norm = target.logsumexp(-1)
    target = target - torch.where(normalised | (norm == -math.inf), 0.0, norm)[:, None]
    return poison(target, aggregator, weights, p)


def _kernel_refuses(
    ref: torch.Tensor,
    policies: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    min_p: torch.Tensor,
) -> str | None:
    if ref.dtype not in _KERNEL_DTYPES or policies.dtype not in _KERNEL_DTYPES:
        return "dtype torch.float64"
    small = weights.is_cpu and aggregator.is_cpu and p.is_cpu and min_p.is_cpu and (carried is None or carried.is_cpu)
    if not (ref.is_cpu and policies.is_cpu and small):
        # A GPU's, or of several devices.
        device = ref.device
        others = (policies, weights, aggregator, p, min_p, ref if carried is None else carried)
        if any(tensor.device != device for tensor in others):
            return "tensors of several devices"
    return None


def _cpp(
    ref: torch.Tensor,
    policies: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    min_p: torch.Tensor,
) -> torch.Tensor:
    if ref.dtype != policies.dtype:
        ref, policies = ref.float(), policies.float()
    if ref.stride(1) != 1:
        ref = ref.contiguous()
    if policies.stride(2) != 1:
        policies = policies.contiguous()
    weights, p, min_p = weights.float().contiguous(), p.float().contiguous(), min_p.float().contiguous()
    aggregator = aggregator.contiguous()
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
        p.data_ptr(),
        min_p.data_ptr(),
        ref.shape[0],
        policies.shape[0],
        ref.shape[1],
        _KERNEL_DTYPES[ref.dtype],
        torch.get_num_threads(),
    )
    if wrong >= 0:
        rules_in_use(_OP, aggregator, weights, p)
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
        why = _kernel_refuses(ref, policies, weights, carried, aggregator, p, min_p)
        if why is None:
            return _cpp(ref, policies, weights, carried, aggregator, p, min_p)
        _backend.refuse(_OP, why)
    elif backend == "triton":
        kernels = _backend.module("triton")
        why = _kernel_refuses(ref, policies, weights, carried, aggregator, p, min_p)
        if why is None and policies.shape[0] > MOST_MEMBERS:
            why = f"more than {MOST_MEMBERS} policies"
        if why is None:
            rules_in_use(_OP, aggregator, weights, p)
            _check_min_p(min_p)
            return kernels.aggregate_logits(ref, policies, weights, carried, aggregator, p, min_p)
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
    kernels=("cpu", "triton"),
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

    With pi_0 and pi_i the softmax of the reference's and of each policy's logits, in fp32, c_i = carried_i or 0 and
    r_i = pi_i / pi_0, over the members w_i != 0, before normalisation:

    - LINEAR (sum_i w_i e^c_i pi_i)+, where members of negative weight take away; less than 1e-5 of what they are
      taken from counts as 0, since it is rounding.
    - GEOMETRIC pi_0 prod_i r_i^w_i; the c_i do not count.
    - POWER (sum_i w_i (e^c_i pi_i)^p)^(1/p). A token that a member excludes is excluded where p <= 0 and adds nothing
      where p > 0. p = 0 (|p| < 1e-9) is prod_i pi_i^(w_i / sum w); p = -1 is the harmonic mean.
    - JENSEN_SHANNON pi_0 s / (1 - s), log s = sum_i (w_i / sum w) log sigmoid(c_i + log r_i).
    - MIN and MAX the least and the greatest e^c_i pi_i.

    Then the support mask: a token stays iff its probability under at least one member is at least min_p times that
    member's largest; the others get -inf and the rest is normalised again. Members are the policies of non-zero
    weight, under the linear rule those of positive weight; and the reference where the geometric rule leaves it a
    share, 1 - sum_i w_i > 1e-6, or where every weight is zero: the target is then the reference under every rule. A
    member of weight zero counts for nothing, infinite logits included. At min_p = 0 one policy at weight 1 gives
    log_softmax of its logits, bit for bit in torch (the backend `reference`, and where no kernel runs) and up to
    rounding under JENSEN_SHANNON and in the kernels.

    On a GPU three launches of Triton serve up to 32 policies.

    A row of which no token is left, for want of a token that all members allow or because the mask closes every
    one, is -inf everywhere: such a target has no support, and nothing takes its place.

    Args:
        ref: floating [B, V] raw logits.
        policies: floating [N, B, V] raw logits; N may be 0.
        weights: floating [B, N], not normalised; negative only under the linear and the geometric rule.
        carried: floating [B, N] log ratios of the text so far, or None for 0.
        aggregator: int32 [B] of `Aggregator` codes.
        p: floating [B], the exponent of POWER; the other rules have none.
        min_p: floating [B] in [0, 1]; 0 keeps every token.

    Returns:
        float32 [B, V].

    Raises:
        PersonafastError: a shape or dtype does not fit, an input requires a gradient, or (on a CPU) a code is unknown,
            a weight negative where its rule allows none, the exponent of a POWER row not finite, or min_p outside
            [0, 1]. On a GPU a row of the first three is NaN.
    """
    return _op(ref, policies, weights, carried, aggregator, p, min_p)
