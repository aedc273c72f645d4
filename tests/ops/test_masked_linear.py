import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import BackendError, PersonafastError
from personafast.ops import _masked_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(rows, features, outputs, personas, dtype, seed, pad=3):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features + pad, generator=g).to(dtype)[:, :features]
    weight = torch.randn(outputs, features + pad, generator=g).to(dtype)[:, :features]
    kept = torch.rand(personas, outputs, features, generator=g) < 0.5
    masks = ops.pack_mask(kept.flatten(0, 1)).view(personas, outputs, -1)
    slots = torch.randint(-1, personas, (rows,), generator=g, dtype=torch.int32)
    gamma = torch.rand(personas, generator=g)
    bias = torch.randn(outputs, generator=g).to(dtype)
    return x, weight, kept, masks, slots, gamma, bias


def by_hand(x, weight, kept, slots, gamma, bias, dtype=torch.float64):
    """Row by row in `dtype`: float64 is the truth, the dtype of x is plain torch."""
    rows = []
    for t, slot in enumerate(slots.tolist()):
        w = weight.to(dtype)
        if slot >= 0:
            w = w * torch.where(kept[slot], 1.0, 0.0 if gamma is None else gamma[slot].double()).to(dtype)
        rows.append(F.linear(x[t : t + 1].to(dtype), w, None if bias is None else bias.to(dtype)))
    return torch.cat(rows) if rows else x.new_empty((0, weight.shape[0]), dtype=dtype)


@pytest.mark.parametrize("soft", [False, True])
def test_reference_is_the_formula(soft):
    x, weight, kept, masks, slots, gamma, bias = make(9, 45, 6, 3, torch.float64, 0)
    gamma = gamma if soft else None
    with ops.use_backend("reference"):
        y = ops.masked_linear(x, weight, masks, slots, gamma, bias)
    torch.testing.assert_close(y, by_hand(x, weight, kept, slots, gamma, bias), rtol=1e-12, atol=1e-12)


shapes = {
    "rows": st.integers(0, 9),
    "features": st.sampled_from([1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 123, 160]),
    "outputs": st.integers(1, 7),
    "personas": st.integers(1, 4),
    "dtype": st.sampled_from(DTYPES),
    "soft": st.booleans(),
    "biased": st.booleans(),
    "seed": st.integers(0, 1000),
}


@settings(deadline=None, max_examples=100)
@given(**shapes)
def test_kernel_obeys_the_error_rule(rows, features, outputs, personas, dtype, soft, biased, seed):
    pytest.importorskip("personafast._C")
    x, weight, kept, masks, slots, gamma, bias = make(rows, features, outputs, personas, dtype, seed)
    gamma, bias = (gamma if soft else None), (bias if biased else None)
    with ops.use_backend("cpu"):
        y = ops.masked_linear(x, weight, masks, slots, gamma, bias)
    exact = by_hand(x, weight, kept, slots, gamma, bias)
    # A handful of values may all be lucky in plain torch, so an ulp of the largest is allowed as well, and half an ulp
    # of the terms' magnitudes added up: fp32 sums in another order differ by that much.
    terms = (x.double().abs() @ weight.double().abs().T).max().item() if rows else 0.0
    ulp = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    largest = exact.abs().max().item() if rows else 0.0
    plain = by_hand(x, weight, kept, slots, gamma, bias, dtype)
    assert y.dtype == dtype and y.shape == exact.shape and not y.isnan().any()
    if rows:
        error, allowed = (y.double() - exact).abs().max(), (plain.double() - exact).abs().max()
        assert error <= 2 * allowed + ulp * max(1.0, largest) + 2.0**-24 * terms


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [5, 50, 515])
@pytest.mark.parametrize("soft", [False, True])
def test_error_rule_at_model_size(rows, dtype, soft, within_twice):
    x, weight, kept, masks, slots, gamma, bias = make(rows, 1030, 130, 3, dtype, 7)
    gamma = gamma if soft else None
    exact = by_hand(x, weight, kept, slots, gamma, bias)
    plain = by_hand(x, weight, kept, slots, gamma, bias, dtype)
    within_twice(ops.masked_linear(x, weight, masks, slots, gamma, bias), plain, exact, small=1e-5)


@settings(deadline=None, max_examples=40)
@given(**shapes)
def test_grouped_form_equals_the_reference(rows, features, outputs, personas, dtype, soft, biased, seed):
    x, weight, _, masks, slots, gamma, bias = make(rows, features, outputs, personas, torch.float64, seed)
    args = (x, weight, masks, slots, gamma if soft else None, bias if biased else None)
    torch.testing.assert_close(_masked_linear._grouped(*args), _masked_linear.reference(*args), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dense_rows_are_the_plain_layer_in_the_reference(dtype):
    x, weight, _, masks, slots, _, bias = make(8, 64, 16, 2, dtype, 3)
    with ops.use_backend("reference"):
        y = ops.masked_linear(x, weight, masks, slots, None, bias)
    dense = slots < 0
    assert dense.any() and torch.equal(y[dense], F.linear(x, weight, bias)[dense])


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_row_depends_neither_on_the_batch_nor_on_threads(dtype):
    pytest.importorskip("personafast._C")
    x, weight, _, masks, slots, gamma, bias = make(11, 1000, 301, 3, dtype, 4)
    threads = torch.get_num_threads()
    with ops.use_backend("cpu"):
        together = ops.masked_linear(x, weight, masks, slots, gamma, bias)
        alone = [
            ops.masked_linear(x[t : t + 1], weight, masks, slots[t : t + 1], gamma, bias) for t in range(x.shape[0])
        ]
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(ops.masked_linear(x, weight, masks, slots, gamma, bias), together)
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(torch.cat(alone), together)


def test_kernel_ignores_mask_bits_beyond_the_features():
    x, weight, _, masks, slots, gamma, bias = make(3, 33, 4, 2, torch.float32, 5)
    dirty = masks.clone()
    dirty[:, :, 1] |= ~1
    assert torch.equal(
        ops.masked_linear(x, weight, masks, slots, gamma, bias), ops.masked_linear(x, weight, dirty, slots, gamma, bias)
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("rows", [3, 515])
@pytest.mark.parametrize("slot", [-2, 2])
def test_slot_out_of_range_is_named(backend, rows, slot):
    x, weight, _, masks, slots, _, _ = make(rows, 8, 4, 2, torch.float32, 6)
    slots[1] = slot
    with ops.use_backend(backend), pytest.raises(PersonafastError, match=f"`slots` holds {slot}"):
        ops.masked_linear(x, weight, masks, slots)


def test_no_personas_is_the_dense_layer():
    x, weight, _, _, _, _, bias = make(3, 8, 4, 1, torch.float32, 8)
    masks, slots = torch.empty(0, 4, 1, dtype=torch.int32), torch.full((3,), -1, dtype=torch.int32)
    for backend in ("auto", "reference"):
        with ops.use_backend(backend):
            torch.testing.assert_close(
                ops.masked_linear(x, weight, masks, slots, None, bias), F.linear(x, weight, bias)
            )


def test_a_backend_asked_for_by_name_does_not_fall_back():
    pytest.importorskip("personafast._C")
    x, weight, _, masks, slots, _, _ = make(3, 8, 4, 2, torch.float64, 9)
    with ops.use_backend("cpu"), pytest.raises(BackendError, match="float64"):
        ops.masked_linear(x, weight, masks, slots)
    transposed = weight.float().T.contiguous().T
    with ops.use_backend("cpu"), pytest.raises(BackendError, match="adjacent"):
        ops.masked_linear(x.float(), transposed, masks, slots)
    torch.testing.assert_close(
        ops.masked_linear(x.float(), transposed, masks, slots), ops.masked_linear(x, weight, masks, slots).float()
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, r"`x` has shape \[3\]"),
        ({"weight": torch.zeros(4, 41)}, r"`weight` has shape \[4, 41\], expected \[O, I\] with I = 40"),
        ({"weight": torch.zeros(4, 40, dtype=torch.bfloat16)}, "`weight` has dtype bfloat16"),
        ({"masks": torch.zeros(2, 4, 1, dtype=torch.int32)}, r"`masks` has shape .* = \[P, 4, 2\]"),
        ({"masks": torch.zeros(2, 4, 2)}, "`masks` has dtype float32, expected int32"),
        ({"slots": torch.zeros(4, dtype=torch.int32)}, r"`slots` has shape \[4\]"),
        ({"gamma": torch.zeros(3)}, r"`gamma` has shape \[3\]"),
        ({"bias": torch.zeros(5)}, r"`bias` has shape \[5\]"),
        ({"x": torch.zeros(3, 40, requires_grad=True)}, "no gradient"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "x": torch.zeros(3, 40),
        "weight": torch.zeros(4, 40),
        "masks": torch.zeros(2, 4, 2, dtype=torch.int32),
        "slots": torch.zeros(3, dtype=torch.int32),
        "gamma": torch.zeros(2),
        "bias": torch.zeros(4),
    }
    with pytest.raises(PersonafastError, match=message):
        ops.masked_linear(**{**good, **change})


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("rows", [3, _masked_linear.KERNEL_ROWS + 1])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_masked_out_weight_takes_no_part_whatever_it_is(backend, rows, value):
    x, weight, kept, masks, _, _, bias = make(rows, 45, 6, 1, torch.float32, 0)
    expected = F.linear(x, weight * kept[0], bias)
    weight = torch.where(kept[0], weight, value)
    with ops.use_backend(backend):
        y = ops.masked_linear(x, weight, masks, torch.zeros(rows, dtype=torch.int32), None, bias)
    torch.testing.assert_close(y, expected)


def test_masks_of_one_word_may_have_any_stride():
    x, weight, kept, masks, _, _, bias = make(_masked_linear.KERNEL_ROWS + 1, 20, 6, 1, torch.float32, 0)
    odd = torch.zeros(1, 6, 2, dtype=torch.int32)[:, :, ::2]
    odd.copy_(masks)
    assert odd[0].stride(-1) == 2
    slots = torch.zeros(x.shape[0], dtype=torch.int32)
    for one in (odd, odd.as_strided((1, 6, 1), (6, 1, 2))):
        y = ops.masked_linear(x, weight, one.copy_(masks), slots, None, bias)
        torch.testing.assert_close(y, F.linear(x, weight * kept[0], bias))


@pytest.mark.parametrize("which", ["weight", "masks", "slots", "gamma", "bias"])
def test_another_device_is_refused_by_name(which):
    x, weight, _, masks, slots, gamma, bias = make(4, 45, 6, 2, torch.float32, 0)
    given = {"weight": weight, "masks": masks, "slots": slots, "gamma": gamma, "bias": bias}
    given[which] = given[which].to("meta")
    with pytest.raises(PersonafastError, match=f"masked_linear: `{which}` is on meta, expected cpu"):
        ops.masked_linear(x, **given)
