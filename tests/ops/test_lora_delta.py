import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import PersonafastError
from personafast.ops import _lora_delta
from personafast.ops._groups import row_groups

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(rows, features, outputs, adapters, rank, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    out = torch.randn(rows, outputs + 3, generator=g).to(dtype)[:, :outputs]
    x = torch.randn(rows, features, generator=g).to(dtype)
    A = torch.randn(adapters, rank, features, generator=g).to(dtype)
    B = torch.randn(adapters, outputs, rank, generator=g).to(dtype)
    slots = torch.randint(-1, adapters, (rows,), generator=g, dtype=torch.int32)
    scale = torch.randn(adapters, generator=g)
    ranks = torch.randint(0, rank + 1, (adapters,), generator=g, dtype=torch.int32)
    return out, x, A, B, slots, scale, ranks


def by_hand(out, x, A, B, slots, scale, ranks, dtype=torch.float64):
    out = out.to(dtype).clone()
    for t, m in enumerate(slots.tolist()):
        if m >= 0:
            r = int(ranks[m])
            out[t] += scale[m].to(dtype) * ((x[t].to(dtype) @ A[m, :r].to(dtype).T) @ B[m, :, :r].to(dtype).T)
    return out


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 12),
    features=st.sampled_from([1, 5, 33]),
    outputs=st.sampled_from([1, 7, 20]),
    adapters=st.integers(0, 5),
    rank=st.sampled_from([1, 3, 8]),
    seed=st.integers(0, 1000),
)
def test_every_form_is_the_formula(rows, features, outputs, adapters, rank, seed):
    args = make(rows, features, outputs, adapters, rank, torch.float64, seed)
    expected = by_hand(*args)
    forms = [ops.lora_delta_, _lora_delta.reference]
    if adapters:
        forms.append(_lora_delta._stacked)
        groups = row_groups("lora_delta_", args[4], adapters)
        forms.append(lambda out, x, A, B, slots, s, r: _lora_delta._grouped(out, x, A, B, groups, s, r))
    for form in forms:
        out = args[0].clone()
        form(out, *args[1:])
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("adapters", "rank"), [(4, 8), (20, 16), (1, 8)])
def test_error_rule(dtype, adapters, rank, within_twice):
    args = make(40, 129, 65, adapters, rank, dtype, 1)
    exact, plain = by_hand(*args), by_hand(*args, dtype=dtype)
    within_twice(ops.lora_delta_(*args), plain, exact, small=1e-5)


def test_rows_without_adapter_and_strided_rows_are_left_alone():
    wide = torch.randn(6, 10)
    before = wide.clone()
    _, x, A, B, _, scale, _ = make(6, 5, 7, 2, 3, torch.float32, 2)
    slots = torch.tensor([-1, 0, -1, 1, 1, -1], dtype=torch.int32)
    ops.lora_delta_(wide[:, :7], x, A, B, slots, scale, torch.full((2,), 3, dtype=torch.int32))
    assert torch.equal(wide[slots < 0], before[slots < 0])
    assert torch.equal(wide[:, 7:], before[:, 7:])
    assert not torch.equal(wide[slots >= 0], before[slots >= 0])


def test_nothing_is_read_beyond_a_rank():
    out, x, A, B, slots, scale, _ = make(6, 5, 7, 2, 4, torch.float32, 3)
    ranks = torch.tensor([1, 3], dtype=torch.int32)
    expected = by_hand(out, x, A, B, slots, scale, ranks)
    for m, r in enumerate(ranks.tolist()):
        A[m, r:] = float("nan")
        B[m, :, r:] = 1e30
    torch.testing.assert_close(
        ops.lora_delta_(out, x, A, B, slots, scale, ranks).double(), expected, rtol=1e-5, atol=1e-5
    )


def test_transposed_storage_of_b_gives_the_same():
    out, x, A, B, slots, scale, ranks = make(6, 5, 7, 3, 4, torch.float32, 4)
    other = out.clone()
    ops.lora_delta_(out, x, A, B, slots, scale, ranks)
    ops.lora_delta_(other, x, A, B.transpose(1, 2).contiguous().transpose(1, 2), slots, scale, ranks)
    torch.testing.assert_close(out, other)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("slot", [-2, 2])
def test_slot_out_of_range_is_named(backend, slot):
    out, x, A, B, slots, scale, ranks = make(3, 5, 7, 2, 4, torch.float32, 5)
    slots[1] = slot
    with ops.use_backend(backend), pytest.raises(PersonafastError, match=f"`slots` holds {slot}"):
        ops.lora_delta_(out, x, A, B, slots, scale, ranks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"out": torch.zeros(4, 7)}, r"`out` has shape \[4, 7\]"),
        ({"out": torch.zeros(3, 7, dtype=torch.float16)}, "`out` has dtype float16"),
        ({"A": torch.zeros(2, 4, 6)}, r"`A` has shape \[2, 4, 6\]"),
        ({"B": torch.zeros(2, 4, 7)}, r"`B` has shape \[2, 4, 7\], expected \[M, O, R\] = \[2, 7, 4\]"),
        ({"slots": torch.zeros(3)}, "`slots` has dtype float32"),
        ({"scale": torch.zeros(3)}, r"`scale` has shape \[3\]"),
        ({"ranks": torch.zeros(2, dtype=torch.int64)}, "`ranks` has dtype int64"),
        ({"A": torch.zeros(2, 4, 5, requires_grad=True)}, "no gradient"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "out": torch.zeros(3, 7),
        "x": torch.zeros(3, 5),
        "A": torch.zeros(2, 4, 5),
        "B": torch.zeros(2, 7, 4),
        "slots": torch.zeros(3, dtype=torch.int32),
        "scale": torch.ones(2),
        "ranks": torch.full((2,), 4, dtype=torch.int32),
    }
    with pytest.raises(PersonafastError, match=message):
        ops.lora_delta_(**{**good, **change})


def test_groups_follow_slots_that_change_in_place_or_are_freed():
    def seen(slots, count=3):
        return [(slot, slots[rows].tolist()) for slot, rows in row_groups("lora_delta_", slots, count)]

    slots = torch.tensor([0, 0, 2, -1, 2], dtype=torch.int32)
    assert seen(slots) == seen(slots) == [(-1, [-1]), (0, [0, 0]), (2, [2, 2])]
    assert row_groups("lora_delta_", slots, 3) is row_groups("lora_delta_", slots, 3)
    slots[0] = 1
    assert seen(slots) == [(-1, [-1]), (0, [0]), (1, [1]), (2, [2, 2])]
    with pytest.raises(PersonafastError, match="holds 2, but there are 2 slots"):
        row_groups("lora_delta_", slots, 2)
    for value in range(20):  # a new tensor may stand where a freed one stood
        fresh = torch.full((3,), value, dtype=torch.int32)
        assert seen(fresh, 20) == [(value, [value] * 3)]
        del fresh
    with torch.inference_mode():
        slots = torch.tensor([0, 1], dtype=torch.int32)
        slots[0] = 1
        assert seen(slots) == [(1, [1, 1])]
