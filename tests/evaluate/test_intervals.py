import math

import pytest
from scipy.stats import binomtest

from personafast.errors import PersonafastError
from personafast.evaluate import newcombe_difference, paired_difference, wilson


# Newcombe, Statistics in Medicine 17 (1998), 857-872, table I, method 3.
@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_matches_the_published_table(successes, n, low, high):
    interval = wilson(successes, n)
    assert interval.rate == successes / n
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize(("successes", "n"), [(0, 1), (1, 1), (3, 7), (399, 400), (400, 400)])
def test_wilson_matches_scipy(successes, n, confidence):
    expected = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    interval = wilson(successes, n, confidence)
    assert interval.low == pytest.approx(expected.low, abs=1e-12)
    assert interval.high == pytest.approx(expected.high, abs=1e-12)
    assert interval.low <= interval.rate <= interval.high


# Newcombe, Statistics in Medicine 17 (1998), 873-890, table II, method 10.
@pytest.mark.parametrize(
    ("a", "m", "b", "n", "low", "high"),
    [
        (56, 70, 48, 80, 0.0524, 0.3339),
        (9, 10, 3, 10, 0.1705, 0.8090),
        (5, 56, 0, 29, -0.0381, 0.1926),
        (0, 10, 0, 20, -0.1611, 0.2775),
        (10, 10, 0, 20, 0.6791, 1.0),
        (10, 10, 0, 10, 0.6075, 1.0),
    ],
)
def test_newcombe_matches_the_published_table(a, m, b, n, low, high):
    interval = newcombe_difference(a, m, b, n)
    assert interval.rate == pytest.approx(a / m - b / n)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)


def test_newcombe_is_antisymmetric():
    forward, backward = newcombe_difference(30, 40, 9, 50), newcombe_difference(9, 50, 30, 40)
    assert math.isclose(forward.low, -backward.high) and math.isclose(forward.high, -backward.low)


@pytest.mark.parametrize(("successes", "n", "confidence"), [(1, 0, 0.95), (-1, 5, 0.95), (6, 5, 0.95), (1, 5, 1.0)])
def test_impossible_counts_are_refused_by_name(successes, n, confidence):
    with pytest.raises(PersonafastError, match="wilson: "):
        wilson(successes, n, confidence)


def test_paired_difference_is_the_formula_and_antisymmetric():
    # p_a = 13 / 102, p_b = 4 / 102, and z = 1.959964.
    found = paired_difference(12, 3, 100)
    half = 1.959964 * math.sqrt((17 / 102 - (9 / 102) ** 2) / 102)
    assert found.rate == pytest.approx(0.09)
    assert (found.low, found.high) == pytest.approx((9 / 102 - half, 9 / 102 + half), abs=1e-6)
    other = paired_difference(3, 12, 100)
    assert (other.rate, other.low, other.high) == pytest.approx((-found.rate, -found.high, -found.low))
    assert paired_difference(5, 0, 5).high == 1.0


def test_paired_difference_covers_what_it_says():
    """95 % limits hold the true difference in about 95 of 100 samples, also where few cases differ."""
    import random

    draw = random.Random(0)
    for only_a, only_b, n in ((0.10, 0.02, 100), (0.30, 0.30, 60)):
        held = 0
        for _ in range(2000):
            outcomes = [draw.random() for _ in range(n)]
            a = sum(value < only_a for value in outcomes)
            b = sum(only_a <= value < only_a + only_b for value in outcomes)
            low, high = paired_difference(a, b, n)[1:]
            held += low <= only_a - only_b <= high
        assert 0.935 < held / 2000 < 0.985


@pytest.mark.parametrize(("a", "b", "n"), [(1, 0, 0), (-1, 0, 5), (3, 3, 5)])
def test_impossible_pairs_are_refused(a, b, n):
    with pytest.raises(PersonafastError, match="paired_difference: "):
        paired_difference(a, b, n)
