import pytest
import torch
from personafast._triton.group_rows import group_rows


@pytest.mark.parametrize(("rows", "count"), [(0, 2), (1, 1), (7, 0), (40, 3), (512, 2), (2600, 4)])
def test_is_a_stable_sort(rows, count):
    g = torch.Generator().manual_seed(rows)
    slots = torch.randint(-2, count + 2, (rows,), generator=g, dtype=torch.int32)
    groups = torch.where((slots >= 0) & (slots < count), slots, count)
    order, offsets = group_rows(slots, count)
    assert order.dtype == offsets.dtype == torch.int32
    assert torch.equal(order.long(), groups.argsort(stable=True))
    sizes = groups.long().bincount(minlength=count + 1)
    assert torch.equal(offsets.long(), torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)]))


def test_slots_that_are_not_adjacent():
    slots = torch.tensor([1, 9, 0, 9, 1, 9], dtype=torch.int32)[::2]
    order, offsets = group_rows(slots, 2)
    assert order.tolist() == [1, 0, 2] and offsets.tolist() == [0, 1, 3, 3]
