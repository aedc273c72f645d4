"""Interleaved timing: every round takes one sample of every contender, in an order drawn anew.

On a shared machine the speed of memory changes from one second to the next. Samples of one round share its weather, so
ratios are formed inside a round; their median is what is reported.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

MIN_ROUNDS, MAX_ROUNDS = 5, 300
# A sample lasts at least this long; shorter calls are repeated within it.
SAMPLE_SECONDS = 200e-6
MAX_REPEATS = 1000

# Takes one sample: seconds a call.
Sample = Callable[[], float]


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high)


class Rotation:
    """Hands out buffer sets in turn, so that each is cold again when its turn comes."""

    def __init__(self, buffers: Sequence[Any]) -> None:
        self.buffers = buffers
        self._turn = 0

    def next(self) -> Any:
        self._turn = (self._turn + 1) % len(self.buffers)
        return self.buffers[self._turn]


def timed_calls(run: Callable[[Any], Any], rotation: Rotation) -> Sample:
    """A sample of `run` over the next buffers of `rotation`: one call, or as many as last long enough to be timed."""

    def sample(repeats: int) -> float:
        began = time.perf_counter()
        for _ in range(repeats):
            run(rotation.next())
        return (time.perf_counter() - began) / repeats

    # Twice: the first call pays for what is set up lazily.
    sample(1)
    repeats = min(MAX_REPEATS, max(1, round(SAMPLE_SECONDS / sample(2))))
    return lambda: sample(repeats)


def interleave(
    samples: Mapping[str, Sample], seconds: float, min_rounds: int = MIN_ROUNDS, max_rounds: int = MAX_ROUNDS
) -> dict[str, list[float]]:
    """Seconds a call of every contender, round by round, for about `seconds` in all."""
    taken: dict[str, list[float]] = {name: [] for name in samples}
    order = list(samples)
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        # A first round that does not count warms up caches, pages and threads.
        for name in order:
            samples[name]()
        end = time.perf_counter() + seconds
        for turn in range(max_rounds):
            if turn >= min_rounds and time.perf_counter() > end:
                break
            shuffle(order)
            for name in order:
                taken[name].append(samples[name]())
    finally:
        if collecting:
            gc.enable()
    return taken


def paired(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """Spread of the ratios formed round by round."""
    return spread([above / below for above, below in zip(numerator, denominator, strict=True)])
