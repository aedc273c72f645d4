"""How the density ratios of each row meet: weights, rule, support mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from personafast import ops


@dataclass
class Rule:
    """The target of every row.

    Attributes:
        weights: float32 [B, N], alpha; 0 for a member a row does not have. Not normalised.
        aggregator: int32 [B], codes of `ops.Aggregator`.
        min_p: float32 [B], threshold of the support mask; 0 keeps every token.
        policy_temperature: divides the logits of every member before the ratios.
    """

    weights: torch.Tensor
    aggregator: torch.Tensor
    min_p: torch.Tensor
    policy_temperature: float = 1.0

    @property
    def trivial(self) -> bool:
        """Whether every row's target is its reference as it is."""
        return self.weights.shape[1] == 0 and not bool(self.min_p.any()) and self.policy_temperature == 1.0

    def target(
        self, reference: torch.Tensor, policies: torch.Tensor, carried: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Log-probabilities of the token-level target, float32 [B, V].

        Args:
            reference: raw logits [B, V].
            policies: raw logits [N, B, V].
            carried: float32 [B, N], log r_i of the text so far, for the sequence-level mixture.
        """
        if self.trivial:
            return reference
        t = self.policy_temperature
        target = ops.aggregate_logits(
            reference / t, policies / t, self.weights, carried, self.aggregator, torch.ones_like(self.min_p), self.min_p
        )
        # A row that is only its reference keeps raw logits, so that processors see what stock generate shows them.
        plain = (self.weights == 0).all(dim=1) & (self.min_p == 0)
        return torch.where(plain[:, None], reference / t, target) if bool(plain.any()) else target

    def supported(self, reference: torch.Tensor, policies: torch.Tensor) -> torch.Tensor:
        """Which tokens the support mask keeps, bool [B, V]; arguments as for `target`."""
        return torch.isfinite(self.target(reference, policies))

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only."""
        self.weights, self.aggregator, self.min_p = self.weights[rows], self.aggregator[rows], self.min_p[rows]
