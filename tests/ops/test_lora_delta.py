import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import BackendError, PersonafastError
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


def laid_out(args, adjacent_outputs, pad):
    """The same values, but rows with gaps, and B stored as [M, R, O] if `adjacent_outputs`."""

    def gaps(tensor):
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + pad), float("nan"))
        wide[..., : tensor.shape[-1]] = tensor
        return wide[..., : tensor.shape[-1]]

    out, x, A, B, *rest = args
    B = gaps(B.transpose(1, 2)).transpose(1, 2) if adjacent_outputs else gaps(B)
    return gaps(out), gaps(x), gaps(A), B, *rest


shapes = {
    "rows": st.integers(0, 9),
    "features": st.sampled_from([1, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 127, 128, 129, 160]),
    "outputs": st.sampled_from([1, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 255, 256, 257, 300]),
    "adapters": st.integers(0, 4),
    "rank": st.sampled_from([1, 2, 3, 8, 17]),
    "dtype": st.sampled_from(DTYPES),
    "adjacent_outputs": st.booleans(),
    "pad": st.sampled_from([0, 3]),
    "seed": st.integers(0, 1000),
}


@settings(deadline=None, max_examples=150)
@given(**shapes)
def test_kernel_obeys_the_error_rule(rows, features, outputs, adapters, rank, dtype, adjacent_outputs, pad, seed):
    pytest.importorskip("personafast._C")
    args = laid_out(make(rows, features, outputs, adapters, rank, dtype, seed), adjacent_outputs, pad)
    out, x, A, B, slots, scale, ranks = args
    for m, r in enumerate(ranks.tolist()):  # neither is to be read
        A[m, r:] = float("nan")
        B[m, :, r:] = float("nan")
    exact, plain = by_hand(*args), by_hand(*args, dtype=dtype)
    before = [tensor.clone() for tensor in args]
    with ops.use_backend("cpu"):
        ops.lora_delta_(*args)
    for tensor, was in zip(args[1:], before[1:], strict=True):
        torch.testing.assert_close(tensor, was, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(out[slots < 0], before[0][slots < 0])
    assert not out.isnan().any()
    if pad and out.numel():
        assert out.as_strided((rows, pad), (out.stride(0), 1), out.storage_offset() + outputs).isnan().all()
    if out.numel():
        error = (out.double() - exact).abs()
        # The most that fp32 sums in any order are off: a rounding an operation, of the terms' magnitudes added up.
        terms = by_hand(*(tensor.abs() for tensor in before[:4]), slots, scale.abs(), ranks)
        sums = 2.0**-24 * (features + rank + 8) * terms
        # One rounding to the dtype, and no other: half an ulp, or half the smallest denormal number.
        half_ulp = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        assert (error <= half_ulp * exact.abs() + sums + 2.0**-25).all()
        # The house's rule. A handful of values may all be lucky in plain torch, hence the ulp and the sums as above.
        allowed = (plain.double() - exact).abs().max()
        assert error.max() <= 2 * allowed + 2 * half_ulp * max(1.0, exact.abs().max().item()) + sums.max()


@pytest.mark.parametrize("adjacent_outputs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [5, 50])
def test_kernel_error_at_model_size(rows, dtype, adjacent_outputs, within_twice):
    pytest.importorskip("personafast._C")
    args = laid_out(make(rows, 1030, 1100, 4, 16, dtype, 7), adjacent_outputs, 3)
    exact, plain = by_hand(*args), by_hand(*args, dtype=dtype)
    with ops.use_backend("cpu"):
        within_twice(ops.lora_delta_(*args), plain, exact, small=1e-5)


@pytest.mark.parametrize("adjacent_outputs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_row_depends_neither_on_the_batch_nor_on_threads(dtype, adjacent_outputs):
    pytest.importorskip("personafast._C")
    args = laid_out(make(43, 4100, 4099, 3, 64, dtype, 4), adjacent_outputs, 0)
    out, x, A, B, slots, scale, _ = args
    ranks = torch.tensor([64, 57, 60], dtype=torch.int32)
    # The work in both products from which lora_delta.cpp employs a third thread.
    assert sum(int(ranks[m]) for m in slots.tolist() if m >= 0) * 4099 >= 3 << 21
    threads = torch.get_num_threads()
    with ops.use_backend("cpu"):
        together = ops.lora_delta_(out.clone(), x, A, B, slots, scale, ranks)
        alone = out.clone()
        for t in range(x.shape[0]):
            ops.lora_delta_(alone[t : t + 1], x[t : t + 1], A, B, slots[t : t + 1], scale, ranks)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(ops.lora_delta_(out.clone(), x, A, B, slots, scale, ranks), together)
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(alone, together)


def test_kernel_takes_a_rank_beyond_the_factors_as_theirs():
    pytest.importorskip("personafast._C")
    out, x, A, B, _, scale, _ = make(2, 20, 30, 2, 4, torch.float32, 8)
    slots, full = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([4, 0], dtype=torch.int32)
    with ops.use_backend("cpu"):
        expected = ops.lora_delta_(out.clone(), x, A, B, slots, scale, full)
        assert torch.equal(ops.lora_delta_(out.clone(), x, A, B, slots, scale, full * 1000 - 1), expected)
    assert torch.equal(expected[1], out[1])


def test_many_rows_leave_the_kernel_unless_it_is_asked_for(monkeypatch):
    core = pytest.importorskip("personafast._C")
    calls = []
    kernel = core.lora_delta_
    monkeypatch.setattr(core, "lora_delta_", lambda *args: calls.append(args) or kernel(*args))
    for work, adjacent_outputs in ((_lora_delta.KERNEL_WORK, True), (_lora_delta.STRIDED_WORK, False)):
        limit = work // 16
        for rows, backend, expected in ((limit, "auto", 1), (limit + 1, "auto", 0), (limit + 1, "cpu", 1)):
            calls.clear()
            args = laid_out(make(rows, 8, 8, 2, 16, torch.bfloat16, 9), adjacent_outputs, 0)
            with ops.use_backend(backend):
                ops.lora_delta_(*args)
            assert len(calls) == expected


def test_a_backend_asked_for_by_name_does_not_fall_back():
    pytest.importorskip("personafast._C")
    exact = make(4, 5, 7, 2, 3, torch.float64, 10)
    out, x, A, B, *rest = (tensor.float() if tensor.dtype == torch.float64 else tensor for tensor in exact)
    columns = out.T.contiguous().T
    transposed = A.transpose(1, 2).contiguous().transpose(1, 2)
    expected = by_hand(*exact).float()
    refused = [
        (exact, "float64"),
        ((columns, x, A, B, *rest), "an `out` whose rows are not adjacent"),
        ((out.clone(), x, transposed, B, *rest), "an `A` whose rows are not adjacent"),
    ]
    for args, why in refused:
        before = args[0].clone()
        with ops.use_backend("cpu"), pytest.raises(BackendError, match=f"lora_delta_: .*{why}"):
            ops.lora_delta_(*args)
        assert torch.equal(args[0], before)
        torch.testing.assert_close(ops.lora_delta_(*args).float(), expected, rtol=1e-5, atol=1e-5)
    with ops.use_backend("cpu"):  # x is copied where its rows are not adjacent
        columns = x.T.contiguous().T
        torch.testing.assert_close(ops.lora_delta_(out, columns, A, B, *rest), expected, rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("slot", [-2, 2])
def test_slot_out_of_range_is_named(backend, slot, dtype):
    out, x, A, B, slots, scale, ranks = make(3, 5, 7, 2, 4, dtype, 5)
    slots[1] = slot
    before = out.clone()
    with ops.use_backend(backend), pytest.raises(PersonafastError, match=f"`slots` holds {slot}"):
        ops.lora_delta_(out, x, A, B, slots, scale, ranks)
    assert torch.equal(out, before)


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


def bound(rows, dtype=torch.float32, adapters=5, rank=4, features=40, outputs=70, seed=0):
    """Arguments as a model's linear has them: B transposed in memory, rows by sequence and token."""
    out, x, A, B, slots, scale, ranks = make(rows, features, outputs, adapters, rank, dtype, seed)
    B = B.transpose(1, 2).contiguous().transpose(1, 2)
    return out.contiguous().view(rows, 1, outputs), x.view(rows, 1, features), A, B, slots, scale, ranks


@pytest.fixture
def dispatched(monkeypatch):
    """How often the operator was called by its name, through torch."""
    seen, op = [], _lora_delta._op
    monkeypatch.setattr(_lora_delta, "_op", lambda *args: (seen.append(1), op(*args))[1])
    return seen


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_factors_give_the_same_without_the_dispatcher(dtype, dispatched):
    pytest.importorskip("personafast._C")
    out, x, A, B, slots, scale, ranks = bound(9, dtype)
    delta = _lora_delta.BoundDelta(A, B, scale, ranks)
    for copied in (delta, copy.deepcopy(delta)):
        found = out.clone()
        assert copied.add_(found, x, slots) is found and dispatched == []
        flat = out.clone().flatten(0, 1)
        assert torch.equal(found.flatten(0, 1), ops.lora_delta_(flat, x.flatten(0, 1), *(A, B, slots, scale, ranks)))
        dispatched.clear()


@torch.no_grad()
def test_a_deep_copy_of_bound_factors_reads_its_own():
    pytest.importorskip("personafast._C")
    out, x, A, B, slots, scale, ranks = bound(9)
    delta = _lora_delta.BoundDelta(A, B, scale, ranks)
    other, expected = copy.deepcopy(delta), delta.add_(out.clone(), x, slots)
    A.fill_(torch.nan)
    assert torch.equal(other.add_(out.clone(), x, slots), expected)


@torch.no_grad()
def test_bound_factors_leave_to_the_operator_what_the_kernel_does_not_take(dispatched):
    pytest.importorskip("personafast._C")
    out, x, A, B, slots, scale, ranks = bound(9)
    delta = _lora_delta.BoundDelta(A, B, scale, ranks)
    expected = by_hand(out.flatten(0, 1), x.flatten(0, 1), A, B, slots, scale, ranks)
    wide = torch.cat([x, x], -1)[..., :40]
    for change in (wide, x):
        with ops.use_backend("reference" if change is x else "auto"):
            found = delta.add_(out.clone(), change, slots)
        torch.testing.assert_close(found.flatten(0, 1).double(), expected, rtol=1e-4, atol=1e-4)
    assert len(dispatched) == 2
    many = torch.randn(300, 40)
    delta.add_(torch.zeros(300, 70), many, torch.zeros(300, dtype=torch.int32))
    assert len(dispatched) == 3
    with pytest.raises(PersonafastError, match="`out` has shape"):
        delta.add_(out[:5], x, slots)
    with pytest.raises(PersonafastError, match="`x` has dtype|`out` has dtype"):
        delta.add_(out, x.bfloat16(), slots)
    with pytest.raises(PersonafastError, match="holds 5"):
        delta.add_(out, x, torch.full((9,), 5, dtype=torch.int32))
    with pytest.raises(PersonafastError, match="no gradient"), torch.enable_grad():
        delta.add_(out, x.requires_grad_(), slots)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapters", [1, 16])
def test_a_row_is_the_same_alone_and_among_others_on_any_number_of_threads(dtype, adapters):
    pytest.importorskip("personafast._C")
    args = bound(40, dtype, adapters, rank=8, features=300, outputs=500)
    out, x, A, B, slots, scale, ranks = args
    delta = _lora_delta.BoundDelta(A, B, scale, ranks)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 4):
            torch.set_num_threads(count)
            found = delta.add_(out.clone(), x, slots)
            if count == 1:
                expected = found
            assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(threads)
    for t in range(40):
        assert torch.equal(delta.add_(out[t : t + 1].clone(), x[t : t + 1], slots[t : t + 1]), expected[t : t + 1])
