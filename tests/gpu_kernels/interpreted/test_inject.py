import itertools

import pytest
import torch
from personafast._triton import launch
from personafast._triton.inject import inject_config

from personafast import ops
from personafast.errors import BackendError
from personafast.ops import _inject

KINDS = [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


@pytest.fixture(params=["one wave", "several waves"])
def waves(request, monkeypatch):
    """Both orders of reading: as on a GPU that holds all programs at once, and as on one that holds none."""
    if request.param == "several waves":
        monkeypatch.setattr(launch, "INTERPRETED", launch.INTERPRETED._replace(multiprocessors=0))


@pytest.mark.parametrize(
    ("kinds", "width", "scaled"), [*itertools.product(KINDS, (1, 127, 130, 1030), (False, True))], ids=str
)
def test_equals_the_reference(kinds, width, scaled, waves):
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


@pytest.mark.parametrize("width", [896, 1536, 2880, 5120, 11008])
def test_widths_of_real_models(width):
    hidden, bank = torch.randn(1, width).half(), torch.randn(2, width).half()
    expected = (hidden.float() + bank[1].float()).half()
    assert torch.equal(ops.inject_(hidden, bank, torch.tensor([1], dtype=torch.int32)), expected)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_blocks_leave_few_threads_idle(itemsize):
    for width in (896, 1536, 2048, 2880, 3584, 4096, 5120, 8192, 11008, 14336):
        config = inject_config(width, itemsize, True)
        block, threads = config.constants["BLOCK"], 32 * config.options["num_warps"]
        assert -(-width // block) * block <= width * 4 / 3
        assert block * itemsize == 32 * threads  # two accesses of 16 bytes a thread
        assert threads >= 64  # 32 programs, the most a multiprocessor holds, fill it
    assert inject_config(5, itemsize, True).constants["BLOCK"] == 128


def test_no_rows_and_columns_that_are_not_adjacent():
    ops.inject_(torch.empty(0, 5), torch.ones(1, 5), torch.empty(0, dtype=torch.int32))
    ops.inject_(torch.empty(2, 0), torch.ones(1, 0), torch.zeros(2, dtype=torch.int32))
    hidden = torch.zeros(6, 4).T
    ops.inject_(hidden, torch.ones(6, 1).T.contiguous(), torch.zeros(4, dtype=torch.int32))
    assert torch.equal(hidden, torch.ones(4, 6))
    bank = torch.arange(12.0).view(6, 2).T
    slots = torch.tensor([[0, 9], [1, 9]], dtype=torch.int32)[:, 0]
    assert torch.equal(ops.inject_(torch.zeros(2, 6), bank, slots, torch.ones(2, 2)[:, 0]), bank)


def test_a_slot_out_of_range_leaves_its_row_alone(waves):
    bank = torch.full((4, 4), float("nan"))  # the first and the last row are not the bank's
    bank[2] = 1
    hidden = torch.tensor([-0.0, float("nan"), 1.0, 2.0, 3.0])[:, None].repeat(1, 4)
    before = hidden.clone()
    slots = torch.tensor([2, -7, 2**31 - 1, -1, 1], dtype=torch.int32)
    ops.inject_(hidden, bank[1:3], slots, torch.tensor([1, float("nan"), 1, float("inf"), 0.5]))
    assert torch.equal(hidden.view(torch.int32)[:4], before.view(torch.int32)[:4])
    assert torch.equal(hidden[4], torch.full((4,), 3.5))
    ops.inject_(hidden, bank[:0], slots)
    assert torch.equal(hidden.view(torch.int32)[:4], before.view(torch.int32)[:4])


def test_float64_is_refused_by_name():
    with pytest.raises(BackendError, match=r"inject_: backend 'triton' cannot take dtype torch\.float64"):
        ops.inject_(torch.zeros(1, 2).double(), torch.ones(1, 2), torch.zeros(1, dtype=torch.int32))
