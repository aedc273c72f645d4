"""Which pairs of responses count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from personafast.errors import PersonafastError

Judge = Callable[[str, str, str], float]
"""judge(question, response, trait) -> how strongly the response shows the trait, 0 to 100; NaN if it cannot say."""

Scores = tuple[float | None, float | None]
"""(the trait's score, coherence) of one response, None where nobody scored it."""


@dataclass(frozen=True)
class PairFilter:
    """The rule of the persona_vectors project.

    A pair is kept if the positive response shows the trait (score at least `threshold`), the negative one does not
    (score below 100 - `threshold`), and both are coherent (at least `coherence_threshold`). What nobody scored passes;
    NaN does not.

    Attributes:
        judge: scores responses that come without a score.
        coherence: the same for coherence; it is called with the trait "coherence".
        threshold: on the trait's scale of 0 to 100.
        coherence_threshold: likewise.
    """

    judge: Judge | None = None
    coherence: Judge | None = None
    threshold: float = 50.0
    coherence_threshold: float = 50.0

    def __post_init__(self) -> None:
        for name in ("threshold", "coherence_threshold"):
            if not 0 <= getattr(self, name) <= 100:
                raise PersonafastError(f"{name}: {getattr(self, name)} is not in 0 to 100")

    def scores(self, question: str, response: str, trait: str, known: Scores = (None, None)) -> Scores:
        """What is known of a response already, and what the judges say of the rest."""
        score, coherence = known
        if score is None and self.judge is not None:
            score = _number(self.judge(question, response, trait), "judge")
        if coherence is None and self.coherence is not None:
            coherence = _number(self.coherence(question, response, "coherence"), "coherence")
        return score, coherence

    def keeps(self, positive: Scores, negative: Scores) -> bool:
        """Whether a pair counts."""
        shows = positive[0] is None or positive[0] >= self.threshold
        lacks = negative[0] is None or negative[0] < 100 - self.threshold
        clear = all(side[1] is None or side[1] >= self.coherence_threshold for side in (positive, negative))
        return shows and lacks and clear

    def settings(self) -> dict[str, Any]:
        """Thresholds and the judges' names, as plain JSON values."""
        return {
            "judge": _name(self.judge),
            "coherence_judge": _name(self.coherence),
            "threshold": self.threshold,
            "coherence_threshold": self.coherence_threshold,
        }


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise PersonafastError(
            f"{what}: returned {value!r}, which is no number; return NaN where it cannot say"
        ) from None


def _name(judge: Judge | None) -> str | None:
    if judge is None:
        return None
    kind = judge if hasattr(judge, "__qualname__") else type(judge)
    return f"{kind.__module__}.{kind.__qualname__}"
