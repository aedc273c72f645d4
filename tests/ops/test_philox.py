import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast.errors import PersonafastError
from personafast.ops import philox, use_backend

# kat_vectors of Random123 (Salmon et al.), philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
INT64 = st.integers(-(2**63), 2**63 - 1)


def words(text):
    return torch.tensor([int(word, 16) for word in text.split()])


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_known_answers(counter, key, result):
    assert torch.equal(philox.philox4x32(words(counter), words(key)), words(result))


def by_hand(seed, position, stream, i):
    """The i-th number of a row, in Python's integers."""
    mask = 2**32 - 1
    c = [position & mask, position >> 32 & mask, stream, i // 2]
    k = [seed & mask, seed >> 32 & mask]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & mask, a >> 32 ^ c[3] ^ k[1], a & mask]
        k = [k[0] + 0x9E3779B9 & mask, k[1] + 0xBB67AE85 & mask]
    high, low = c[i % 2 * 2 : i % 2 * 2 + 2]
    return (2 * ((high >> 6) * 2**26 + (low >> 6)) + 1) / 2**53


@settings(deadline=None, max_examples=60)
@given(rows=st.lists(st.tuples(INT64, INT64), max_size=5), stream=st.integers(0, 2**32 - 1), n=st.integers(0, 5))
def test_cpp_and_torch_give_the_bits_of_the_definition(rows, stream, n):
    pytest.importorskip("personafast._C")
    seeds, positions = (torch.tensor([row[i] for row in rows], dtype=torch.int64) for i in (0, 1))
    fast = philox.uniform(seeds, positions, stream, n)
    assert fast.shape == (len(rows), n) and fast.dtype == torch.float64
    with use_backend("reference"):
        assert torch.equal(fast, philox.uniform(seeds, positions, stream, n))
    assert fast.tolist() == [[by_hand(seed, position, stream, i) for i in range(n)] for seed, position in rows]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_draw_depends_on_its_own_row_alone(backend):
    seeds, positions = torch.arange(6) * 977, torch.arange(6)
    with use_backend(backend):
        together = philox.uniform(seeds, positions, 3, 4)
        for b in range(6):
            assert torch.equal(philox.uniform(seeds[b : b + 1], positions[b : b + 1], 3, 2)[0], together[b, :2])
        assert not torch.equal(philox.uniform(seeds, positions, 4, 4), together)
        assert not torch.equal(philox.uniform(seeds, positions + 1, 3, 4), together)
        assert not torch.equal(philox.uniform(seeds + 1, positions, 3, 4), together)


def test_uniform_over_seeds_positions_and_within_a_row():
    count = 100_000
    index, zero = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    draws = [
        philox.uniform(index, zero, 0)[:, 0],
        philox.uniform(zero, index, 0)[:, 0],
        philox.uniform(zero[:1], zero[:1], 0, count)[0],
    ]
    for u in draws:
        assert u.min() > 0 and u.max() < 1
        bins = torch.histc(u, 100, 0, 1)
        chi2 = ((bins - count / 100) ** 2 / (count / 100)).sum()
        assert 50 < chi2 < 160  # 99 degrees of freedom: outside once in 1e5 and more
        assert abs((u * (index % 2 * 2 - 1)).mean()) < 5 * (1 / 3 / count) ** 0.5
    assert abs(torch.corrcoef(torch.stack(draws))[0, 1]) < 5 / count**0.5


@pytest.mark.parametrize(("word", "expected"), [(0, 2.0**-53), (2**32 - 1, 1 - 2.0**-53)])
def test_the_ends_are_never_reached(word, expected, monkeypatch):
    monkeypatch.setattr(philox, "philox4x32", lambda counter, key: torch.full_like(counter, word))
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox.reference(zero, zero, 0, 2).tolist() == [[expected, expected]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": torch.zeros(2)}, "`seeds` has dtype float32"),
        (
            {"seeds": torch.zeros(2, 1, dtype=torch.int64), "positions": torch.zeros(2, 1, dtype=torch.int64)},
            r"\[2, 1\]",
        ),
        ({"positions": torch.zeros(3, dtype=torch.int64)}, r"`positions` has shape \[3\]"),
        ({"stream": -1}, "`stream` is -1"),
        ({"stream": 2**32}, "`stream` is 4294967296"),
        ({"n": -1}, "`n` is -1"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {"seeds": torch.zeros(2, dtype=torch.int64), "positions": torch.zeros(2, dtype=torch.int64), "stream": 0}
    with pytest.raises(PersonafastError, match=message):
        philox.uniform(**{**good, **change})
