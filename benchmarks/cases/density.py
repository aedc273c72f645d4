"""Density ratios: the token-level target, the scores and the acceptance of chunks, the verification of drafts."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace

import torch

from benchmarks.case import Case, Contender, Draw, Inputs, nbytes
from personafast import ops

VOCABULARY, POLICIES, MIN_P = 128256, 4, 0.05
CHUNK = 8


def _rules(rows: int, rule: ops.Aggregator) -> dict[str, torch.Tensor]:
    return {"aggregator": torch.full((rows,), int(rule), dtype=torch.int32), "p": torch.zeros(rows)}


def aggregate_case(rows: int, rule: ops.Aggregator) -> Case:
    def make(draw: Draw) -> Inputs:
        return SimpleNamespace(
            ref=draw.normal(rows, VOCABULARY, dtype=torch.float32, scale=2.0),
            policies=draw.normal(POLICIES, rows, VOCABULARY, dtype=torch.float32, scale=2.0),
            weights=0.2 + draw.uniform(rows, POLICIES),
            carried=draw.normal(rows, POLICIES, dtype=torch.float32),
            min_p=torch.full((rows,), MIN_P),
            **_rules(rows, rule),
        )

    def plain(inputs: Inputs) -> torch.Tensor:
        reference, logp = inputs.ref.log_softmax(-1), inputs.policies.log_softmax(-1)
        weight = inputs.weights.T[..., None]
        if rule == ops.Aggregator.LINEAR:
            mix = (weight.log() + inputs.carried.T[..., None]).log_softmax(0)
            target = (mix + logp).logsumexp(0)
        else:
            target = (weight * logp).sum(0) + (1 - weight.sum(0)) * reference
        support = (logp >= logp.amax(-1, keepdim=True) + math.log(MIN_P)).any(0)
        if rule == ops.Aggregator.GEOMETRIC:
            # The reference is a member only where the weights leave it a share.
            share = (1 - weight.sum(0)) > 0
            support |= (reference >= reference.amax(-1, keepdim=True) + math.log(MIN_P)) & share
        return torch.where(support, target, -math.inf).log_softmax(-1)

    def ours(inputs: Inputs) -> torch.Tensor:
        return ops.aggregate_logits(
            inputs.ref, inputs.policies, inputs.weights, inputs.carried, inputs.aggregator, inputs.p, inputs.min_p
        )

    def traffic(inputs: Inputs) -> int:
        return 2 * nbytes(inputs.ref) + nbytes(inputs.policies)

    return Case(
        name=f"aggregate_logits-{rule.name.lower()}-rows{rows}-policies{POLICIES}",
        operator="aggregate_logits",
        shape={"B": rows, "N": POLICIES, "V": VOCABULARY},
        make=make,
        plain=plain,
        ours=Contender("ours", ours, traffic),
        baselines=(Contender("the same in torch", plain, traffic),),
    )


def chunk_case(rows: int, fused: bool) -> Case:
    """`chunk_scores` and `chunk_accept`, one after the other as the sampler calls them, or as one operator."""

    def make(draw: Draw) -> Inputs:
        return SimpleNamespace(
            ref=-draw.uniform(rows, CHUNK) * 4,
            policies=-draw.uniform(POLICIES, rows, CHUNK) * 4,
            weights=0.2 + draw.uniform(rows, POLICIES),
            carried=draw.normal(rows, POLICIES, dtype=torch.float32),
            bound=draw.uniform(rows, CHUNK) * 4,
            log_u=draw.uniform(rows, CHUNK).log(),
            lengths=draw.integers(1, CHUNK + 1, rows),
            **_rules(rows, ops.Aggregator.LINEAR),
        )

    def plain(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        ratios = (inputs.policies - inputs.ref).cumsum(2) + inputs.carried.T[..., None]
        scores = (inputs.weights.log().T[..., None] + ratios).logsumexp(0)
        count = torch.arange(1, CHUNK + 1, dtype=torch.int32)
        stands = (inputs.log_u < scores - inputs.bound) & (count <= inputs.lengths[:, None])
        return scores, (stands * count).amax(1)

    def ours(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        of_scores = inputs.ref, inputs.policies, inputs.weights, inputs.carried, inputs.aggregator, inputs.p
        if fused:
            return ops.chunk_scores_accept(*of_scores, inputs.bound, inputs.log_u, inputs.lengths)
        scores = ops.chunk_scores(*of_scores)
        return scores, ops.chunk_accept(scores, inputs.bound, inputs.log_u, inputs.lengths)

    def traffic(inputs: Inputs) -> int:
        # The scores are written and read again.
        return nbytes(inputs.ref, inputs.policies, inputs.bound, inputs.log_u) + 2 * nbytes(inputs.ref)

    name = "chunk_scores_accept" if fused else "chunk_scores-chunk_accept"
    return Case(
        name=f"{name}-rows{rows}-chunk{CHUNK}-policies{POLICIES}",
        operator="chunk_scores_accept" if fused else "chunk_scores",
        needs=() if fused else ("chunk_accept",),
        shape={"B": rows, "k": CHUNK, "N": POLICIES},
        make=make,
        plain=plain,
        ours=Contender("ours", ours, traffic),
        baselines=(Contender("the same in torch", plain, traffic),),
    )


def verify_case(rows: int, block: bool) -> Case:
    """Judged by the reference, and timed beside the operator's own vectorised torch form, as it runs on a GPU."""

    def make(draw: Draw) -> Inputs:
        draft = draw.normal(rows, CHUNK, VOCABULARY, dtype=torch.float32, scale=2.0)
        target = draw.normal(rows, CHUNK + 1, VOCABULARY, dtype=torch.float32)
        # A draft that is worth verifying is close to the target.
        target[:, :-1] = draft + 0.3 * target[:, :-1]
        draft_logp = draft.log_softmax(-1)
        tokens = torch.multinomial(draft_logp.exp().view(-1, VOCABULARY), 1, generator=draw.generator)
        return SimpleNamespace(
            target=target.log_softmax(-1),
            draft=draft_logp,
            tokens=tokens.view(rows, CHUNK),
            lengths=torch.full((rows,), CHUNK, dtype=torch.int32),
            seeds=draw.integers(0, 2**62, rows, dtype=torch.int64),
            positions=draw.integers(0, 4096, rows, dtype=torch.int64),
        )

    def ours(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return ops.verify_draft(
            inputs.target, inputs.draft, inputs.tokens, inputs.lengths, inputs.seeds, inputs.positions, block
        )

    def reference(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        with ops.use_backend("reference"):
            return ours(inputs)

    def vectorised(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        form = importlib.import_module("personafast.ops._verify_draft")._vectorised
        return form(inputs.target, inputs.draft, inputs.tokens, inputs.lengths, inputs.seeds, inputs.positions, block)

    def traffic(inputs: Inputs) -> int:
        """What the outcome needs: two rows of the vocabulary for a residual, one for the token after a whole draft.

        Blocks are tried from the longest on; below it each trial needs a residual of its own.
        """
        row = nbytes(inputs.target[0, 0])
        total = 0
        for accepted in ours(inputs)[1].tolist():
            residuals = CHUNK - accepted if block else min(1, CHUNK - accepted)
            total += row * (2 * residuals if residuals else 1)
        return total

    return Case(
        name=f"verify_draft-{'block' if block else 'token'}-rows{rows}-chunk{CHUNK}",
        operator="verify_draft",
        shape={"B": rows, "k": CHUNK, "V": VOCABULARY},
        make=make,
        plain=reference,
        exact=reference,
        ours=Contender("ours", ours, traffic),
        baselines=(Contender("the same in vectorised torch", vectorised, traffic),),
    )


CASES: tuple[Case, ...] = (
    *(aggregate_case(rows, rule) for rule in (ops.Aggregator.GEOMETRIC, ops.Aggregator.LINEAR) for rows in (1, 8)),
    *(chunk_case(rows, fused) for fused in (False, True) for rows in (8, 64)),
    verify_case(8, block=False),
    verify_case(8, block=True),
)
