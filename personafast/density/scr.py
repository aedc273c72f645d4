"""Speculative chunk-level rejection sampling as published (arXiv 2511.01891, section 4): fast, and approximate.

The bound M is estimated from past scores, and shorter prefixes are salvaged from the scores of a rejected chunk. Both
bias the samples (METHODS 3.2); `GenerationStats.clipped_mass` shows how often the bound was wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from personafast import ops
from personafast.density.draws import Draws, Stream, choose
from personafast.density.rule import Rule
from personafast.density.scorer import Scorer
from personafast.density.transcript import GenerationStats, Transcript
from personafast.errors import PersonafastError


@dataclass(frozen=True)
class ScrOptions:
    """What the paper fixes, and what it leaves open.

    Attributes:
        chunk: k, tokens proposed a round.
        window: W, past rounds whose largest score makes the bound.
        gamma: safety factor, log M = log gamma + max over the window. One bound a row and prefix length.
        warmup: rounds at the start of a row that fill the window: their chunk is scored, and one exact token is drawn
            (open in the paper; a bound made of the round's own score would accept anything with 1 / gamma).
        retries: single-token proposals after a whole chunk was refused (open in the paper: one exact token is drawn
            when all of them are refused too).
    """

    chunk: int = 4
    window: int = 20
    gamma: float = 1.2
    warmup: int = 2
    retries: int = 16

    def __post_init__(self) -> None:
        for name in ("chunk", "window", "warmup", "retries"):
            if getattr(self, name) < 1:
                raise PersonafastError(f"{name}: {getattr(self, name)} is not at least 1")
        if not (math.isfinite(self.gamma) and self.gamma >= 1):
            raise PersonafastError(f"gamma: {self.gamma} is not a finite number of at least 1")


class _Bounds:
    """log M per row and prefix length, from a ring of the last W rounds' scores."""

    def __init__(self, rows: int, options: ScrOptions, device: torch.device) -> None:
        self._log_gamma = math.log(options.gamma)
        self._ring = torch.full((options.window, rows, options.chunk), -math.inf, dtype=torch.float32, device=device)
        self._next = 0

    def log_m(self, scores: torch.Tensor) -> torch.Tensor:
        """float32 [B, k]; the round's own scores where no chunk that long was seen yet."""
        seen = self._ring.amax(dim=0)[:, : scores.shape[1]]
        return self._log_gamma + torch.where(seen == -math.inf, scores, seen)

    @property
    def rounds(self) -> int:
        """Rounds seen so far."""
        return self._next

    def see(self, scores: torch.Tensor) -> None:
        oldest = self._ring[self._next % self._ring.shape[0]]
        oldest.fill_(-math.inf)
        oldest[:, : scores.shape[1]] = scores
        self._next += 1

    def keep(self, rows: torch.Tensor) -> None:
        self._ring = self._ring[:, rows]


def sample_scr(scorer: Scorer, transcript: Transcript, rule: Rule, draws: Draws, options: ScrOptions) -> None:
    """Propose k tokens from pi_0, accept the chunk when log u < S - log M, else its prefixes, else one token.

    S is `ops.chunk_scores` of the prefix. The target is at chunk level: it depends on k (METHODS 3.3).

    Args:
        scorer: the models.
        transcript: receives the tokens; says when rows end.
        rule: weights, aggregator and support mask; `policy_temperature` divides the logits of every member, the
            reference included, before the ratios.
        draws: uniforms of the rows.
        options: chunk, window, gamma, retries.
    """
    bounds = _Bounds(transcript.alive.numel(), options, transcript.alive.device)
    while transcript.open:
        round_ = _Round(scorer, transcript, rule, draws, options)
        scores = round_.scores()
        log_m = bounds.log_m(scores)
        tokens, going = round_.draft.clone(), ~transcript.ended
        if bounds.rounds < options.warmup:
            counts = torch.ones_like(round_.positions)
            tokens[:, 0] = round_.exact_token(torch.arange(counts.numel(), device=counts.device))
            transcript.stats.exact += int(going.sum())
        else:
            accepted = ops.chunk_accept(scores, log_m, round_.log_u, round_.lengths).long()
            _count(transcript.stats, scores, log_m, torch.where(going, round_.lengths, 0), accepted * going)
            stuck = ((accepted == 0) & going).nonzero().flatten()
            if stuck.numel():
                tokens[stuck, 0] = _one_token(round_, stuck, log_m[stuck, 0], options, transcript.stats)
            counts = accepted.clamp(min=1)
        bounds.see(torch.where(_within(round_.lengths, scores.shape[1]), scores, -math.inf))
        # A row that has ended stays as it is until it leaves the batch.
        counts = counts * going
        transcript.append(tokens, counts)
        scorer.commit(tokens, counts)
        rows = transcript.shrink()
        if rows is not None:
            for part in (scorer, rule, draws, bounds):
                part.keep(rows)


class _Round:
    """One proposed chunk and everything its acceptance needs."""

    def __init__(self, scorer: Scorer, transcript: Transcript, rule: Rule, draws: Draws, options: ScrOptions) -> None:
        t = rule.policy_temperature
        self.rule, self.positions, self.draws = rule, transcript.positions, draws
        # No row needs more tokens than the one with the most room.
        chunk = min(options.chunk, int(torch.where(transcript.ended, 1, transcript.room).max()))
        u = draws.uniform(Stream.PROPOSE, self.positions, chunk)
        self.log_u = draws.uniform(Stream.ACCEPT, self.positions, chunk).log().float()
        draft = torch.empty(self.positions.numel(), 0, dtype=torch.long, device=self.positions.device)
        proposals = []
        for j in range(chunk):
            logits = scorer.propose(draft)
            proposals.append(logits)
            draft = torch.cat([draft, choose(logits / t, u[:, j])[:, None]], dim=1)
        self.draft = draft
        self.reference = torch.stack(proposals, dim=1)  # [B, k, V]
        _, self.policies = scorer.score(draft[:, :-1], reference=False)  # [N, B, k, V]
        # A chunk ends with the row: what follows an EOS or lies beyond the limit is neither scored nor kept.
        ends = transcript.is_eos(draft).long()
        before_eos = (ends.cumsum(dim=1) - ends == 0).sum(dim=1)
        self.lengths = torch.minimum(before_eos, transcript.room.clamp(min=1)).to(torch.int32)

    def scores(self) -> torch.Tensor:
        """S of every prefix, float32 [B, k]; -inf once a token lies outside the support mask."""
        t, rule = self.rule.policy_temperature, self.rule
        index = self.draft[..., None]
        ref = (self.reference / t).log_softmax(dim=-1).gather(2, index).squeeze(2)
        of = (self.policies / t).log_softmax(dim=-1)
        of = of.gather(3, index.expand(of.shape[0], -1, -1, -1)).squeeze(3)
        scores = rule.scores(ref, of)
        if bool(rule.min_p.any()):
            for j in range(self.draft.shape[1]):
                inside = rule.supported(self.reference[:, j], self.policies[:, :, j])
                inside = inside.gather(1, self.draft[:, j : j + 1])
                scores[:, j:] = torch.where(inside, scores[:, j:], -math.inf)
        return scores

    def local(self, rows: torch.Tensor) -> tuple[Rule, torch.Tensor, torch.Tensor]:
        """The rule and the cached next-token logits at Y of some rows: reference [b, V], policies [N, b, V]."""
        return self.rule.select(rows), self.reference[rows, 0], self.policies[:, rows, 0]

    def exact_token(self, rows: torch.Tensor) -> torch.Tensor:
        """One token of the token-level target for some rows, int64 [b]; no forward pass is needed."""
        rule, reference, policies = self.local(rows)
        u = self.draws.uniform(Stream.EXACT, self.positions)[rows, 0]
        return choose(rule.target(reference, policies), u)


def _within(lengths: torch.Tensor, chunk: int) -> torch.Tensor:
    return torch.arange(chunk, device=lengths.device) < lengths[:, None]


def _count(
    stats: GenerationStats, scores: torch.Tensor, log_m: torch.Tensor, lengths: torch.Tensor, accepted: torch.Tensor
) -> None:
    within = _within(lengths, scores.shape[1])
    stats.proposed += int(lengths.sum())
    stats.accepted += int(accepted.sum())
    stats.scored += int(within.sum())
    stats.clipped += int(((scores > log_m) & within).sum())


def _one_token(
    round_: _Round, rows: torch.Tensor, log_m: torch.Tensor, options: ScrOptions, stats: GenerationStats
) -> torch.Tensor:
    """Single-token rejection sampling from the cached logits at Y, then one exact token after the retry cap."""
    rule, reference, policies = round_.local(rows)
    t = rule.policy_temperature
    logp, of = (reference / t).log_softmax(dim=-1), (policies / t).log_softmax(dim=-1)
    inside = rule.supported(reference, policies) if bool(rule.min_p.any()) else None
    u = round_.draws.uniform(Stream.RETRY, round_.positions, 2 * options.retries)[rows]
    token = torch.full_like(rows, -1)
    for attempt in range(options.retries):
        open_ = token < 0
        if not bool(open_.any()):
            return token
        index = choose(logp, u[:, 2 * attempt])[:, None]
        of_token = of.gather(2, index.expand(of.shape[0], -1, 1))
        score = rule.scores(logp.gather(1, index), of_token)[:, 0]
        good = u[:, 2 * attempt + 1].log().float() < score - log_m
        if inside is not None:
            good &= inside.gather(1, index)[:, 0]
        token = torch.where(open_ & good, index[:, 0], token)
    refused = token < 0
    stats.exact += int(refused.sum())
    return torch.where(refused, round_.exact_token(rows), token)
