import gc

import pytest

from benchmarks.sampler import Rotation, interleave, paired, spread, timed_calls


def test_every_round_asks_every_contender_once():
    asked = []

    def contender(name):
        return lambda: asked.append(name) or float(len(asked))

    taken = interleave({name: contender(name) for name in "abc"}, 0.0, min_rounds=8, max_rounds=8)
    rounds = ["".join(asked[start : start + 3]) for start in range(0, len(asked), 3)]
    assert len(rounds) == 9 and all(sorted(turn) == list("abc") for turn in rounds)
    # The first round warms up, and the order is not always the same.
    assert len(set(rounds[1:])) > 1
    assert all(len(samples) == 8 and min(samples) > 3 for samples in taken.values())
    assert gc.isenabled()


def test_time_bounds_the_rounds():
    taken = interleave({"a": lambda: 1.0}, 0.0, min_rounds=2, max_rounds=100)
    assert len(taken["a"]) == 2
    taken = interleave({"a": lambda: 1.0}, 60.0, min_rounds=2, max_rounds=10)
    assert len(taken["a"]) == 10


def test_a_buffer_comes_again_only_after_all_others():
    rotation = Rotation("abcd")
    seen = "".join(rotation.next() for _ in range(12))
    assert sorted(seen[:4]) == list("abcd") and seen[:4] == seen[4:8] == seen[8:]


def test_short_calls_are_repeated_within_a_sample():
    calls = []
    sample = timed_calls(calls.append, Rotation(range(5)))
    calls.clear()
    seconds = sample()
    assert len(calls) > 50 and set(calls) == set(range(5)) and 0 < seconds < 1e-4


def test_spreads_and_ratios():
    assert spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (3.0, 2.0, 4.0)
    assert spread([7.0]) == (7.0, 7.0, 7.0)
    # Round by round: the noise that both share cancels.
    assert paired([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == (2.0, 2.0, 2.0)
    with pytest.raises(ValueError):
        paired([1.0, 2.0], [1.0])
