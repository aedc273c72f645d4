"""Confidence intervals for shares of replies and for the difference of two shares."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

from personafast.errors import PersonafastError


class Interval(NamedTuple):
    """An estimate `rate` with its confidence limits, `low <= rate <= high`."""

    rate: float
    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson score interval of a proportion, without continuity correction.

    With p = successes / n and z the two-sided normal quantile of `confidence`, the limits are the two roots q of
    (p - q)^2 = z^2 q (1 - q) / n. Unlike the textbook p +- z * stderr, it keeps its coverage near 0 and 1.

    Source: Wilson, JASA 22 (1927), 209-212; method 3 of Newcombe, Statistics in Medicine 17 (1998), 857-872.

    Raises:
        PersonafastError: unless 0 <= successes <= n, n >= 1 and 0 < confidence < 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise PersonafastError(
            f"wilson: successes={successes} of n={n} is no proportion; pass 0 <= successes <= n, n >= 1"
        )
    if not 0 < confidence < 1:
        raise PersonafastError(f"wilson: confidence={confidence} must lie strictly between 0 and 1, as 0.95 does")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # At 0 of n and n of n one limit is exact; rounding must not push it past the rate.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == n else centre + half
    return Interval(p, low, high)


def newcombe_difference(successes_a: int, n_a: int, successes_b: int, n_b: int, confidence: float = 0.95) -> Interval:
    """Newcombe's hybrid score interval of the difference a - b of two independent proportions.

    With (p, l, u) the rate and Wilson limits of each: low = d - sqrt((p_a - l_a)^2 + (u_b - p_b)^2) and
    high = d + sqrt((u_a - p_a)^2 + (p_b - l_b)^2), where d = p_a - p_b.

    Source: method 10 of Newcombe, Statistics in Medicine 17 (1998), 873-890.

    Raises:
        PersonafastError: as `wilson`.
    """
    a = wilson(successes_a, n_a, confidence)
    b = wilson(successes_b, n_b, confidence)
    difference = a.rate - b.rate
    return Interval(
        difference,
        difference - math.hypot(a.rate - a.low, b.high - b.rate),
        difference + math.hypot(a.high - a.rate, b.rate - b.low),
    )


def paired_difference(only_a: int, only_b: int, n: int, confidence: float = 0.95) -> Interval:
    """Bonett and Price's interval of the difference a - b of two proportions of the same n cases.

    Of the n cases `only_a` succeeded under a alone and `only_b` under b alone. With p_a = (only_a + 1) / (n + 2), p_b
    likewise and z the two-sided normal quantile: (p_a - p_b) +- z sqrt((p_a + p_b - (p_a - p_b)^2) / (n + 2)), cut at
    -1 and 1. `rate` is the plain difference (only_a - only_b) / n.

    Source: Bonett and Price, Journal of Educational and Behavioral Statistics 37 (2012), 479-488.

    Raises:
        PersonafastError: counts that are negative or exceed n.
    """
    if n < 1 or only_a < 0 or only_b < 0 or only_a + only_b > n:
        raise PersonafastError(f"paired_difference: {only_a} and {only_b} of n={n}; pass counts of n >= 1 cases")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    a, b = ((count + 1) / (n + 2) for count in (only_a, only_b))
    half = z * math.sqrt((a + b - (a - b) ** 2) / (n + 2))
    return Interval((only_a - only_b) / n, max(-1.0, a - b - half), min(1.0, a - b + half))
