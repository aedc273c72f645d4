"""Speculative chunk-level rejection sampling as published (arXiv 2511.01891, section 4): fast, and approximate.

The bound M is estimated from past scores, and shorter prefixes are salvaged from the scores of a rejected chunk. Both
bias the samples (METHODS 3.2); `GenerationStats.clipped_mass` shows how often the bound was wrong.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch

from personafast import ops
from personafast.density.draws import Draws, Stream, choose, settle
from personafast.density.rule import Rule
from personafast.density.scorer import Scorer
from personafast.density.transcript import Transcript
from personafast.errors import PersonafastError


@dataclass(frozen=True)
class ScrOptions:
    """What the paper fixes, and what it leaves open.

    Attributes:
        chunk: k, tokens proposed a round.
        window: W, past rounds whose largest score makes the bound.
        gamma: safety factor, log M = log gamma + max over the window.
        warmup: rounds at the start of a row that fill the window: their chunk is scored, and one exact token is drawn
            (open in the paper; a bound made of the round's own score would accept anything with 1 / gamma).
        retries: single-token proposals after a whole chunk was refused (open in the paper: one exact token is drawn
            when all of them are refused too).
        proposal_temperature: divides the proposing logits (open in the paper). None: what divides every model's before
            the ratios. Another one changes the target: b at this temperature times g of the ratios as they are.
        fresh_u: a uniform of its own for every prefix that is tried (open in the paper). Without, prefixes meet the
            one that has refused the longer ones. Both are biased; with new uniforms more is salvaged, and on tables
            the bias is two to four times as large.
        per_length: a bound for every prefix length (open in the paper); otherwise one for all, the largest.
        carry: under rules that are no product, such as the linear, weigh the policies by their ratios over the text
            so far. The paper's chunks start anew.
    """

    chunk: int = 4
    window: int = 20
    gamma: float = 1.2
    warmup: int = 2
    retries: int = 16
    proposal_temperature: float | None = None
    fresh_u: bool = True
    per_length: bool = True
    carry: bool = False

    def __post_init__(self) -> None:
        for name in ("chunk", "window", "warmup", "retries"):
            value = getattr(self, name)
            if not isinstance(value, int):
                raise PersonafastError(f"{name}: {value!r} is not a whole number")
            if value < 1:
                raise PersonafastError(f"{name}: {value} is not at least 1")
        for name in ("gamma", "proposal_temperature"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Real):
                raise PersonafastError(f"{name}: {value!r} is not a number")
        if not (math.isfinite(self.gamma) and self.gamma >= 1):
            raise PersonafastError(f"gamma: {self.gamma} is not a finite number of at least 1")
        t = self.proposal_temperature
        if t is not None and not (math.isfinite(t) and t > 0):
            raise PersonafastError(f"proposal_temperature: {t} is not a finite number above 0")


class _Bounds:
    """log M per row and prefix length, from a ring of the last W rounds' scores."""

    def __init__(self, rows: int, options: ScrOptions, device: torch.device) -> None:
        self._log_gamma, self._per_length = math.log(options.gamma), options.per_length
        self._ring = torch.full((options.window, rows, options.chunk), -math.inf, dtype=torch.float32, device=device)
        self._next = 0

    def log_m(self, scores: torch.Tensor) -> torch.Tensor:
        """float32 [B, k]; the round's own scores where no chunk that long was seen yet."""
        seen = self._ring.amax(dim=0)
        if not self._per_length:
            seen = seen.amax(dim=1, keepdim=True).expand_as(seen)
        seen = seen[:, : scores.shape[1]]
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


class _LogMean:
    """Log of the mean of exp(S) over the chunks proposed to a row, for every row of the call."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self._total = torch.full((rows,), -math.inf, dtype=torch.float32, device=device)
        self._count = torch.zeros_like(self._total)

    def see(self, rows: torch.Tensor, scores: torch.Tensor) -> None:
        self._total[rows] = torch.logaddexp(self._total[rows], scores)
        self._count[rows] += 1

    def value(self) -> torch.Tensor:
        return torch.where(self._count > 0, self._total - self._count.log(), 0.0)


def sample_scr(
    scorer: Scorer,
    transcript: Transcript,
    rule: Rule,
    draws: Draws,
    options: ScrOptions,
    *,
    want_log_z: bool = False,
) -> None:
    """Propose k tokens from pi_0, accept the chunk when log u < S - log M, else its prefixes, else one token.

    S is `ops.chunk_scores` of the prefix. The target is at chunk level: it depends on k (METHODS 3.3). Where a policy
    stands for the base (`Rule.base`), it proposes, and the ratios stay those to pi_0.

    Args:
        scorer: the models; what it proposes from is the base.
        transcript: receives the tokens; says when rows end.
        rule: weights, aggregator and support mask; `policy_temperature` divides the logits of every member, the
            reference included, before the ratios.
        draws: uniforms of the rows.
        options: chunk, window, gamma, retries and what else the paper leaves open.
        want_log_z: make `GenerationStats.log_z`, an estimate.
    """
    host, stats = transcript.host, transcript.stats
    bounds = _Bounds(transcript.alive.numel(), options, host.device)
    mean = _LogMean(transcript.alive.numel(), host.device)
    carried = rule.no_ratios() if options.carry else None
    while transcript.open:
        round_ = _Round(scorer, transcript, rule, draws, options, carried)
        scores = round_.scores()
        log_m = bounds.log_m(scores)
        going = ~transcript.ended
        if bounds.rounds < options.warmup:
            first = round_.exact_token(None)
            (tokens,) = host.read(torch.cat([first[:, None], round_.draft[:, 1:]], dim=1))
            counts = torch.ones_like(transcript.positions)
            stats.exact += int(going.sum())
        else:
            accepted = ops.chunk_accept(scores, log_m, round_.log_u, round_.lengths)
            proposed, exact = _unstuck(round_, accepted, going, log_m, options)
            clipped = ((scores > log_m) & _within(round_.lengths, scores.shape[1])).sum(dim=1)
            tokens, stood, lengths, exact, clipped = host.read(proposed, accepted, round_.lengths, exact, clipped)
            transcript.count(lengths, stood)
            stats.salvaged += int(((stood > 0) & (stood < lengths))[going].sum())
            stats.scored += int(lengths[going].sum())
            stats.clipped += int(clipped[going].sum())
            stats.exact += int(exact.sum())
            counts = stood.long().clamp(min=1)
        bounds.see(torch.where(_within(round_.lengths, scores.shape[1]), scores, -math.inf))
        if want_log_z:
            whole = scores.gather(1, round_.lengths[:, None].long() - 1)[:, 0]
            mean.see(host.send(transcript.alive[going]), whole[host.send(going.nonzero().flatten())])
        # A row that has ended stays as it is until it leaves the batch.
        counts = counts * going
        if carried is not None:
            carried = carried + round_.log_ratios(host.send(tokens), host.send(counts))
        transcript.append(tokens, counts)
        scorer.commit(tokens, counts)
        rows = transcript.shrink()
        if rows is not None:
            carried = carried[host.send(rows)] if carried is not None else None
            bounds.keep(host.send(rows))
            for part in (scorer, rule, draws):
                part.keep(rows)
    if want_log_z:
        transcript.stats.log_z = mean.value()


class _Round:
    """One proposed chunk and everything its acceptance needs."""

    def __init__(
        self,
        scorer: Scorer,
        transcript: Transcript,
        rule: Rule,
        draws: Draws,
        options: ScrOptions,
        carried: torch.Tensor | None,
    ) -> None:
        self.rule, self.positions, self.draws, self.carried = rule, transcript.positions, draws, carried
        self.host, self._ended = transcript.host, transcript.ended
        host = self.host
        self._moved = options.proposal_temperature is not None
        t = rule.policy_temperature if options.proposal_temperature is None else options.proposal_temperature
        # No row needs more tokens than the one with the most room.
        chunk = min(options.chunk, int(torch.where(transcript.ended, 1, transcript.room).max()))
        u = host.send(draws.uniform(Stream.PROPOSE, self.positions, chunk))
        draft = torch.empty(self.positions.numel(), 0, dtype=torch.long, device=host.device)
        going, proposals = host.send(~transcript.ended), []
        # A device is not asked whether all rows have ended meanwhile.
        while draft.shape[1] < chunk and (host.remote or bool(going.any())):
            logits = scorer.propose(draft)
            proposals.append(logits)
            token = choose(logits / t, u[:, draft.shape[1]], host)
            draft = torch.cat([draft, token[:, None]], dim=1)
            going = going & ~transcript.is_eos(token)
        self.draft = draft
        self.log_u = host.send(draws.uniform(Stream.ACCEPT, self.positions, draft.shape[1]).log().float())
        if not options.fresh_u:
            self.log_u = self.log_u[:, :1].expand_as(self.log_u)
        proposing = torch.stack(proposals, dim=1)  # [B, k, V]
        self.log_proposal = (proposing[:, 0] / t).log_softmax(dim=-1)
        self._at_rule = (proposing[:, 0] / rule.policy_temperature).log_softmax(dim=-1)
        reference, self.policies = scorer.score(draft[:, :-1], reference=True)  # [N, B, k, V]
        # A scorer whose reference proposes need not run it again.
        self.reference = proposing if reference is None else reference
        # A chunk ends with the row: what follows an EOS or lies beyond the limit is neither scored nor kept.
        ends = transcript.is_eos(draft).long()
        before_eos = (ends.cumsum(dim=1) - ends == 0).sum(dim=1)
        self.lengths = torch.minimum(before_eos, host.send(transcript.room.clamp(min=1))).to(torch.int32)

    def scores(self) -> torch.Tensor:
        """S of every prefix, float32 [B, k]; -inf once a token lies outside the support mask."""
        t, rule = self.rule.policy_temperature, self.rule
        index = self.draft[..., None]
        ref = (self.reference / t).log_softmax(dim=-1).gather(2, index).squeeze(2)
        of = (self.policies / t).log_softmax(dim=-1)
        of = of.gather(3, index.expand(of.shape[0], -1, -1, -1)).squeeze(3)
        scores = _grown(rule, ref, of, self.carried)
        if rule.masks:
            for j in range(self.draft.shape[1]):
                inside = rule.supported(self.reference[:, j], self.policies[:, :, j])
                inside = inside.gather(1, self.draft[:, j : j + 1])
                scores[:, j:] = torch.where(inside, scores[:, j:], -math.inf)
        return scores

    def log_ratios(self, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """What the round's tokens add to the log ratios of the text, float32 [B, N]."""
        batch, chunk = tokens.shape
        members, vocabulary = self.policies.shape[0], self.reference.shape[2]
        steps = self.rule.log_ratios(
            self.reference.reshape(-1, vocabulary), self.policies.reshape(members, -1, vocabulary), tokens.flatten()
        )
        kept = _within(counts, chunk)[..., None]
        return torch.where(kept, steps.view(batch, chunk, members), 0.0).sum(dim=1)

    def local(
        self, rows: torch.Tensor | None
    ) -> tuple[Rule, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Rule, next-token logits at Y, carried log ratios and log-probabilities of what proposes.

        [b, V], [N, b, V], [b, N] and [b, V] of some rows, int64 [b] on the CPU; None for all.
        """
        if rows is None:
            return self.rule, self.reference[:, 0], self.policies[:, :, 0], self.carried, self.log_proposal
        there = self.host.send(rows)
        carried = None if self.carried is None else self.carried[there]
        rule, log_proposal = self.rule.select(rows), self.log_proposal[there]
        return rule, self.reference[there, 0], self.policies[:, there, 0], carried, log_proposal

    def uniform(self, stream: Stream, rows: torch.Tensor | None, n: int = 1) -> torch.Tensor:
        """float64 [b, n] of some rows, or all."""
        u = self.draws.uniform(stream, self.positions, n)
        return self.host.send(u if rows is None else u[rows])

    def exact_token(self, rows: torch.Tensor | None) -> torch.Tensor:
        """One token of the token-level target for some rows, or all, int64 [b]; no forward pass is needed."""
        rule, reference, policies, carried, log_proposal = self.local(rows)
        target = rule.target(reference, policies, carried)
        if self._moved:
            at_rule = self._at_rule if rows is None else self._at_rule[self.host.send(rows)]
            target = torch.where(target == -math.inf, target, target + log_proposal - at_rule)
        target = settle(target, self._ended if rows is None else self._ended[rows])
        return choose(target, self.uniform(Stream.EXACT, rows)[:, 0], self.host)


def _grown(rule: Rule, reference: torch.Tensor, policies: torch.Tensor, carried: torch.Tensor | None) -> torch.Tensor:
    """`Rule.scores` of a chunk, relative to that of the text before it: what a bound can be compared with."""
    scores = rule.scores(reference, policies, carried)
    if carried is None:
        return scores
    nothing = torch.zeros_like(reference[:, :1])
    return scores - rule.scores(nothing, nothing.expand(policies.shape[0], -1, -1), carried)


def _within(lengths: torch.Tensor, chunk: int) -> torch.Tensor:
    return torch.arange(chunk, device=lengths.device) < lengths[:, None]


def _unstuck(
    round_: _Round, accepted: torch.Tensor, going: torch.Tensor, log_m: torch.Tensor, options: ScrOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """The draft with another first token where nothing of it stands; and which rows, bool [B], got an exact one.

    A device does not tell which rows those are, so there it is made for all of them.
    """
    draft, host = round_.draft, round_.host
    stuck = (accepted == 0) & host.send(going)
    if host.remote:
        token, exact = _one_token(round_, None, log_m[:, 0], options)
        first = torch.where(stuck, token, draft[:, 0])
        return torch.cat([first[:, None], draft[:, 1:]], dim=1), exact & stuck
    tokens, exact, rows = draft.clone(), torch.zeros_like(stuck), stuck.nonzero().flatten()
    if rows.numel():
        tokens[rows, 0], exact[rows] = _one_token(round_, rows, log_m[rows, 0], options)
    return tokens, exact


def _one_token(
    round_: _Round, rows: torch.Tensor | None, log_m: torch.Tensor, options: ScrOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Single-token rejection sampling from the cached logits at Y, then one exact token after the retry cap.

    Returns:
        int64 [b], and bool [b] where it is an exact one.
    """
    rule, reference, policies, carried, proposal = round_.local(rows)
    t, retries, members = rule.policy_temperature, options.retries, policies.shape[0]
    logp, of = (reference / t).log_softmax(dim=-1), (policies / t).log_softmax(dim=-1)
    # All proposals come from the same logits, so they are made at once, and those behind the first that stands unmade.
    u = round_.uniform(Stream.RETRY, rows, 2 * retries)
    index = choose(proposal, u[:, ::2].contiguous(), round_.host)  # [b, retries]
    of_token = of.gather(2, index.expand(members, -1, -1))
    so_far = None if carried is None else carried.repeat_interleave(retries, dim=0)
    score = _grown(
        rule.at_places(retries), logp.gather(1, index).view(-1, 1), of_token.reshape(members, -1, 1), so_far
    ).view(index.shape)
    good = u[:, 1::2].log().float() < score - log_m[:, None]
    if rule.masks:
        good &= rule.supported(reference, policies).gather(1, index)
    stands, first = good.any(dim=1), good.int().argmax(dim=1)
    token = index.gather(1, first[:, None])[:, 0]
    if not round_.host.remote and bool(stands.all()):
        return token, ~stands
    return torch.where(stands, token, round_.exact_token(rows)), ~stands
