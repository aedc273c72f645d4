"""Everything one row of a batch needs: its reference, its policies with weights, and its rule."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from personafast.density.model_scorer import Member

# Homogeneous of degree one: g(pi_i / pi_0) pi_0 = g(pi_i), the reference cancels.
_HOMOGENEOUS = ("linear", "power", "harmonic", "min", "max")


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        reference: pi_0, of the ratios.
        policies: pi_i.
        weights: alpha_i.
        has_ratios: whether the persona asked for ratios, which gives the row its default support mask.
        aggregator: the rule's name, or a function in place of it.
        p: exponent of the rule "power".
        base: what stands in front of the ratios in place of the reference, or None.
        draft: what a verifying sampler drafts with, or None for the base.
    """

    reference: Member
    policies: Sequence[Member]
    weights: Sequence[float]
    has_ratios: bool
    aggregator: str | Callable[..., Any] = "geometric"
    p: float = 1.0
    base: Member | None = None
    draft: Member | None = None

    @property
    def members(self) -> list[Member]:
        """The policies and, last, the base where there is one of its own."""
        return [*self.policies] if self.base is None else [*self.policies, self.base]

    @property
    def front(self) -> Member:
        """What stands in front of the ratios, and proposes."""
        return self.reference if self.base is None else self.base

    @property
    def needs_reference(self) -> bool:
        """Whether the token-level target depends on the reference."""
        if not self.policies:
            return self.base is None
        total = sum(self.weights)
        if self.aggregator == "geometric":
            # Well inside the tolerance within which `aggregate_logits` gives the reference no share.
            return abs(total if self.base is not None else 1 - total) > 5e-7
        return self.base is not None or self.aggregator not in _HOMOGENEOUS
