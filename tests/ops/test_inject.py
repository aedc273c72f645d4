import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import PersonafastError
from personafast.ops import _inject

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(rows, width, bank_rows, dtype, bank_dtype, seed, pad=3):
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(rows, width + pad, generator=g).to(dtype)
    bank = torch.randn(bank_rows, width, generator=g).to(bank_dtype)
    slots = torch.randint(-1, bank_rows, (rows,), generator=g, dtype=torch.int32)
    scale = torch.randn(rows, generator=g)
    return wide, bank, slots, scale


def by_hand(hidden, bank, slots, scale):
    out = hidden.double()
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            out[t] += (1.0 if scale is None else scale[t].double()) * bank[slot].double()
    return out


def test_reference_is_the_formula():
    hidden, bank, slots, scale = make(9, 5, 4, torch.float64, torch.float64, 0, pad=0)
    expected = by_hand(hidden, bank, slots, scale)
    with ops.use_backend("reference"):
        ops.inject_(hidden, bank, slots, scale)
    torch.testing.assert_close(hidden, expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 7),
    width=st.sampled_from([1, 7, 8, 15, 16, 17, 31, 32, 33, 100, 123]),
    bank_rows=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    wide_bank=st.booleans(),
    scaled=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_kernel_gives_the_bits_of_the_reference(rows, width, bank_rows, dtype, wide_bank, scaled, seed):
    pytest.importorskip("personafast._C")
    bank_dtype = torch.float32 if wide_bank else dtype
    wide, bank, slots, scale = make(rows, width, bank_rows, dtype, bank_dtype, seed)
    scale = scale if scaled else None
    expected = wide.clone()
    _inject.reference(expected[:, :width], bank, slots, scale)
    with ops.use_backend("cpu"):
        result = ops.inject_(wide[:, :width], bank, slots, scale)
    assert torch.equal(wide, expected)  # what lies between the rows included
    assert result.data_ptr() == wide.data_ptr()


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_rounds_as_torch_does(dtype):
    pytest.importorskip("personafast._C")
    values = [
        0.0,
        -0.0,
        1e-8,
        6e-8,
        1e-40,
        65504.0,
        65519.9,
        65520.0,
        3.3e38,
        float("inf"),
        float("-inf"),
        float("nan"),
    ]
    normal = [value for value in values if value != 1e-40]  # denormal numbers send their neighbours another way
    ties = [1 + i / 4096 for i in range(64)] + [2.0**-24 * i / 4 for i in range(64)]
    ties = torch.tensor(values + ties + 3 * normal)
    hidden, plain = torch.zeros(1, len(ties), dtype=dtype), torch.zeros(1, len(ties), dtype=dtype)
    slots = torch.zeros(1, dtype=torch.int32)
    with ops.use_backend("cpu"):
        ops.inject_(hidden, ties[None], slots)
    _inject.reference(plain, ties[None], slots)
    torch.testing.assert_close(hidden, plain, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule(dtype, within_twice):
    wide, bank, slots, scale = make(64, 257, 6, dtype, dtype, 1, pad=0)
    exact = by_hand(wide, bank, slots, scale)
    added = torch.where(slots[:, None] >= 0, bank[slots.clamp(min=0)] * scale[:, None].to(dtype), 0)
    plain = wide + added
    within_twice(ops.inject_(wide, bank, slots, scale), plain, exact)


def test_row_of_slot_minus_one_keeps_its_bits():
    hidden = torch.tensor([[float("nan"), -0.0, float("inf")], [1.0, 2.0, 3.0]])
    before = hidden.clone()
    ops.inject_(hidden, torch.ones(1, 3), torch.tensor([-1, 0], dtype=torch.int32))
    assert torch.equal(hidden[0].view(torch.int32), before[0].view(torch.int32))
    assert torch.equal(hidden[1], before[1] + 1)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_empty_rows_and_banks(backend):
    with ops.use_backend(backend):
        ops.inject_(torch.empty(0, 4), torch.ones(2, 4), torch.empty(0, dtype=torch.int32))
        hidden = torch.ones(2, 4)
        ops.inject_(hidden, torch.empty(0, 4), torch.full((2,), -1, dtype=torch.int32))
        assert torch.equal(hidden, torch.ones(2, 4))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("slot", [-2, 3, 2**31 - 1])
def test_slot_out_of_range_is_named_and_nothing_written(backend, slot):
    hidden = torch.zeros(3, 4)
    with ops.use_backend(backend), pytest.raises(PersonafastError, match=rf"`slots` holds {slot}.*valid are -1 to 2"):
        ops.inject_(hidden, torch.ones(3, 4), torch.tensor([0, 1, slot], dtype=torch.int32))
    assert not hidden.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"`hidden` has shape \[2, 3, 4\]"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int32)}, "`hidden` has dtype int32"),
        ({"bank": torch.zeros(2, 5)}, r"`bank` has shape \[2, 5\], expected \[S, H\] with H = 4"),
        ({"bank": torch.zeros(2, 4, dtype=torch.float16)}, "`bank` has dtype float16"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, r"`slots` has shape \[2\]"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, "`slots` has dtype int64, expected int32"),
        ({"scale": torch.zeros(4)}, r"`scale` has shape \[4\]"),
        ({"scale": torch.zeros(3, dtype=torch.float64)}, "`scale` has dtype float64"),
        ({"bank": torch.zeros(2, 4, requires_grad=True)}, "no gradient"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "hidden": torch.zeros(3, 4),
        "bank": torch.zeros(2, 4),
        "slots": torch.zeros(3, dtype=torch.int32),
        "scale": torch.zeros(3),
    }
    with pytest.raises(PersonafastError, match=message) as caught:
        ops.inject_(**{**good, **change})
    assert "\n" not in str(caught.value)


def test_grad_is_refused_only_while_it_is_recorded():
    bank = torch.ones(1, 2, requires_grad=True)
    hidden = torch.zeros(1, 2)
    with torch.no_grad():
        ops.inject_(hidden, bank, torch.zeros(1, dtype=torch.int32))
    assert torch.equal(hidden, torch.ones(1, 2))
