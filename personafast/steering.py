"""One step of steering: which vectors do what to the residual stream, at which tokens, how strongly over time."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from personafast.errors import PersonafastError
from personafast.vectors.blend import NORMALIZATIONS

OPERATIONS = ("add", "ablate", "clamp", "norm_preserving", "replace")
POSITIONS = ("all", "prompt", "response", "last")
_LARGEST = 3.4028234663852886e38  # of float32

Span = tuple[int, int | None]


def finite(what: str, value: Any) -> float:
    """`value` as a float that float32 holds.

    Raises:
        PersonafastError: it is none, naming the argument `what`.
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        raise PersonafastError(f"{what}: {value!r} is not a number") from None
    if not abs(found) <= _LARGEST:
        raise PersonafastError(f"{what}: {found}; give a number that is finite in float32")
    return found


def checked_weights(what: str, given: Mapping[str, float]) -> dict[str, float]:
    """Name -> weight as floats that float32 holds; raises `PersonafastError` naming the entry."""
    if not isinstance(given, Mapping):
        raise PersonafastError(f"{what}: expected a mapping of name to number, got {type(given).__name__}")
    checked: dict[str, float] = {}
    for name, weight in given.items():
        if not isinstance(name, str) or not name.strip():
            raise PersonafastError(f"{what}: a name is empty; give every entry a name (for prompts: the system text)")
        checked[name] = finite(f"{what}[{name!r}]", weight)
    return checked


def block_indices(given: Sequence[int] | None) -> tuple[int, ...] | None:
    """0-based blocks as plain integers; None stays None."""
    if given is None:
        return None
    try:
        return tuple(operator.index(block) for block in given)
    except TypeError:
        raise PersonafastError(f"blocks: {given!r} is not a sequence of 0-based block indices") from None


def normalize_name(given: str) -> str:
    """A known way to normalise the vectors of a blend."""
    if given not in NORMALIZATIONS:
        raise PersonafastError(f"normalize: {given!r} is not one of {', '.join(NORMALIZATIONS)}")
    return given


@dataclass(frozen=True)
class FirstTokens:
    """Full strength until `tokens` tokens have been written, nothing after: s < tokens (see `Steering.schedule`)."""

    tokens: int

    def __post_init__(self) -> None:
        _at_least_one("schedule: FirstTokens.tokens", self.tokens)


@dataclass(frozen=True)
class LinearSchedule:
    """From `start` to `end` over `steps` tokens, and `end` from then on: start + (end - start) min(s / steps, 1)."""

    steps: int
    start: float = 1.0
    end: float = 0.0

    def __post_init__(self) -> None:
        _at_least_one("schedule: LinearSchedule.steps", self.steps)
        for name in ("start", "end"):
            object.__setattr__(self, name, finite(f"schedule: LinearSchedule.{name}", getattr(self, name)))


@dataclass(frozen=True)
class Steering:
    """One step: what the blended direction d of some vectors does to the residual stream h at the output of blocks.

    With u = d / |d| and a = strength times the schedule's value at the token:

    - "add" (arXiv 2510.10157): h + a d.
    - "ablate" (arXiv 2406.11717, section 2.4): h - a (h.u) u.
    - "clamp": h + a (c - h.u) u, c being h.u held in `low` to `high`, or `target`.
    - "norm_preserving": h + a d, brought back to the norm of h.
    - "replace": (1 - a) h + a d.

    Args:
        vectors: persona vector name -> coefficient c; d = sum c_i v_i, one row a block however many there are.
        operation: one of the above.
        blocks: 0-based blocks it acts at; None takes each vector's own.
        normalize: how the vectors are brought to one length before they are summed: see `personafast.vectors.blend`.
        positions: the tokens of a row it acts at, counted without padding.

            - "all": every token.
            - "prompt": the prompt's.
            - "response": those that lead to a generated token: the last of the prompt and all that follow it
              (persona_vectors' convention).
            - "last": the last token of the prompt.
            - spans [(start, stop), ...], stop exclusive and None for no end. A negative start counts both ends from
              the prompt's end: (-3, 0) are its last three tokens, (-1, 4) the last and four generated ones. Otherwise
              a negative stop counts from the prompt's end: (2, -1) leaves out two tokens before and one behind.

        schedule: over s, the number of the generated token that a token leads to: 0 for the prompt, whose last token
            leads to the first one, 1 for the first generated token, and so on. "constant", `FirstTokens`,
            `LinearSchedule`, or as text "first:16", "linear:32", "linear:32:1.0:0.25" (steps, start, end).
        strength: a where the schedule is 1.
        low, high: range of "clamp", in units of h; either may be left out.
        target: of "clamp", in place of a range.

    Raises:
        PersonafastError: naming the argument.
    """

    vectors: Mapping[str, float] = field(default_factory=dict)
    operation: str = "add"
    blocks: Sequence[int] | None = None
    normalize: str = "none"
    positions: str | Sequence[Span] = "all"
    schedule: str | FirstTokens | LinearSchedule = "constant"
    strength: float = 1.0
    low: float | None = None
    high: float | None = None
    target: float | None = None

    def __post_init__(self) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        if self.operation not in OPERATIONS:
            raise PersonafastError(f"operation: {self.operation!r} is not one of {', '.join(OPERATIONS)}")
        put("vectors", checked_weights("vectors", self.vectors))
        if not self.vectors:
            raise PersonafastError("vectors: empty; name at least one vector of the library")
        if self.operation != "add" and not any(self.vectors.values()):
            raise PersonafastError(
                f"vectors: every coefficient is 0, which leaves no direction to {_VERB[self.operation]}; "
                "use strength=0 to switch the step off"
            )
        put("blocks", block_indices(self.blocks))
        normalize_name(self.normalize)
        put("positions", parse_positions(self.positions))
        put("schedule", parse_schedule(self.schedule))
        put("strength", finite("strength", self.strength))
        for name in ("low", "high", "target"):
            value = getattr(self, name)
            if value is not None:
                put(name, finite(name, value))
        self._check_range()

    def _check_range(self) -> None:
        given = [name for name in ("low", "high", "target") if getattr(self, name) is not None]
        if self.operation != "clamp":
            if given:
                raise PersonafastError(f"{given[0]}: only operation='clamp' has one, this is {self.operation!r}")
        elif not given:
            raise PersonafastError("operation: 'clamp' needs low, high or both, or a target")
        elif "target" in given and len(given) > 1:
            raise PersonafastError(f"target: stands in place of a range; leave {given[0]} out, or the target")
        elif self.low is not None and self.high is not None and self.low > self.high:
            raise PersonafastError(f"low: {self.low:g} is above high, {self.high:g}; exchange them")

    @property
    def range(self) -> tuple[float, float]:
        """Lower and upper bound of "clamp"; infinite where it has none."""
        if self.target is not None:
            return self.target, self.target
        return -math.inf if self.low is None else self.low, math.inf if self.high is None else self.high

    @property
    def acts(self) -> bool:
        """Whether it can change anything."""
        return self.strength != 0 and any(self.vectors.values())


_VERB = {"ablate": "ablate", "clamp": "clamp", "norm_preserving": "add", "replace": "put in place"}


def parse_positions(given: str | Sequence[Span]) -> str | tuple[Span, ...]:
    """A position mode, or spans; of a text also "3:8,-2:0" (a stop may be left out)."""
    if isinstance(given, str):
        if given in POSITIONS:
            return given
        try:
            read = [_span(part) for part in given.split(",")]
        except ValueError:
            known = ", ".join(POSITIONS)
            raise PersonafastError(f"positions: {given!r} is not one of {known}, nor spans like 3:8,-2:0") from None
        return parse_positions(read)
    try:
        spans = tuple((operator.index(start), None if stop is None else operator.index(stop)) for start, stop in given)
    except (TypeError, ValueError):
        raise PersonafastError(
            f"positions: {given!r} is neither one of {', '.join(POSITIONS)} nor a sequence of (start, stop)"
        ) from None
    if not spans:
        raise PersonafastError("positions: no span; give at least one (start, stop), or a mode")
    for start, stop in spans:
        # Where one end counts from the row's beginning and the other from the prompt's end, only the row can tell.
        if stop is not None and (start < 0 or stop >= 0) and stop <= start:
            raise PersonafastError(f"positions: the span ({start}, {stop}) is empty or reversed; give start < stop")
    return spans


def _span(text: str) -> Span:
    start, colon, stop = text.partition(":")
    if not colon:
        raise ValueError(text)
    return int(start), int(stop) if stop.strip() else None


def parse_schedule(given: str | FirstTokens | LinearSchedule) -> str | FirstTokens | LinearSchedule:
    """A schedule, or "constant"; of a text also "first:16", "linear:32" and "linear:32:1.0:0.25"."""
    if isinstance(given, (FirstTokens, LinearSchedule)):
        return given
    if isinstance(given, str):
        name, *numbers = given.split(":")
        try:
            if name == "constant" and not numbers:
                return given
            if name == "first" and len(numbers) == 1:
                return FirstTokens(int(numbers[0]))
            if name == "linear" and len(numbers) in (1, 3):
                return LinearSchedule(int(numbers[0]), *map(float, numbers[1:]))
        except PersonafastError:  # read, and out of range
            raise
        except ValueError:
            pass
    raise PersonafastError(
        f"schedule: {given!r} is none of 'constant', 'first:TOKENS', 'linear:STEPS', 'linear:STEPS:START:END', "
        "FirstTokens or LinearSchedule"
    )


def _at_least_one(what: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PersonafastError(f"{what}: {value!r} is not a whole number of at least 1")
