"""Selection equals a stable sort of everything, whatever ties, zeros and group sizes do."""

import pytest
import torch

from personafast.masks.selection import best_of_all, best_of_rows, kth_largest


def by_sorting(levels, keep):
    """The definition: order by the levels in turn, then by index, and keep the first ones. Levels are [n]."""
    columns = [level.tolist() for level in levels]
    order = sorted(range(len(columns[0])), key=lambda i: [-column[i] for column in columns])
    mask = torch.zeros(len(columns[0]), dtype=torch.bool)
    mask[torch.tensor(order[:keep], dtype=torch.long)] = True
    return mask


def draw(kind, rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    plain = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    return {
        "distinct": plain,
        "tied": (plain * 4).floor(),
        "zeros": plain * (plain > 0.7),
        "equal": torch.ones_like(plain),
        "none": torch.zeros_like(plain),
        "tiny": plain * 1e-310,
        "wide": torch.exp(200 * (plain - 0.5)),
    }[kind]


KINDS = ["distinct", "tied", "zeros", "equal", "none", "tiny", "wide"]


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", [None, "tied", "zeros", "distinct"])
def test_rows(first, second):
    levels = tuple(draw(kind, 5, 37, seed) for seed, kind in enumerate((first, second)) if kind)
    for keep in (0, 1, 18, 36, 37):
        found = best_of_rows(levels, keep)
        expected = torch.stack([by_sorting([level[row] for level in levels], keep) for row in range(5)])
        assert torch.equal(found, expected)


@pytest.mark.parametrize("few", [0, 1 << 22])
@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", [None, "tied", "zeros"])
def test_several_matrices_together(monkeypatch, few, first, second):
    monkeypatch.setattr("personafast.masks.selection._FEW", few)
    shapes = [(3, 7), (1, 20), (4, 5)]
    drawn = [
        tuple(draw(kind, *shape, 10 * place + seed) for seed, kind in enumerate((first, second)) if kind)
        for place, shape in enumerate(shapes)
    ]
    for keep in (0, 1, 30, 60, 61):
        found = best_of_all([lambda levels=levels: levels for levels in drawn], keep)
        flat = [torch.cat([levels[i].flatten() for levels in drawn]) for i in range(len(drawn[0]))]
        assert torch.equal(torch.cat([mask.flatten() for mask in found]), by_sorting(flat, keep))
        assert [tuple(mask.shape) for mask in found] == shapes


def test_the_kth_largest_counts_what_is_larger_and_equal():
    parts = [torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64), torch.tensor([2.0, 0.0, -0.0], dtype=torch.float64)]
    assert kth_largest(lambda: parts, 2) == (2.0, 1, 2)
    assert kth_largest(lambda: parts, 6) == (0.0, 4, 2)
    assert kth_largest(lambda: parts, 0) == (float("inf"), 0, 0)


def test_the_number_of_threads_has_no_part_in_it():
    level = draw("tied", 64, 512, 3)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append((best_of_rows((level,), 200), best_of_all([lambda: (level,)], 20_000)[0]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
