import itertools

import pytest
import torch

from personafast import ops
from personafast.ops import _inject

KINDS = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize(
    ("kinds", "width", "scaled"), [*itertools.product(KINDS, (1, 127, 130, 1030), (False, True))], ids=str
)
def test_equals_the_reference(kinds, width, scaled):
    dtype, bank_dtype = kinds
    g = torch.Generator().manual_seed(width)
    wide = torch.randn(4, width + 3, generator=g).to(dtype)
    bank = torch.randn(3, width, generator=g).to(bank_dtype)
    slots = torch.tensor([1, -1, 2, 0], dtype=torch.int32)
    scale = torch.randn(4, generator=g) if scaled else None
    expected = wide.clone()
    _inject.reference(expected[:, :width], bank, slots, scale)
    ops.inject_(wide[:, :width], bank, slots, scale)
    if dtype == torch.bfloat16:  # the interpreter truncates where hardware rounds
        torch.testing.assert_close(wide.float(), expected.float(), rtol=2**-7, atol=0)
    else:
        assert torch.equal(wide, expected)


def test_no_rows_and_columns_that_are_not_adjacent():
    ops.inject_(torch.empty(0, 5), torch.ones(1, 5), torch.empty(0, dtype=torch.int32))
    hidden = torch.zeros(6, 4).T
    ops.inject_(hidden, torch.ones(6, 1).T.contiguous(), torch.zeros(4, dtype=torch.int32))
    assert torch.equal(hidden, torch.ones(4, 6))


def test_a_slot_out_of_range_leaves_its_row_alone():
    hidden = torch.zeros(3, 4)
    ops.inject_(hidden, torch.ones(2, 4), torch.tensor([2, -7, 1], dtype=torch.int32))
    assert torch.equal(hidden, torch.tensor([0.0, 0.0, 1.0])[:, None].expand(3, 4))
