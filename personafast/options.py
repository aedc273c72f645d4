"""How to sample: what `PersonaHandle.generate` takes beside `model.generate`'s own arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from personafast.density.scr import ScrOptions
from personafast.errors import PersonafastError

SAMPLERS = ("direct", "verify", "block", "mixture", "token_rs", "scr", "merge", "auto")
DRAFTS = ("auto", "reference", "merge", "ngram")


@dataclass(frozen=True)
class Options:
    """The samplers' settings; `PersonaHandle.generate` says what each means."""

    sampler: str = "direct"
    seed: int | None = None
    seeds: Sequence[int] | None = None
    min_p: float | None = None
    policy_temperature: float = 1.0
    carry: bool = False
    chunk: int | None = None
    draft: Any = "auto"
    draft_scale: float = 0.85
    draft_doubt: float = 0.05
    retries: int = 64
    scr: ScrOptions = ScrOptions()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise PersonafastError(f"sampler: {self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        if isinstance(self.draft, str) and self.draft not in DRAFTS:
            raise PersonafastError(
                f"draft: {self.draft!r} is not one of {', '.join(DRAFTS)}, nor a model or a Drafter of your own"
            )
        if not isinstance(self.scr, ScrOptions):
            raise PersonafastError(f"scr_options: expected ScrOptions or None, got {type(self.scr).__name__}")
        if self.seed is not None and not isinstance(self.seed, Integral):
            raise PersonafastError(f"seed: {self.seed!r} is not a whole number")
        for name in ("min_p", "policy_temperature", "draft_scale", "draft_doubt"):
            number = getattr(self, name)
            if number is not None and not isinstance(number, Real):
                raise PersonafastError(f"{name}: {number!r} is not a number")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise PersonafastError(f"min_p: {self.min_p} is not in [0, 1]")
        if not 0 < self.policy_temperature < float("inf"):
            raise PersonafastError(f"policy_temperature: {self.policy_temperature} is not finite and above 0")
        if not 0 < self.draft_scale < float("inf"):
            raise PersonafastError(f"draft_scale: {self.draft_scale} is not finite and above 0")
        if not 0 <= self.draft_doubt <= 1:
            raise PersonafastError(f"draft_doubt: {self.draft_doubt} is not in [0, 1]")
        for name, value in (("chunk", self.chunk), ("retries", self.retries)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise PersonafastError(f"{name}: {value!r} is not a whole number of at least 1")
