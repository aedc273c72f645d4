"""What one row of a batch speaks as."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

from personafast.errors import PersonafastError
from personafast.steering import Steering, block_indices, checked_weights, normalize_name

# The rules, and the divergences whose regularised optimum they are (MOD, arXiv 2406.18853).
AGGREGATORS = ("geometric", "linear", "harmonic", "power", "jensen_shannon", "min", "max")
DIVERGENCES = {
    "reverse_kl": "geometric",
    "forward_kl": "harmonic",
    "chi_squared": "linear",
    "alpha_divergence": "power",
    "jsd": "jensen_shannon",
}


@dataclass(frozen=True)
class Persona:
    """A persona: vectors with coefficients, a mask or none, policies and prompts with weights (METHODS, section 4).

    Args:
        vectors: persona vector name -> coefficient c. Their sum, sum_i c_i v_i, is added to the residual stream
            (arXiv 2510.10157). The blend is one row per block, so its cost does not grow with the number of vectors.
            The short form of `Steering(vectors=..., blocks=..., normalize=...)`, the first of the persona's steps.
        mask: name of a persona mask; the linears use W * M (arXiv 2602.07164).
        policies: LoRA policy name -> weight alpha of its density ratio pi_i / pi_0 (arXiv 2511.01891). Weights are
            not normalised: 1 is the trait at full strength.
        prompts: system text -> weight alpha; the policy is the same model under that system prompt,
            r_i = pi(. | text, Y) / pi(. | Y). Needs no training.
        aggregator: how the ratios meet in g, target q = pi_0 g(r_1, ..., r_N) / Z. With w_i = alpha_i / sum alpha:

            - "geometric", or "reverse_kl": prod r_i^alpha_i. Blends; the only rule whose strength grows with the sum of
              the weights, and for which they may be negative without loss.
            - "linear", or "chi_squared": sum alpha_i r_i, a mixture that speaks as one persona at a time. Where
              negative weights make it negative it is 0: a warning says so, and `stats.clamped_share` how much that was.
            - "power" with the exponent `p`, or "alpha_divergence" with p = -alpha: (sum w_i r_i^p)^(1/p).
            - "harmonic", or "forward_kl": the power mean of exponent -1.
            - "jensen_shannon", or "jsd": s / (1 - s), log s = sum w_i log(r_i / (1 + r_i)).
            - "min", "max": the limits of the power means; weights say only who takes part.
            - a function of log r, float32 [N, ...], and alpha, float32 [N], of the members of non-zero weight in the
              order policies, prompts, that gives log g, [...]; the places must not depend on each other.
        p: exponent of "power"; any finite number, 0 being the geometric mean of normalised weights.
        base: name of a policy that takes the reference's place in front of g, b(y) g(r(y)) / Z, while the ratios keep
            theirs: a specialised reference. It also proposes where a sampler proposes from the reference.
        blocks: 0-based blocks whose output the vectors are added to; None takes each vector's own default.
        normalize: how the vectors are brought to one length before they are summed: see `personafast.vectors.blend`.
        steering: further steps, `Steering` objects, which act in this order after `vectors` has: other operations,
            positions, schedules.

    Raises:
        PersonafastError: an empty name or text, a weight that is not finite, an unknown aggregator, a negative weight
            where the rule has no meaning for it, weights that sum to zero under a rule that shares them out.
    """

    vectors: Mapping[str, float] = field(default_factory=dict)
    mask: str | None = None
    policies: Mapping[str, float] = field(default_factory=dict)
    prompts: Mapping[str, float] = field(default_factory=dict)
    aggregator: str | Callable[..., Any] = "geometric"
    p: float = 1.0
    base: str | None = None
    blocks: Sequence[int] | None = None
    normalize: str = "none"
    steering: Sequence[Steering] = ()

    def __post_init__(self) -> None:
        for what in ("vectors", "policies", "prompts"):
            object.__setattr__(self, what, checked_weights(what, getattr(self, what)))
        object.__setattr__(self, "steering", _steps(self.steering))
        if self.mask is not None and (not isinstance(self.mask, str) or not self.mask):
            raise PersonafastError(f"mask: expected the name of a mask or None, got {self.mask!r}")
        if self.base is not None and (not isinstance(self.base, str) or not self.base):
            raise PersonafastError(f"base: expected the name of a policy or None, got {self.base!r}")
        if not callable(self.aggregator):
            rule = DIVERGENCES.get(self.aggregator, self.aggregator) if isinstance(self.aggregator, str) else ""
            if rule not in AGGREGATORS:
                known = ", ".join([*AGGREGATORS, *DIVERGENCES])
                raise PersonafastError(f"aggregator: {self.aggregator!r} is not one of {known}, nor a function")
            object.__setattr__(self, "aggregator", rule)
            self._check_weights(rule)
        if not isinstance(self.p, Real) or not math.isfinite(self.p):
            raise PersonafastError(
                f"p: {self.p!r} is not a finite number; use aggregator='min' or 'max' for the limits"
            )
        object.__setattr__(self, "blocks", block_indices(self.blocks))
        normalize_name(self.normalize)

    def _check_weights(self, rule: str) -> None:
        """Every rule but the geometric one shares its weights out: they need a total, and all but one no minus."""
        if rule == "geometric":
            return
        weights = {("policies", name): weight for name, weight in self.policies.items()}
        weights |= {("prompts", name): weight for name, weight in self.prompts.items()}
        if rule != "linear":
            for (what, name), weight in weights.items():
                if weight < 0:
                    raise PersonafastError(
                        f"{what}[{name!r}]: the rule {rule!r} takes no negative weight ({weight:g}); "
                        "use aggregator='geometric'"
                    )
        if weights and sum(weights.values()) <= 0:
            what = "policies" if self.policies else "prompts"
            raise PersonafastError(
                f"{what}: the weights sum to {sum(weights.values()):g}, and the rule {rule!r} shares them out; give a "
                "total above 0, or None for the plain model"
            )

    @property
    def steps(self) -> tuple[Steering, ...]:
        """All steps of steering that can change anything, in the order in which they act."""
        first = (Steering(self.vectors, blocks=self.blocks, normalize=self.normalize),) if self.vectors else ()
        return tuple(step for step in (*first, *self.steering) if step.acts)

    @property
    def has_ratios(self) -> bool:
        """Whether a base takes part, or a policy or prompt of non-zero weight, so that generation needs ratios."""
        return any(self.policies.values()) or any(self.prompts.values()) or self.base is not None


def _steps(given: Any) -> tuple[Steering, ...]:
    steps = (given,) if isinstance(given, Steering) else given
    if not isinstance(steps, Sequence) or isinstance(steps, str):
        raise PersonafastError(f"steering: expected a sequence of Steering, got {type(given).__name__}")
    for step in steps:
        if not isinstance(step, Steering):
            raise PersonafastError(f"steering: expected Steering, got {type(step).__name__}")
    return tuple(steps)
