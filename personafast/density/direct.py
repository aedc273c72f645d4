"""Token-level sampling from the target, exactly: one forward over reference and policies, one token."""

from __future__ import annotations

from collections.abc import Callable

import torch

from personafast.density.draws import Draws, next_token, settle
from personafast.density.normaliser import log_normalisers
from personafast.density.rule import Rule
from personafast.density.scorer import Scorer
from personafast.density.transcript import Transcript

Process = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def sample_direct(
    scorer: Scorer,
    transcript: Transcript,
    rule: Rule,
    draws: Draws | None,
    *,
    process: Process | None = None,
    carry: bool = False,
    want_log_z: bool = False,
) -> None:
    """Draw every token from q_t(y) = g(pi_1 / pi_0, ..., pi_N / pi_0) pi_0 / Z, the token-level target (METHODS 3.3).

    Args:
        scorer: the models.
        transcript: receives the tokens; says when rows end.
        rule: weights, aggregator and support mask of every row.
        draws: uniforms; None takes the most probable token.
        process: user processors and warpers, (ids [b, l], log-target [b, V]) -> scores [b, V].
        carry: weigh the policies of a linear rule by their ratios over the text so far, which makes the whole text
            one draw from the mixture of policies; otherwise every token is a draw from it.
        want_log_z: make `GenerationStats.log_z`.
    """
    host = transcript.host
    nothing = torch.empty(transcript.alive.numel(), 0, dtype=torch.long)
    one = torch.ones(transcript.alive.numel(), dtype=torch.long)
    carried = rule.no_ratios() if carry else None
    while transcript.open:
        reference, policies = scorer.score(nothing, reference=True)
        assert reference is not None
        ref, members = reference[:, 0], policies[:, :, 0]
        plain = target = rule.target(ref, members, carried)
        if process is not None:
            target = process(transcript.shown(), target)
        token = next_token(settle(target, transcript.ended), draws, transcript.positions, host)
        (new,) = host.read(token[:, None])
        before = transcript.positions
        transcript.append(new, one)
        if want_log_z:
            so_far = None if carried is None else carried[:, None]
            values = log_normalisers(rule, reference, policies, plain[:, None], token[:, None], so_far)
            transcript.add_log_z(values, before)
        if carried is not None:
            carried = carried + rule.log_ratios(ref, members, token)
        scorer.commit(new, one)
        rows = transcript.shrink()
        if rows is not None:
            nothing, one = nothing[rows], one[rows]
            carried = carried[host.send(rows)] if carried is not None else None
            for part in (scorer, rule, draws):
                if part is not None:
                    part.keep(rows)
