import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import BackendError, PersonafastError

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
WIDTHS = [1, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 100, 123]
EPS = 1e-5


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def make(rows, width, count, dtype, bank_dtype, weight_dtype, seed, pad=0):
    """Rows of the update, the residual and the bank with NaN between them."""
    g = torch.Generator().manual_seed(seed)

    def normal(n, kind, gap):
        wide = torch.full((n, width + gap), float("nan"), dtype=kind)
        wide[:, :width] = torch.randn(n, width, generator=g).to(kind)
        return wide[:, :width]

    update, residual = normal(rows, dtype, pad), normal(rows, dtype, 2 * pad)
    bank = normal(count, bank_dtype, pad)
    slots = torch.randint(-1, count, (rows,), generator=g, dtype=torch.int32)
    scale = torch.randn(rows, generator=g)
    weight = (1 + torch.randn(width, generator=g) / 4).to(weight_dtype)
    return update, residual, bank, slots, scale, weight


def by_hand(update, residual, bank, slots, scale, weight, eps, dtype=torch.float64, stored=None):
    """The docstring; with `stored`, the norm is that of the residual as it has been stored."""
    total = update.to(dtype) + residual.to(dtype)
    for t, s in enumerate(slots.tolist()):
        if s >= 0:
            total[t] += (1.0 if scale is None else scale[t].to(dtype)) * bank[s].to(dtype)
    x = total if stored is None else stored.to(dtype)
    return x / (x.square().mean(1, keepdim=True) + eps).sqrt() * weight.to(dtype), total


def fused(backend, *args):
    with ops.use_backend(backend):
        return ops.add_inject_rms_norm(*args)


@pytest.mark.parametrize("scaled", [False, True])
def test_reference_is_the_formula(scaled):
    args = make(9, 5, 4, torch.float64, torch.float64, torch.float64, 0, pad=2)
    args = args if scaled else (*args[:4], None, args[5])
    expected = by_hand(*args, EPS)
    for ours, exact in zip(fused("reference", *args, EPS), expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


def test_float64_takes_a_narrower_bank_and_weight():
    args = make(9, 33, 4, torch.float64, torch.float32, torch.float32, 1)
    for ours, exact in zip(ops.add_inject_rms_norm(*args, EPS), by_hand(*args, EPS), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(0, 9),
    width=st.sampled_from(WIDTHS),
    count=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    wide_bank=st.booleans(),
    wide_weight=st.booleans(),
    scaled=st.booleans(),
    eps=st.sampled_from([0.0, 1e-6, 0.5]),
    pad=st.sampled_from([0, 3]),
    seed=st.integers(0, 10**6),
)
def test_kernel_obeys_the_error_rule(rows, width, count, dtype, wide_bank, wide_weight, scaled, eps, pad, seed):
    pytest.importorskip("personafast._C")
    bank_dtype, weight_dtype = (torch.float32 if wide else dtype for wide in (wide_bank, wide_weight))
    args = make(rows, width, count, dtype, bank_dtype, weight_dtype, seed, pad)
    args = args if scaled else (*args[:4], None, args[5])
    before = [tensor if tensor is None else tensor.clone() for tensor in args]
    normed, residual_out = fused("cpu", *args, eps)
    for tensor, was in zip(args, before, strict=True):
        assert tensor is was or torch.equal(tensor, was)
    # The sum is element by element in a fixed order, so that it has the bits of the reference.
    assert torch.equal(residual_out, fused("reference", *args, eps)[1])
    exact, total = by_hand(*args, eps, stored=residual_out)
    torch.testing.assert_close(residual_out.double(), total, rtol=HALF_ULP[dtype], atol=1e-6)
    for out in (normed, residual_out):
        assert out.dtype == dtype and out.is_contiguous() and not out.isnan().any()
    # One rounding to the dtype, from a result in fp32 that is itself some ulps off.
    error = (normed.double() - exact).abs()
    assert (error <= (HALF_ULP[dtype] + 2.0**-20) * exact.abs() + 2.0**-25).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule(dtype, within_twice):
    args = make(64, 4099, 6, dtype, dtype, dtype, 1)
    exact, plain = by_hand(*args, EPS), by_hand(*args, EPS, dtype=dtype)
    for ours, torchs, true in zip(ops.add_inject_rms_norm(*args, EPS), plain, exact, strict=True):
        within_twice(ours, torchs, true)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_and_reference_agree(dtype):
    pytest.importorskip("personafast._C")
    args = make(64, 1000, 6, dtype, torch.float32, dtype, 2)
    ours, plain = fused("cpu", *args, EPS), fused("reference", *args, EPS)
    assert torch.equal(ours[1], plain[1])
    torch.testing.assert_close(ours[0].double(), plain[0].double(), rtol=2 * HALF_ULP[dtype] + 1e-6, atol=0)
    if dtype != torch.float32:
        # Another order of a sum in fp32 moves few results across the border between two numbers of 16 bits.
        assert (ours[0] == plain[0]).double().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_row_depends_neither_on_the_batch_nor_on_threads(dtype):
    pytest.importorskip("personafast._C")
    update, residual, bank, slots, scale, weight = make(70, 3001, 9, dtype, dtype, torch.float32, 3)
    assert update.numel() >= 3 << 16  # the work from which a third thread is employed
    threads = torch.get_num_threads()

    def run(rows=slice(None)):
        return ops.add_inject_rms_norm(update[rows], residual[rows], bank, slots[rows], scale[rows], weight, EPS)

    with ops.use_backend("cpu"):
        together = run()
        alone = [run(slice(t, t + 1)) for t in range(70)]
        try:
            torch.set_num_threads(1)
            single = run()
            torch.set_num_threads(3)
            three = run()
        finally:
            torch.set_num_threads(threads)
    for i in range(2):
        assert torch.equal(together[i], torch.cat([pair[i] for pair in alone]))
        assert torch.equal(together[i], single[i]) and torch.equal(together[i], three[i])


@pytest.fixture(params=["kernel", "reference"])
def backend(request):
    if request.param == "kernel":
        pytest.importorskip("personafast._C")
        return "cpu"
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_rounds_the_sum_once(backend, dtype):
    # Half an ulp from the update and a little more from the bank: rounding between the two would lose both.
    half_ulp = HALF_ULP[dtype]
    update, residual = torch.full((1, 40), half_ulp).to(dtype), torch.ones(1, 40).to(dtype)
    bank = torch.full((1, 40), half_ulp / 4).to(dtype)
    args = (torch.ones(40, dtype=dtype), EPS)
    assert (fused(backend, update, residual, bank, int32(-1), None, *args)[1] == 1).all()
    assert (fused(backend, update, residual, bank, int32(0), None, *args)[1] == 1 + 2 * half_ulp).all()
    assert (fused(backend, update, residual, bank, int32(0), torch.tensor([-1.0]), *args)[1] == 1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_slot_minus_one_reads_nothing_of_the_bank(backend, dtype):
    update, residual, _, _, _, weight = make(4, 33, 1, dtype, dtype, dtype, 4)
    poison = torch.full((2, 33), float("nan"), dtype=dtype)
    poison[1] = 1.0
    slots, scale = int32(-1, 1, -1, 1), torch.tensor([float("nan"), 2.0, 1.0, 0.0])
    normed, residual_out = fused(backend, update, residual, poison, slots, scale, weight, EPS)
    sums = update.double() + residual.double()
    sums[1] += 2
    torch.testing.assert_close(residual_out.double(), sums, rtol=HALF_ULP[dtype], atol=1e-6)
    assert not normed.isnan().any()


def test_zero_rows_and_eps(backend):
    zeros, weight = torch.zeros(2, 20), torch.full((20,), 3.0)
    normed, residual_out = fused(backend, zeros, zeros, torch.zeros(0, 20), int32(-1, -1), None, weight, 1e-6)
    assert not normed.any() and not residual_out.any()
    normed, _ = fused(backend, zeros + 3, zeros, torch.zeros(0, 20), int32(-1, -1), None, weight, 7.0)
    torch.testing.assert_close(normed, torch.full((2, 20), 2.25))  # 3 / sqrt(9 + 7) * 3


def test_gemma_hands_in_one_plus_weight(backend):
    update, residual, bank, slots, scale, weight = make(4, 33, 2, *[torch.bfloat16] * 3, 5)
    normed, residual_out = fused(backend, update, residual, bank, slots, scale, 1 + weight.float(), EPS)
    x = residual_out.double()
    exact = x / (x.square().mean(1, keepdim=True) + EPS).sqrt() * (1 + weight.double())
    torch.testing.assert_close(normed.double(), exact, rtol=2.0**-8 + 1e-6, atol=0)


def test_empty_batches(backend):
    none = torch.empty(0, dtype=torch.int32)
    for rows, width in [(0, 4), (2, 0), (0, 0)]:
        hidden = torch.empty(rows, width)
        slots = none if rows == 0 else int32(-1, 0)
        outputs = fused(backend, hidden, hidden, torch.empty(1, width), slots, None, torch.ones(width), EPS)
        assert [tuple(out.shape) for out in outputs] == [(rows, width)] * 2


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_any_layout_of_the_inputs_and_dense_outputs(backend):
    update, residual, bank, slots, scale, weight = make(6, 33, 3, *[torch.float32] * 3, 6)
    expected = fused("reference", update, residual, bank, slots, scale, weight, EPS)
    args = [tensor.T.contiguous().T for tensor in (update, residual, bank)]
    args += [torch.stack([tensor, tensor], -1)[..., 0] for tensor in (slots, scale, weight)]
    for given_args in (args, [args[0], args[1], bank, *args[3:]]):
        for ours, exact in zip(fused(backend, *given_args, EPS), expected, strict=True):
            assert ours.is_contiguous()
            torch.testing.assert_close(ours, exact)


def test_kernel_asked_for_by_name_refuses_what_it_cannot_take():
    pytest.importorskip("personafast._C")
    update, residual, bank, *rest = make(6, 33, 3, *[torch.float32] * 3, 7)
    with pytest.raises(BackendError, match=r"add_inject_rms_norm.*stride\(1\) must be 1"):
        fused("cpu", update, residual, bank.T.contiguous().T, *rest, EPS)
    with pytest.raises(BackendError, match=r"add_inject_rms_norm.*dtype torch.float64"):
        fused("cpu", update.double(), residual.double(), bank, *rest, EPS)


@pytest.mark.parametrize("slot", [-2, 3, 2**31 - 1])
def test_slot_out_of_range_is_named(backend, slot):
    hidden = torch.zeros(3, 4)
    with pytest.raises(PersonafastError, match=rf"add_inject_rms_norm: `slots` holds {slot}.*valid are -1 to 2"):
        fused(backend, hidden, hidden, torch.ones(3, 4), int32(0, 1, slot), None, torch.ones(4), EPS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"update": torch.zeros(2, 3, 4)}, r"`update` has shape \[2, 3, 4\], expected \[T, H\]"),
        ({"update": torch.zeros(3, 4, dtype=torch.int32)}, "`update` has dtype int32"),
        ({"residual": torch.zeros(3, 5)}, r"`residual` has shape \[3, 5\], expected \[T, H\] = \[3, 4\]"),
        ({"residual": torch.zeros(3, 4, dtype=torch.bfloat16)}, "`residual` has dtype bfloat16, expected float32"),
        ({"bank": torch.zeros(2, 5)}, r"`bank` has shape \[2, 5\], expected \[S, H\] with H = 4"),
        ({"bank": torch.zeros(2, 4, dtype=torch.float16)}, "`bank` has dtype float16"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, r"`slots` has shape \[2\]"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, "`slots` has dtype int64, expected int32"),
        ({"scale": torch.zeros(4)}, r"`scale` has shape \[4\]"),
        ({"scale": torch.zeros(3, dtype=torch.float64)}, "`scale` has dtype float64"),
        ({"weight": torch.zeros(3)}, r"`weight` has shape \[3\], expected \[H\] = \[4\]"),
        ({"weight": torch.zeros(4, dtype=torch.float16)}, "`weight` has dtype float16"),
        ({"eps": -1e-6}, "`eps` is -1e-06, expected 0 or more"),
        ({"eps": float("nan")}, "`eps` is nan"),
        ({"residual": torch.zeros(3, 4, requires_grad=True)}, "no gradient"),
        ({"weight": torch.zeros(4, requires_grad=True)}, "no gradient"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "update": torch.zeros(3, 4),
        "residual": torch.zeros(3, 4),
        "bank": torch.zeros(2, 4),
        "slots": torch.zeros(3, dtype=torch.int32),
        "scale": torch.zeros(3),
        "weight": torch.zeros(4),
        "eps": 1e-6,
    }
    with pytest.raises(PersonafastError, match=message) as caught:
        ops.add_inject_rms_norm(**{**good, **change})
    assert str(caught.value).startswith("add_inject_rms_norm: ") and "\n" not in str(caught.value)
