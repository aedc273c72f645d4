"""What one row of a batch speaks as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from personafast.errors import PersonafastError

AGGREGATORS = ("geometric", "linear")
_LARGEST = 3.4028234663852886e38  # of float32


def _weights(what: str, given: Mapping[str, float]) -> dict[str, float]:
    if not isinstance(given, Mapping):
        raise PersonafastError(f"{what}: expected a mapping of name to number, got {type(given).__name__}")
    checked: dict[str, float] = {}
    for name, weight in given.items():
        if not isinstance(name, str) or not name.strip():
            raise PersonafastError(f"{what}: a name is empty; give every entry a name (for prompts: the system text)")
        try:
            value = float(weight)
        except (TypeError, ValueError):
            raise PersonafastError(f"{what}[{name!r}]: {weight!r} is not a number") from None
        if not abs(value) <= _LARGEST:
            raise PersonafastError(f"{what}[{name!r}]: the weight is {value}; give a number that is finite in float32")
        checked[name] = value
    return checked


@dataclass(frozen=True)
class Persona:
    """A persona: vectors with coefficients, a mask or none, policies and prompts with weights (METHODS, section 4).

    Args:
        vectors: persona vector name -> coefficient c. Their sum, sum_i c_i v_i, is added to the residual stream
            (arXiv 2510.10157). The blend is one row per block, so its cost does not grow with the number of vectors.
        mask: name of a persona mask; the linears use W * M (arXiv 2602.07164).
        policies: LoRA policy name -> weight alpha of its density ratio pi_i / pi_0 (arXiv 2511.01891). Weights are
            not normalised: 1 is the trait at full strength.
        prompts: system text -> weight alpha; the policy is the same model under that system prompt,
            r_i = pi(. | text, Y) / pi(. | Y). Needs no training.
        aggregator: how the ratios meet: "geometric" (pi_0 prod r_i^alpha_i, blends) or "linear" (sum alpha_i pi_i,
            a mixture that speaks as one persona at a time).
        blocks: 0-based blocks whose output the vectors are added to; None takes each vector's own default.

    Raises:
        PersonafastError: an empty name or text, a weight that is not finite, an unknown aggregator.
    """

    vectors: Mapping[str, float] = field(default_factory=dict)
    mask: str | None = None
    policies: Mapping[str, float] = field(default_factory=dict)
    prompts: Mapping[str, float] = field(default_factory=dict)
    aggregator: str = "geometric"
    blocks: Sequence[int] | None = None

    def __post_init__(self) -> None:
        for what in ("vectors", "policies", "prompts"):
            object.__setattr__(self, what, _weights(what, getattr(self, what)))
        if self.mask is not None and (not isinstance(self.mask, str) or not self.mask):
            raise PersonafastError(f"mask: expected the name of a mask or None, got {self.mask!r}")
        if self.aggregator not in AGGREGATORS:
            raise PersonafastError(f"aggregator: {self.aggregator!r} is not one of {', '.join(AGGREGATORS)}")
        if self.aggregator == "linear":
            for what in ("policies", "prompts"):
                for name, weight in getattr(self, what).items():
                    if weight < 0:
                        raise PersonafastError(
                            f"{what}[{name!r}]: the linear rule is a mixture and takes no negative weight "
                            f"({weight:g}); use aggregator='geometric'"
                        )
        if self.blocks is not None:
            object.__setattr__(self, "blocks", tuple(int(block) for block in self.blocks))

    @property
    def has_ratios(self) -> bool:
        """Whether a policy or a prompt of non-zero weight takes part, so that generation needs density ratios."""
        return any(self.policies.values()) or any(self.prompts.values())
