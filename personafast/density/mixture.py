"""Sampling from a mixture of policies: draw one of them, and let it write (METHODS 3.2)."""

from __future__ import annotations

import torch

from personafast.density.draws import Draws, Stream, choose
from personafast.density.rule import Rule
from personafast.density.scorer import Scorer
from personafast.density.transcript import Transcript
from personafast.errors import PersonafastError
from personafast.ops import Aggregator


def sample_mixture(
    scorer: Scorer,
    transcript: Transcript,
    rule: Rule,
    draws: Draws | None,
    *,
    chunk: int,
    carry: bool = False,
    want_log_z: bool = False,
) -> None:
    """Draw from sum_i alpha_i pi_i / sum_i alpha_i, which the linear rule is, with one policy a chunk and no rejection.

    A chunk of k tokens is drawn from pi_i with probability alpha_i / sum alpha: that is the chunk-level target, and
    depends on k. With `carry` the policy is drawn once and writes the whole text, which is the target whose weights
    are carried over, alpha_i r_i(Y), at any k. A support mask acts on the distribution of the policy that speaks.

    Args:
        scorer: the models; only policies that speak are run.
        transcript: receives the tokens; says when rows end.
        rule: linear in every row, weights of 0 or more; `policy_temperature` divides the logits.
        draws: uniforms.
        chunk: k, tokens a policy writes before the next one is drawn.
        carry: draw one policy for the whole text.
        want_log_z: make `GenerationStats.log_z`: log sum_i alpha_i for every chunk, or with `carry` 0.

    Raises:
        PersonafastError: without draws, with a rule that is not such a mixture, or `chunk` below 1.
    """
    if chunk < 1:
        raise PersonafastError(f"chunk: {chunk} is not at least 1")
    if draws is None:
        raise PersonafastError(
            "sampler: 'mixture' draws a policy at random, so it has no greedy form; use 'direct' with do_sample=False"
        )
    _check(rule)
    member = _member(rule, draws, torch.zeros_like(transcript.positions)) if carry else None
    while transcript.open:
        speaker = member if member is not None else _member(rule, draws, transcript.positions)
        tokens, counts = _chunk(scorer, transcript, rule, draws, speaker, chunk)
        before = transcript.positions
        transcript.append(tokens, counts)
        scorer.commit(tokens, counts)
        if want_log_z:
            total = torch.zeros_like(rule.min_p) if carry else rule.weights.sum(dim=1).log()
            transcript.add_log_z(transcript.host.send(total[:, None]), before)
        rows = transcript.shrink()
        if rows is not None:
            member = member[rows] if member is not None else None
            for part in (scorer, rule, draws):
                part.keep(rows)


def _check(rule: Rule) -> None:
    faults = {
        "its rule is not linear": rule.aggregator != int(Aggregator.LINEAR),
        "a weight is negative": (rule.weights < 0).any(dim=1),
        "no policy has a weight": (rule.weights == 0).all(dim=1),
    }
    if rule.base is not None:
        faults["a policy stands for its reference"] = rule.base >= 0
    if rule.custom is not None:
        faults["its rule is a function"] = torch.tensor([function is not None for function in rule.custom])
    for fault, rows in faults.items():
        if bool(rows.any()):
            raise PersonafastError(
                f"sampler: 'mixture' cannot sample row {int(rows.int().argmax())}: {fault}; use 'direct' or 'verify'"
            )


def _member(rule: Rule, draws: Draws, positions: torch.Tensor) -> torch.Tensor:
    """The policy of every row, int64 [B] on the CPU."""
    return choose(rule.weights.log(), draws.uniform(Stream.MEMBER, positions)[:, 0])


def _chunk(
    scorer: Scorer, transcript: Transcript, rule: Rule, draws: Draws, member: torch.Tensor, chunk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens int64 [B, j], j at most k, of every row's policy, and how many of them count, int64 [B]; on the CPU."""
    host, positions = transcript.host, transcript.positions
    going = host.send(~transcript.ended)
    room, min_p = host.send(transcript.room), host.send(rule.min_p)
    counts = torch.zeros_like(room)
    tokens = torch.zeros(room.numel(), 0, dtype=torch.long, device=room.device)
    # A device is not asked whether all rows have ended meanwhile.
    most = min(chunk, int(transcript.room.max())) if host.remote else chunk
    while tokens.shape[1] < most and (host.remote or bool(going.any())):
        logits = scorer.speak(member, tokens).float() / rule.policy_temperature
        least = logits.amax(dim=-1, keepdim=True) + min_p.log()[:, None]
        logits = logits.masked_fill(logits < least, -torch.inf)
        # What has ended, before or in this chunk, has something to draw, whatever became of it.
        logits = torch.where(going[:, None], logits, 0.0)
        u = draws.uniform(Stream.SAMPLE, positions + tokens.shape[1])[:, 0]
        token = choose(logits, host.send(u), host)
        tokens = torch.cat([tokens, token[:, None]], dim=1)
        counts = counts + going
        going = going & ~transcript.is_eos(token) & (counts < room)
    tokens, counts = host.read(tokens, counts)
    return tokens, counts
