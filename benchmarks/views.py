"""Views of a run in which many ways to decode take turns: what is compared with what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import machine
from benchmarks.decode import Shape, parameters
from benchmarks.measure import Measurement, rounded
from benchmarks.sampler import paired, spread


@dataclass(frozen=True)
class View:
    """What a case compares.

    Attributes:
        name: what `-k` selects by.
        baseline: the contender that the others are compared with.
        goals: the other contenders, and how many times as fast they have to be; None for no goal.
        rows: rows decoded at once.
    """

    name: str
    baseline: str
    goals: Mapping[str, float | None]
    rows: int = 1

    @property
    def contenders(self) -> tuple[str, ...]:
        """All of them, the baseline first."""
        return (self.baseline, *self.goals)


@dataclass(frozen=True)
class Run:
    """What was timed in turns.

    Attributes:
        shape: the model.
        taken: seconds a step of every contender, round by round.
        absent: why others were not timed.
        read: GB/s that memory was read at, round by round.
        weights: bytes of weights that a step reads.
        tokens: tokens of a sample.
    """

    shape: Shape
    taken: Mapping[str, Sequence[float]]
    absent: Mapping[str, str]
    read: Sequence[float]
    weights: int
    tokens: int

    def seen_as(self, view: View) -> Measurement:
        """The samples of a view's contenders, and its record for the results."""
        record = {
            "name": view.name,
            "model": {**self.shape.config, "parameters": parameters(self.shape), "dtype": "bfloat16"},
            "rows": view.rows,
            "tokens": self.tokens,
            "date": machine.today(),
            "commit": machine.commit(),
            "rounds": len(self.read),
            "read_bandwidth_gb_s": rounded(spread(self.read)),
            "baseline": view.baseline,
            "contenders": {
                name: {"absent": self.absent[name]} if name in self.absent else self._figures(name, view)
                for name in view.contenders
            },
        }
        present = {name: list(self.taken[name]) for name in view.contenders if name in self.taken}
        return Measurement(present, record, {name: why for name, why in self.absent.items() if name in view.contenders})

    def _figures(self, name: str, view: View) -> dict[str, Any]:
        taken = self.taken[name]
        median = spread(taken).median
        entry: dict[str, Any] = {
            "microseconds": rounded(spread([1e6 * seconds for seconds in taken])),
            "tokens_per_s": float(f"{view.rows / median:.4g}"),
            "bytes": self.weights,
            "gb_s": float(f"{self.weights / median / 1e9:.4g}"),
            "share_of_read_bandwidth": rounded(paired([self.weights / seconds / 1e9 for seconds in taken], self.read)),
        }
        if name != view.baseline:
            entry["times_faster"] = rounded(paired(self.taken[view.baseline], taken))
            if view.goals[name] is not None:
                entry["goal"] = view.goals[name]
        return entry
