"""aggregate_logits on a GPU."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import torch

from benchmarks.case import Contender, Inputs, nbytes
from benchmarks.gpu.case import GpuCase, GpuDraw, Specimen, meta
from personafast import ops

VOCABULARY, POLICIES, MIN_P = 128256, 4, 0.05


def _target(rows: int, members: int, vocabulary: int, rule: ops.Aggregator) -> GpuCase:
    """Next-token logits as the head wrote them, joined for a sampler."""
    # The mask cuts where two logits differ by log min_p; with the linear rule, nothing is cut.
    min_p = MIN_P if rule == ops.Aggregator.GEOMETRIC else 0.0

    def make(draw: GpuDraw) -> Inputs:
        return SimpleNamespace(
            ref=draw.normal(rows, vocabulary, scale=2.0),
            policies=draw.normal(members, rows, vocabulary, scale=2.0),
            weights=0.2 + draw.uniform(rows, members),
            carried=draw.normal(rows, members, dtype=torch.float32),
            aggregator=torch.full((rows,), int(rule), dtype=torch.int32, device=draw.device),
            p=torch.zeros(rows, device=draw.device),
            min_p=torch.full((rows,), min_p, device=draw.device),
        )

    def plain(inputs: Inputs) -> torch.Tensor:
        wide = torch.float64 if inputs.ref.dtype == torch.float64 else torch.float32
        ref, policies = inputs.ref.to(wide), inputs.policies.to(wide)
        reference, logp = ref.log_softmax(-1), policies.log_softmax(-1)
        weight = inputs.weights.to(wide).T[..., None]
        if rule == ops.Aggregator.LINEAR:
            mix = (weight.log() + inputs.carried.to(wide).T[..., None]).log_softmax(0)
            return (mix + logp).logsumexp(0)
        rest = 1 - weight.sum(0)
        target = (weight * logp).sum(0) + rest * reference
        floor = math.log(MIN_P)
        support = (policies - policies.amax(-1, keepdim=True) >= floor).any(0)
        # The reference is a member only where the weights leave it a share.
        support |= (ref - ref.amax(-1, keepdim=True) >= floor) & (rest > 0)
        return torch.where(support, target, -math.inf).log_softmax(-1)

    def arguments(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        i = inputs
        return i.ref, i.policies, i.weights, i.carried, i.aggregator, i.p, i.min_p

    def vectorised(inputs: Inputs) -> torch.Tensor:
        return importlib.import_module("personafast.ops._aggregate_logits")._vectorised(*arguments(inputs))

    def traffic(inputs: Inputs) -> int:
        return nbytes(inputs.policies) + nbytes(inputs.ref) * (rule != ops.Aggregator.LINEAR) + 4 * inputs.ref.numel()

    return GpuCase(
        name=f"aggregate_logits-{rule.name.lower()}-rows{rows}-policies{members}-{vocabulary}",
        operator="aggregate_logits",
        shape={"B": rows, "N": members, "V": vocabulary},
        make=make,
        plain=plain,
        ours=Contender("ours", lambda i: ops.aggregate_logits(*arguments(i)), traffic),
        baselines=(
            Contender("the operator's vectorised torch form", vectorised, traffic),
            Contender("this rule alone in torch", plain, traffic),
        ),
        launches=3,
    )


def cases(tiny: bool = False) -> tuple[GpuCase, ...]:
    rules = ops.Aggregator.GEOMETRIC, ops.Aggregator.LINEAR
    if tiny:
        return tuple(_target(2, 2, 70, rule) for rule in rules)
    return tuple(_target(rows, POLICIES, VOCABULARY, rule) for rule in rules for rows in (1, 8, 64))


def _specimen(
    rows: int,
    members: int,
    dtype: torch.dtype,
    vocabulary: int = VOCABULARY,
    carried: bool = True,
    small: torch.dtype = torch.float32,
) -> Specimen:
    from personafast._triton import aggregate_logits

    def call() -> None:
        aggregate_logits(
            meta(rows, vocabulary, dtype=dtype),
            meta(members, rows, vocabulary, dtype=dtype),
            meta(rows, members, dtype=small),
            meta(rows, members, dtype=small) if carried else None,
            meta(rows, dtype=torch.int32),
            meta(rows, dtype=small),
            meta(rows, dtype=small),
        )

    kind = str(dtype).removeprefix("torch.")
    name = f"{kind}, {rows} rows, {members} policies, {vocabulary}" + ("" if carried else ", nothing carried")
    traffic = (members + 1) * rows * vocabulary * dtype.itemsize + 4 * rows * vocabulary
    return Specimen("aggregate_logits", name, call, 3, traffic, listed=dtype == torch.bfloat16 and carried)


SPECIMENS = (
    _specimen(8, POLICIES, torch.bfloat16),
    _specimen(64, 8, torch.bfloat16, 256000),
    _specimen(2, 12, torch.bfloat16),
    _specimen(1, 1, torch.float16, carried=False, small=torch.float64),
    # A row length that leaves neither rows nor blocks aligned.
    _specimen(1, 2, torch.float32, 50257),
)
