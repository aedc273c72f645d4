"""What the targets of a text integrate to: log Z, token by token."""

from __future__ import annotations

import torch

from personafast.density.rule import Rule


def base_logits(rule: Rule, reference: torch.Tensor, policies: torch.Tensor) -> torch.Tensor:
    """Raw logits of b, what the ratios multiply, [B, ..., V]: the reference's, or those of the policy in its place.

    Args:
        rule: says which it is.
        reference: raw logits [B, ..., V].
        policies: raw logits [N, B, ..., V].
    """
    if rule.based is None:
        return reference
    found, (rows, base) = reference.clone(), rule.based
    found[rows] = policies[base, rows].to(found.dtype)
    return found


def log_normalisers(
    rule: Rule,
    reference: torch.Tensor,
    policies: torch.Tensor,
    target: torch.Tensor,
    tokens: torch.Tensor,
    carried: torch.Tensor | None = None,
) -> torch.Tensor:
    """log Z of the token-level target at m places of every row, float32 [B, m].

    q(y) = b(y) g(r(y)) / Z holds at every y that can be drawn, so one of them is enough:
    log Z = log b(y) + log g(r(y)) - log q(y). Where ratios of the text before are carried over, g is what the token
    adds to them: g(r(Y y)) / g(r(Y)), which the carried mixture makes 1 on average.

    Args:
        rule: the rule of every row.
        reference: raw logits [B, m, V].
        policies: raw logits [N, B, m, V].
        target: of `Rule.targets`, [B, m, V].
        tokens: int64 [B, m], drawn from the target.
        carried: float32 [B, m, N] log ratios of the text before each place.
    """
    batch, places, vocabulary = reference.shape
    members = policies.shape[0]
    flat = rule.at_places(places)
    t, index = rule.policy_temperature, tokens.reshape(-1, 1)

    def of_token(logits: torch.Tensor) -> torch.Tensor:
        return (logits.reshape(-1, vocabulary).float() / t).log_softmax(-1).gather(1, index)

    of_reference = of_token(reference)
    of_policies = of_reference.new_empty(members, *index.shape)
    for i in range(members):
        of_policies[i] = of_token(policies[i])
    before = None if carried is None else carried.reshape(-1, members)
    score = flat.scores(of_reference, of_policies, before)
    if before is not None:
        nothing = torch.zeros_like(of_reference)
        score = score - flat.scores(nothing, nothing.expand(members, -1, -1), before)
    of_base = of_token(base_logits(rule, reference, policies))
    log_q = target.reshape(-1, vocabulary).float().log_softmax(-1).gather(1, index)
    found = of_base + score - log_q
    if flat.unweighted is not None:
        found = torch.where(flat.unweighted[:, None], 0.0, found)
    return found.view(batch, places)
