import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import BackendError, PersonafastError
from personafast.ops import _sparse_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(rows, features, outputs, dtype, seed, density=0.5, pad=3):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features + pad, generator=g).to(dtype)[:, :features]
    weight = torch.randn(outputs, features + pad, generator=g).to(dtype)[:, :features]
    kept = torch.rand(outputs, features, generator=g) < density
    bias = torch.randn(outputs, generator=g).to(dtype)
    return x, weight, kept, bias


def masked(x, weight, kept, bias, dtype):
    return F.linear(x.to(dtype), weight.to(dtype) * kept, None if bias is None else bias.to(dtype))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("features", [1, 31, 32, 45, 96])
def test_compress_keeps_what_the_mask_keeps(backend, dtype, features):
    _, weight, kept, _ = make(1, features, 7, dtype, 0)
    packed = ops.pack_mask(kept)
    dirty = packed | (-1 << features % 32 if features % 32 else 0) * (torch.arange(packed.shape[1]) == features // 32)
    with ops.use_backend(backend):
        values, bitmap, offsets = ops.compress(weight, dirty.int())
    assert torch.equal(values, weight[kept]) and values.dtype == dtype
    assert torch.equal(bitmap, packed)
    assert offsets.tolist() == [0, *kept.sum(1).cumsum(0).tolist()]


shapes = {
    "rows": st.sampled_from([0, 1, 2, 5, 6, 7, 13]),
    "features": st.sampled_from([1, 15, 16, 17, 31, 32, 33, 63, 65, 123, 160, 1023, 1024, 1030, 2100]),
    "outputs": st.integers(1, 11),
    "dtype": st.sampled_from(DTYPES),
    "density": st.sampled_from([0.0, 0.02, 0.5, 0.9, 1.0]),
    "biased": st.booleans(),
    "seed": st.integers(0, 1000),
}


@settings(deadline=None, max_examples=100)
@given(**shapes)
def test_kernel_obeys_the_error_rule(rows, features, outputs, dtype, density, biased, seed):
    pytest.importorskip("personafast._C")
    x, weight, kept, bias = make(rows, features, outputs, dtype, seed, density)
    bias = bias if biased else None
    compressed = ops.compress(weight, ops.pack_mask(kept))
    with ops.use_backend("cpu"):
        y = ops.sparse_linear(x, *compressed, bias)
    exact, plain = masked(x, weight, kept, bias, torch.float64), masked(x, weight, kept, bias, dtype)
    assert y.dtype == dtype and y.shape == exact.shape and not y.isnan().any()
    if rows:
        # As for masked_linear: an ulp of the largest, and half an ulp of the terms' magnitudes added up.
        terms = (x.double().abs() @ weight.double().abs().T).max().item()
        ulp = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        error, allowed = (y.double() - exact).abs().max(), (plain.double() - exact).abs().max()
        assert error <= 2 * allowed + ulp * max(1.0, exact.abs().max().item()) + 2.0**-24 * terms


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_is_masked_linear_bit_for_bit_with_avx512(dtype):
    core = pytest.importorskip("personafast._C")
    if core.build_info()["isa"] != "avx512":
        pytest.skip("the other instruction sets sum in another order")
    x, weight, kept, bias = make(7, 2100, 45, dtype, 1)
    packed = ops.pack_mask(kept)
    slots = torch.zeros(7, dtype=torch.int32)
    with ops.use_backend("cpu"):
        y = ops.sparse_linear(x, *ops.compress(weight, packed), bias)
        assert torch.equal(y, ops.masked_linear(x, weight, packed[None], slots, None, bias))


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_depends_neither_on_the_batch_nor_on_threads(dtype):
    pytest.importorskip("personafast._C")
    x, weight, kept, bias = make(11, 1300, 301, dtype, 2)
    compressed = ops.compress(weight, ops.pack_mask(kept))
    threads = torch.get_num_threads()
    with ops.use_backend("cpu"):
        together = ops.sparse_linear(x, *compressed, bias)
        assert torch.equal(torch.cat([ops.sparse_linear(row[None], *compressed, bias) for row in x]), together)
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert torch.equal(ops.sparse_linear(x, *compressed, bias), together)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("rows", [3, 70])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_backends_agree(rows, dtype, within_twice):
    x, weight, kept, bias = make(rows, 200, 30, dtype, 3)
    compressed = ops.compress(weight, ops.pack_mask(kept))
    exact, plain = masked(x, weight, kept, bias, torch.float64), masked(x, weight, kept, bias, dtype)
    for backend in ("auto", "reference"):
        with ops.use_backend(backend):
            within_twice(ops.sparse_linear(x, *compressed, bias), plain, exact, small=1e-5)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_bitmap_of_other_weights_reads_nothing_outside(backend):
    x, weight, kept, _ = make(2, 70, 5, torch.float32, 4)
    values, bitmap, offsets = ops.compress(weight, ops.pack_mask(kept))
    with ops.use_backend(backend):
        y = ops.sparse_linear(x, values, torch.full_like(bitmap, -1), offsets)
    # The last row reads its own values and zeros behind them.
    last = torch.zeros(70)
    last[: int(kept[-1].sum())] = weight[-1][kept[-1]]
    torch.testing.assert_close(y[:, -1], x @ last)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("offsets", [[-1, 2, 4], [0, 3, 2], [0, 2, 5]])
def test_offsets_outside_the_values_are_named(backend, offsets):
    with ops.use_backend(backend), pytest.raises(PersonafastError, match="`row_offsets` of output"):
        ops.sparse_linear(
            torch.zeros(1, 8), torch.zeros(4), torch.zeros(2, 1, dtype=torch.int32), torch.tensor(offsets)
        )


def test_a_backend_asked_for_by_name_does_not_fall_back():
    pytest.importorskip("personafast._C")
    x, weight, kept, _ = make(3, 64, 4, torch.float64, 5)
    compressed = ops.compress(weight, ops.pack_mask(kept))
    with ops.use_backend("cpu"), pytest.raises(BackendError, match="float64"):
        ops.sparse_linear(x, *compressed)
    values, bitmap, offsets = ops.compress(weight.float(), ops.pack_mask(kept))
    apart = torch.stack([values, values], 1)[:, 0]
    with ops.use_backend("cpu"), pytest.raises(BackendError, match="contiguous"):
        ops.sparse_linear(x.float(), apart, bitmap, offsets)
    torch.testing.assert_close(
        ops.sparse_linear(x.float(), apart, bitmap, offsets), ops.sparse_linear(x.float(), values, bitmap, offsets)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3)}, r"`x` has shape \[3\]"),
        ({"x": torch.zeros(3, 41)}, r"`bitmap` has shape \[4, 1\], expected \[O, ceil\(I / 32\)\] = \[4, 2\]"),
        ({"values": torch.zeros(5, dtype=torch.bfloat16)}, "`values` has dtype bfloat16, expected float32"),
        ({"values": torch.zeros(5, 1)}, r"`values` has shape \[5, 1\]"),
        ({"bitmap": torch.zeros(4, 1)}, "`bitmap` has dtype float32, expected int32"),
        ({"row_offsets": torch.zeros(5, dtype=torch.int32)}, "`row_offsets` has dtype int32, expected int64"),
        ({"row_offsets": torch.zeros(4, dtype=torch.int64)}, r"`row_offsets` has shape \[4\]"),
        ({"bias": torch.zeros(5)}, r"`bias` has shape \[5\]"),
        ({"bias": torch.zeros(4, device="meta")}, "`bias` is on meta, expected cpu"),
        ({"x": torch.zeros(3, 20, requires_grad=True)}, "no gradient"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "x": torch.zeros(3, 20),
        "values": torch.zeros(5),
        "bitmap": torch.zeros(4, 1, dtype=torch.int32),
        "row_offsets": torch.zeros(5, dtype=torch.int64),
        "bias": torch.zeros(4),
    }
    with pytest.raises(PersonafastError, match=message):
        ops.sparse_linear(**{**good, **change})


def test_compress_names_bad_masks():
    with pytest.raises(PersonafastError, match=r"`mask` has shape \[4, 2\], expected \[O, ceil\(I / 32\)\] = \[4, 1\]"):
        ops.compress(torch.zeros(4, 20), torch.zeros(4, 2, dtype=torch.int32))
    with pytest.raises(PersonafastError, match="`mask` has dtype bool, expected int32"):
        ops.compress(torch.zeros(4, 20), torch.zeros(4, 20, dtype=torch.bool))


def bound(dtype, rows=5, features=45, outputs=11):
    x, weight, kept, bias = make(rows, features, outputs, dtype, 3, pad=0)
    return x.view(rows, 1, features), ops.compress(weight, ops.pack_mask(kept)), bias


@pytest.fixture
def dispatched(monkeypatch):
    """How often the operator was called, with all its checks."""
    seen, op = [], _sparse_linear.sparse_linear
    monkeypatch.setattr(_sparse_linear, "sparse_linear", lambda *args: (seen.append(1), op(*args))[1])
    return seen


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 5, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bound_weights_give_the_same_bits_at_once(dtype, rows, biased, dispatched):
    pytest.importorskip("personafast._C")
    x, compressed, bias = bound(dtype, rows)
    bias = bias if biased else None
    found = _sparse_linear.BoundSparse(*compressed)(x, bias)
    assert dispatched == [] and found.shape == (rows, 1, 11)
    assert torch.equal(found[:, 0], ops.sparse_linear(x[:, 0], *compressed, bias))


def test_bound_weights_are_read_where_they_are_now():
    x, compressed, bias = bound(torch.float32)
    weights = _sparse_linear.BoundSparse(*compressed)
    other, expected = copy.deepcopy(weights), weights(x, bias)
    compressed[0].mul_(2)
    assert torch.equal(other(x, bias), expected)
    assert torch.equal(weights(x, bias), ops.sparse_linear(x[:, 0], *compressed, bias)[:, None])
    bias.add_(1)
    assert torch.equal(weights(x, bias), ops.sparse_linear(x[:, 0], *compressed, bias)[:, None])
    compressed[2][2] = 10_000
    with pytest.raises(PersonafastError, match="`row_offsets` of output 1"):
        weights(x, bias)


def test_bound_weights_leave_to_the_operator_what_the_kernel_does_not_take(dispatched):
    x, compressed, bias = bound(torch.float32)
    weights = _sparse_linear.BoundSparse(*compressed)
    expected = weights(x, bias)
    wide = torch.cat([x, x], -1)[..., :45]
    assert torch.equal(weights(wide, bias), expected)
    assert torch.equal(weights(x, torch.stack([bias, bias], 1)[:, 0]), expected)
    with ops.use_backend("reference"):
        torch.testing.assert_close(weights(x, bias), expected)
    dispatched.clear()
    double = _sparse_linear.BoundSparse(compressed[0].double(), *compressed[1:])
    torch.testing.assert_close(double(x.double(), bias.double()), expected.double(), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights(x, bias)
    assert len(dispatched) == 2
    for wrong, message in (
        ((x.bfloat16(), None), "`values` has dtype float32"),
        ((x[..., :30].contiguous(), None), "`bitmap` has shape"),
        ((x, bias[:5]), "`bias` has shape"),
        ((x, bias.double()), "`bias` has dtype"),
        ((x.clone().requires_grad_(), bias), "no gradient"),
        ((x, bias.clone().requires_grad_()), "no gradient"),
    ):
        with pytest.raises(PersonafastError, match=message):
            weights(*wrong)
