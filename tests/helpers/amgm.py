"""A sampler for chunk-level power means that is exact by a proof: a check on the enumeration of their targets."""

from __future__ import annotations

import torch

from personafast.density.draws import choose
from personafast.density.scorer import Scorer
from personafast.density.transcript import Transcript


def log_power_mean(log_ratios: torch.Tensor, weights: torch.Tensor, p: float) -> torch.Tensor:
    """log M_p of ratios, [M, ...] -> [...]; weights [M] sum to 1; p = 0 is the geometric mean."""
    shape = (-1, *[1] * (log_ratios.dim() - 1))
    if p == 0:
        return (weights.view(shape) * log_ratios).sum(0)
    return (weights.log().view(shape) + p * log_ratios).logsumexp(0) / p


def sample_amgm(
    scorer: Scorer, transcript: Transcript, generator: torch.Generator, weights: list[float], p: float, chunk: int
) -> int:
    """Chunks of b M_p(r), p <= 1, by proposing from the mixture b M_1(r); how many chunks were proposed.

    `weights` [N + 1] belong to the reference, whose ratio is 1, and the policies, and sum to 1. A chunk comes from one
    member, drawn by weight, and stands with probability M_p(r) / M_1(r), at most 1 because power means grow with p.
    """
    shares = torch.tensor(weights, dtype=torch.float64)
    assert abs(float(shares.sum()) - 1) < 1e-9 and p <= 1
    proposals = 0
    while transcript.open:
        size = min(chunk, int(transcript.room.max()))
        rows = transcript.alive.numel()
        tokens = torch.zeros(rows, size, dtype=torch.long)
        open_ = torch.ones(rows, dtype=torch.bool)
        while bool(open_.any()):
            member = torch.multinomial(shares, rows, replacement=True, generator=generator)
            draft = torch.zeros(rows, 0, dtype=torch.long)
            logp = torch.zeros(len(weights), rows, dtype=torch.float64)
            for _ in range(size):
                reference, policies = scorer.score(draft, reference=True)
                assert reference is not None
                members = torch.cat([reference[None, :, -1], policies[:, :, -1]]).double().log_softmax(-1)
                u = torch.rand(rows, dtype=torch.float64, generator=generator)
                token = choose(members[member, torch.arange(rows)], u)
                logp += members.gather(2, token.expand(len(weights), rows)[..., None])[..., 0]
                draft = torch.cat([draft, token[:, None]], dim=1)
            ratios = logp - logp[0]
            log_accept = log_power_mean(ratios, shares, p) - log_power_mean(ratios, shares, 1.0)
            assert float(log_accept.max()) < 1e-9, "the bound of 1 does not hold"
            proposals += int(open_.sum())
            stands = open_ & (torch.rand(rows, dtype=torch.float64, generator=generator).log() < log_accept)
            tokens = torch.where(stands[:, None], draft, tokens)
            open_ &= ~stands
        counts = torch.full((rows,), size)
        transcript.append(tokens, counts)
        scorer.commit(tokens, counts)
    return proposals
