"""How samples taken in turns get into pytest-benchmark, which times one function after the other.

A test hands its samples to a clock that stands still until a sample is played, and is the timer of pytest-benchmark.
Its tables, its comparisons and its JSON are thus of the interleaved samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ReplayClock:
    """A timer whose time passes by `play` alone."""

    __name__ = "replay_of_interleaved_samples"

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def play(self, seconds: float) -> None:
        self._now += seconds


CLOCK = ReplayClock()


def replay(benchmark: Any, samples: Sequence[float]) -> None:
    """Give `samples`, seconds a call, to a `benchmark` fixture whose timer is `CLOCK`."""
    remaining = iter(samples)
    benchmark.pedantic(CLOCK.play, setup=lambda: ((next(remaining),), {}), rounds=len(samples))
