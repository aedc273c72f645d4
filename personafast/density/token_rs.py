"""Token-level rejection sampling with a valid bound: exact, one token a round, the baseline of arXiv 2511.01891."""

from __future__ import annotations

import torch

from personafast.density.direct import Process
from personafast.density.draws import Draws, Stream, check_target, choose, settle
from personafast.density.normaliser import base_logits, log_normalisers
from personafast.density.rule import Rule
from personafast.density.scorer import Scorer
from personafast.density.transcript import Transcript
from personafast.errors import PersonafastError


def sample_token_rs(
    scorer: Scorer,
    transcript: Transcript,
    rule: Rule,
    draws: Draws,
    *,
    retries: int = 64,
    process: Process | None = None,
    carry: bool = False,
    want_log_z: bool = False,
) -> None:
    """Draw every token from the token-level target q by rejection: y ~ b stands with probability q(y) / (b(y) M).

    M = max_y q(y) / b(y) over the vocabulary, that is, max g(r) / Z: no ratio is above it. Every proposal is made from
    the same logits with new uniforms; after `retries` of them in vain the token is drawn from q itself.

    Why that is exact: a proposal is y and stands with probability b(y) q(y) / (b(y) M) = q(y) / M, so one that stands
    is a draw from q, whichever in the row of proposals it is. Whether any of them stands is settled with probability
    1 - (1 - 1 / M)^retries, whatever the token would be; otherwise the token is a draw from q by other uniforms. Both
    cases give q, and so does their mixture. Where b rules out what q allows, M is infinite, nothing stands, and all
    tokens come from q.

    Args:
        scorer: the models.
        transcript: receives the tokens; says when rows end.
        rule: weights, aggregator and support mask of every row; b is the reference, or the policy in its place, at
            `policy_temperature`.
        draws: uniforms.
        retries: most proposals a token.
        process: user processors and warpers, (ids [b, l], log-target [b, V]) -> scores [b, V].
        carry: as for `sample_direct`.
        want_log_z: make `GenerationStats.log_z`.

    Raises:
        PersonafastError: a target has no token left, or `retries` is below 1.
    """
    if retries < 1:
        raise PersonafastError(f"retries: {retries} is not at least 1")
    host = transcript.host
    nothing = torch.empty(transcript.alive.numel(), 0, dtype=torch.long)
    one = torch.ones(transcript.alive.numel(), dtype=torch.long)
    carried = rule.no_ratios() if carry else None
    while transcript.open:
        reference, policies = scorer.score(nothing, reference=True)
        assert reference is not None
        so_far = None if carried is None else carried[:, None]
        plain = target = rule.targets(reference, policies, so_far)[:, 0]
        if process is not None:
            target = process(transcript.shown(), target)
        log_q = settle(target.double(), transcript.ended).log_softmax(dim=-1)
        check_target(torch.where(log_q[:, 0].isnan(), torch.nan, 0.0), host)
        base = base_logits(rule, reference, policies)[:, 0].double() / rule.policy_temperature
        token, new = _accepted(log_q, base.log_softmax(dim=-1), transcript, draws, retries)
        before = transcript.positions
        transcript.append(new[:, None], one)
        if want_log_z:
            values = log_normalisers(rule, reference, policies, plain[:, None], token[:, None], so_far)
            transcript.add_log_z(values, before)
        if carried is not None:
            carried = carried + rule.log_ratios(reference[:, 0], policies[:, :, 0], token)
        scorer.commit(new[:, None], one)
        rows = transcript.shrink()
        if rows is not None:
            nothing, one = nothing[rows], one[rows]
            carried = carried[host.send(rows)] if carried is not None else None
            for part in (scorer, rule, draws):
                part.keep(rows)


def _log_ratios(log_q: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    return torch.where(log_q == -torch.inf, -torch.inf, log_q - log_b)


def _log_bound(ratios: torch.Tensor) -> torch.Tensor:
    """log M, [B, 1]."""
    return ratios.amax(dim=-1, keepdim=True)


def _accepted(
    log_q: torch.Tensor, log_b: torch.Tensor, transcript: Transcript, draws: Draws, retries: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of q for every row, by way of proposals from b, int64 [B]: where the models are, and on the CPU."""
    host = transcript.host
    ratios = _log_ratios(log_q, log_b)
    # All proposals come from the same logits, so they are made at once, and those behind the first that stands unmade.
    u = host.send(draws.uniform(Stream.RETRY, transcript.positions, 2 * retries))
    proposed = choose(log_b, u[:, ::2].contiguous(), host)  # [B, retries]
    stands = u[:, 1::2].log() < ratios.gather(1, proposed) - _log_bound(ratios)
    any_stands, first = stands.any(dim=1), stands.int().argmax(dim=1)
    token = proposed.gather(1, first[:, None])[:, 0]
    if host.remote or not bool(any_stands.all()):
        exact = choose(log_q, host.send(draws.uniform(Stream.EXACT, transcript.positions)[:, 0]), host)
        token = torch.where(any_stands, token, exact)
    new, stood, tries = host.read(token, any_stands, torch.where(any_stands, first + 1, retries))
    stats, going = transcript.stats, ~transcript.ended
    stats.proposed += int(tries[going].sum())
    stats.accepted += int(stood[going].sum())
    stats.exact += int((~stood)[going].sum())
    return token, new
