import pytest
import torch

from personafast._triton.group_rows import group_rows


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (5, 3), (256, 40), (300, 100), (700, 32), (300, 0)])
def test_rows_by_group_in_their_order(rows, count):
    slots = torch.randint(-2, count + 2, (rows,), dtype=torch.int32)
    groups = torch.where((slots >= 0) & (slots < count), slots, count)
    order, offsets = group_rows(slots, count)
    assert torch.equal(order, groups.argsort(stable=True).int())
    sizes = torch.bincount(groups, minlength=count + 1)
    assert offsets.tolist() == [0, *sizes.cumsum(0).tolist()]


def test_no_rows_and_slots_that_are_not_adjacent():
    order, offsets = group_rows(torch.tensor([1, 9, 0, 9, 1, 9], dtype=torch.int32)[::2], 2)
    assert order.tolist() == [1, 0, 2] and offsets.tolist() == [0, 1, 3, 3]
