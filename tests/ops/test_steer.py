import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import BackendError, PersonafastError
from personafast.ops import SteerMode

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HALF_ULP = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
WIDTHS = [1, 7, 8, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 100, 123]


def int8(*values):
    return torch.tensor(values, dtype=torch.int8)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def make(rows, width, count, dtype, directions_dtype, seed, pad=0):
    """Rows and directions with NaN between them, and slots, params and scales at random, the modes by turns."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.full((rows, width + pad), float("nan"), dtype=dtype)
    hidden[:, :width] = torch.randn(rows, width, generator=g).to(dtype)
    directions = torch.full((count, width + pad), float("nan"), dtype=directions_dtype)
    directions[:, :width] = (2 * torch.randn(count, width, generator=g)).to(directions_dtype)
    slots = torch.randint(-1, count, (rows,), generator=g, dtype=torch.int32)
    mode = ((torch.arange(count) + seed) % 4).to(torch.int8)
    params = torch.randn(count, 2, generator=g).sort(1).values
    scale = torch.rand(rows, generator=g) + 0.1
    return hidden[:, :width], directions[:, :width], slots, mode, params, scale


def by_hand(hidden, directions, slots, mode, params, scale=None, dtype=torch.float64):
    """The docstring, row by row."""
    out = hidden.to(dtype, copy=True)
    for t, s in enumerate(slots.tolist()):
        if s < 0:
            continue
        h, d, p0, p1 = out[t].clone(), directions[s].to(dtype), float(params[s, 0]), float(params[s, 1])
        a = 1.0 if scale is None else float(scale[t])
        if mode[s] == 0 and d.any():
            u = d / d.norm()
            out[t] = h - a * p0 * (h @ u) * u
        elif mode[s] == 1 and d.any():
            u = d / d.norm()
            out[t] = h + a * (min(max(float(h @ u), p0), p1) - (h @ u)) * u
        elif mode[s] == 2:
            m = h + a * p0 * d
            out[t] = m * (h.norm() / m.norm()) if m.any() else h
        elif mode[s] == 3:
            out[t] = (1 - a) * h + a * p0 * d
    return out


def steer(backend, hidden, *args):
    with ops.use_backend(backend):
        return ops.steer_(hidden, *args)


def test_modes_are_numbered_from_zero():
    assert [mode.name for mode in SteerMode] == ["ABLATE", "CLAMP", "NORM_PRESERVING", "REPLACE"]
    assert list(SteerMode) == [0, 1, 2, 3]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_reference_is_the_formula(scaled, seed):
    *args, scale = make(40, 9, 12, torch.float64, torch.float64, seed, pad=2)
    if scaled:
        args.append(scale)
    expected = by_hand(*args)
    torch.testing.assert_close(steer("reference", *args), expected, rtol=1e-12, atol=1e-12)


def test_float64_is_steered_in_float64():
    args = make(20, 33, 6, torch.float64, torch.float32, 5)
    expected = by_hand(*args)
    torch.testing.assert_close(ops.steer_(*args), expected, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=200)
@given(
    rows=st.integers(0, 9),
    width=st.sampled_from(WIDTHS),
    count=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    wide_directions=st.booleans(),
    scaled=st.booleans(),
    pad=st.sampled_from([0, 3]),
    seed=st.integers(0, 10**6),
)
def test_kernel_obeys_the_error_rule(rows, width, count, dtype, wide_directions, scaled, pad, seed):
    pytest.importorskip("personafast._C")
    args = make(rows, width, count, dtype, torch.float32 if wide_directions else dtype, seed, pad)
    args = args if scaled else args[:-1]
    hidden, directions, slots, mode, params = args[:5]
    before = [tensor.clone() for tensor in args]
    exact = by_hand(*args)
    assert steer("cpu", *args) is hidden
    for tensor, was in zip(args[1:], before[1:], strict=True):
        torch.testing.assert_close(tensor, was, rtol=0, atol=0)
    assert torch.equal(hidden[slots < 0], before[0][slots < 0])
    if pad and rows:
        assert hidden.as_strided((rows, pad), (width + pad, 1), hidden.storage_offset() + width).isnan().all()
    assert not hidden.isnan().any()
    error = (hidden.double() - exact).abs()
    for t, s in enumerate(slots.tolist()):
        if s < 0:
            continue
        h, d, a = before[0][t].double(), directions[s].double(), float(args[5][t]) if scaled else 1.0
        # What fp32 may lose before the one rounding: a few ulps of whatever is added up, and where the norm is kept,
        # as many times more as the row had to be stretched.
        large = h.abs().max() + a * params[s].double().abs().max() * d.abs().max() + h.norm()
        stretched = 1.0
        if mode[s] == SteerMode.NORM_PRESERVING:
            moved = h + a * float(params[s, 0]) * d
            stretched = max(1.0, float(h.norm() / moved.norm())) * max(1.0, float(large / moved.norm()))
        lost = 2.0**-24 * 16 * large * stretched
        # One rounding to the dtype, and no other: half an ulp, or half the smallest denormal number.
        assert (error[t] <= HALF_ULP[dtype] * exact[t].abs() + lost + 2.0**-25).all()


@pytest.mark.parametrize("mode", list(SteerMode))
@pytest.mark.parametrize("dtype", DTYPES)
def test_error_rule(mode, dtype, within_twice):
    args = make(64, 4099, 6, dtype, dtype, 1)
    args[3].fill_(int(mode))
    exact, plain = by_hand(*args), by_hand(*args, dtype=dtype)
    within_twice(ops.steer_(*args), plain, exact)


@pytest.mark.parametrize("mode", list(SteerMode))
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_and_reference_agree(mode, dtype):
    pytest.importorskip("personafast._C")
    hidden, *rest = make(64, 1000, 6, dtype, torch.float32, 2)
    rest[2].fill_(int(mode))
    ours, plain = steer("cpu", hidden.clone(), *rest), steer("reference", hidden.clone(), *rest)
    torch.testing.assert_close(ours.double(), plain.double(), rtol=2 * HALF_ULP[dtype], atol=1e-5)
    if dtype != torch.float32:
        # Another order of a sum in fp32 moves few results across the border between two numbers of 16 bits.
        assert (ours == plain).double().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernel_row_depends_neither_on_the_batch_nor_on_threads(dtype):
    pytest.importorskip("personafast._C")
    hidden, directions, slots, mode, params, scale = make(70, 3001, 9, dtype, dtype, 3)
    assert hidden.numel() >= 3 << 16  # the work from which a third thread is employed
    assert set(slots.tolist()) == set(range(-1, 9))
    threads = torch.get_num_threads()
    with ops.use_backend("cpu"):
        together = ops.steer_(hidden.clone(), directions, slots, mode, params, scale)
        alone = hidden.clone()
        for t in range(70):
            ops.steer_(alone[t : t + 1], directions, slots[t : t + 1], mode, params, scale[t : t + 1])
        try:
            torch.set_num_threads(1)
            single = ops.steer_(hidden.clone(), directions, slots, mode, params, scale)
            torch.set_num_threads(3)
            three = ops.steer_(hidden.clone(), directions, slots, mode, params, scale)
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(together, alone) and torch.equal(together, single) and torch.equal(together, three)


@pytest.fixture(params=["kernel", "reference"])
def backend(request):
    if request.param == "kernel":
        pytest.importorskip("personafast._C")
        return "cpu"
    return request.param


def one(mode, p0, p1=0.0, width=100, dtype=torch.float32, rows=5):
    g = torch.Generator().manual_seed(7)
    hidden = torch.randn(rows, width, generator=g).to(dtype)
    direction = 3 * torch.randn(1, width, generator=g)
    args = (direction, torch.zeros(rows, dtype=torch.int32), int8(int(mode)), torch.tensor([[p0, p1]]))
    return hidden, args, direction[0].double() / direction[0].double().norm()


def test_ablation_takes_the_direction_out(backend):
    hidden, args, u = one(SteerMode.ABLATE, 1.0)
    before = hidden.double()
    steer(backend, hidden, *args)
    assert (hidden.double() @ u).abs().max() < 1e-5
    across = before - (before @ u)[:, None] * u
    torch.testing.assert_close(hidden.double(), across, rtol=0, atol=1e-5)
    half, args, u = one(SteerMode.ABLATE, 0.5)
    steer(backend, half, *args, torch.full((5,), 1.5))
    torch.testing.assert_close(half.double() @ u, 0.25 * (before @ u), rtol=0, atol=1e-5)


def test_clamp_holds_a_range(backend):
    hidden, args, u = one(SteerMode.CLAMP, -0.25, 0.5, rows=40)
    before = hidden.clone()
    coordinate = before.double() @ u
    steer(backend, hidden, *args)
    torch.testing.assert_close(hidden.double() @ u, coordinate.clamp(-0.25, 0.5), rtol=0, atol=1e-5)
    within = (coordinate > -0.24) & (coordinate < 0.49)
    assert within.any() and not within.all()
    assert torch.equal(hidden[within], before[within])


@pytest.mark.parametrize(("p0", "p1"), [(-2.0, float("inf")), (float("-inf"), 2.0), (float("-inf"), float("inf"))])
def test_clamp_takes_open_ranges(backend, p0, p1):
    hidden, args, u = one(SteerMode.CLAMP, p0, p1, rows=40)
    hidden *= 4
    expected = (hidden.double() @ u).clamp(p0, p1)
    steer(backend, hidden, *args)
    torch.testing.assert_close(hidden.double() @ u, expected, rtol=0, atol=1e-5)


def test_clamp_sets_a_target_and_reads_crossed_bounds_as_torch_does(backend):
    for p0, p1, expected in [(1.5, 1.5, 1.5), (3.0, -1.0, -1.0)]:
        hidden, args, u = one(SteerMode.CLAMP, p0, p1)
        steer(backend, hidden, *args)
        torch.testing.assert_close(hidden.double() @ u, torch.full((5,), expected).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bound", [0, 1])
def test_clamp_by_nan_gives_nan(backend, bound):
    for low, high in [(-1.0, 1.0), (-9.0, -5.0), (5.0, 9.0)]:
        hidden, args, _ = one(SteerMode.CLAMP, low, high)
        args[3][0, bound] = float("nan")
        assert steer(backend, hidden, *args).isnan().all()


@pytest.mark.parametrize("p0", [0.5, -2.0, 100.0])
def test_norm_preserving_addition_keeps_the_norm(backend, p0):
    hidden, args, _ = one(SteerMode.NORM_PRESERVING, p0)
    before = hidden.clone()
    steer(backend, hidden, *args)
    torch.testing.assert_close(hidden.norm(dim=1), before.norm(dim=1), rtol=1e-6, atol=0)
    moved = before + p0 * args[0]
    assert (torch.cosine_similarity(hidden, moved) > 1 - 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_replace_puts_the_vector_in_place(backend, dtype):
    hidden, args, _ = one(SteerMode.REPLACE, 1.5, dtype=dtype)
    before = hidden.clone()
    steer(backend, hidden, *args)
    assert torch.equal(hidden, (1.5 * args[0]).to(dtype).expand_as(hidden))
    steer(backend, hidden.copy_(before), *args, torch.full((5,), 0.25))
    expected = 0.75 * before.double() + 0.375 * args[0].double()
    torch.testing.assert_close(hidden.double(), expected, rtol=HALF_ULP[dtype], atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_left_alone_keep_their_bits(backend, dtype):
    odd = torch.tensor([float("nan"), -0.0, float("inf"), 1.0]).to(dtype)
    hidden = torch.stack([odd] + [torch.tensor([1.0, -0.0, 2.0, -3.0]).to(dtype)] * 8)
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    before = hidden.clone()
    directions = torch.zeros(7, 4)
    directions[2:] = torch.tensor([2.0, 5.0, 4.0, -6.0])
    modes = int8(0, 1, 2, 3, 0, 1, 2)
    # A zero direction, twice; m = 0; nothing kept out or put in; no ablation; within the range; nothing added.
    params = torch.tensor([[1.0, 0], [5, 6], [-0.5, 0], [1, 0], [0, 0], [-1e9, 1e9], [0, 0]])
    scale = torch.tensor([1.0, 1, 1, 1, 0, 1, 1, 1, 0])
    directions[2] = 2 * hidden[1].float()
    steer(backend, hidden, directions, int32(-1, 0, 1, 2, 3, 4, 5, 6, 0), modes, params, scale)
    assert torch.equal(hidden.view(kind), before.view(kind))


def test_zero_rows(backend):
    hidden = torch.zeros(4, 5)
    directions, slots = torch.arange(1.0, 6.0)[None].repeat(4, 1), int32(0, 1, 2, 3)
    steer(backend, hidden, directions, slots, int8(0, 1, 2, 3), torch.tensor([[1.0, 0], [2, 3], [1, 0], [2, 0]]))
    unit = directions[0] / directions[0].norm()
    expected = torch.stack([torch.zeros(5), 2 * unit, torch.zeros(5), 2 * directions[0]])
    torch.testing.assert_close(hidden, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_spreads_over_its_row_alone(backend, dtype):
    hidden, args, _ = one(SteerMode.ABLATE, 1.0, dtype=dtype, rows=3)
    hidden[1, 40] = float("nan")
    steer(backend, hidden, *args)
    assert hidden[1].isnan().all() and not hidden[[0, 2]].isnan().any()
    hidden, args, _ = one(SteerMode.REPLACE, 1.0, dtype=dtype, rows=3)
    hidden[1, 40] = float("nan")
    steer(backend, hidden, *args)
    assert hidden.isnan().nonzero().tolist() == [[1, 40]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_directions_of_any_length(backend, dtype):
    for length in (1e-6, 1.0, 1e3):
        hidden, args, u = one(SteerMode.ABLATE, 1.0, dtype=dtype)
        expected = hidden.double() - (hidden.double() @ u)[:, None] * u
        steer(backend, hidden, length * args[0], *args[1:])
        torch.testing.assert_close(hidden.double(), expected, rtol=HALF_ULP[dtype], atol=2e-6)


def test_empty_rows_and_directions(backend):
    none = torch.empty(0, dtype=torch.int32)
    steer(backend, torch.empty(0, 4), torch.ones(1, 4), none, int8(0), torch.ones(1, 2))
    hidden = torch.ones(2, 4)
    steer(backend, hidden, torch.empty(0, 4), int32(-1, -1), int8(), torch.empty(0, 2))
    assert torch.equal(hidden, torch.ones(2, 4))
    hidden = steer(backend, torch.empty(2, 0), torch.empty(1, 0), int32(0, 0), int8(2), torch.ones(1, 2))
    assert hidden.shape == (2, 0)


def test_small_arguments_may_be_strided(backend):
    hidden, directions, slots, mode, params, scale = make(9, 33, 6, torch.float32, torch.float32, 8)
    expected = steer(backend, hidden.clone(), directions, slots, mode, params, scale)
    spread = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in (slots, mode, params, scale)]
    assert torch.equal(steer(backend, hidden.clone(), directions, *spread), expected)


def test_columns_apart_need_the_reference():
    hidden, directions, *rest = make(9, 33, 6, torch.float32, torch.float32, 9)
    expected = steer("reference", hidden.clone(), directions, *rest)
    turned = hidden.T.contiguous().T
    torch.testing.assert_close(ops.steer_(turned, directions, *rest), expected)
    pytest.importorskip("personafast._C")
    for bad in [(turned, directions), (hidden, directions.T.contiguous().T)]:
        with pytest.raises(BackendError, match=r"steer_.*stride\(1\) must be 1"):
            steer("cpu", *bad, *rest)
    with pytest.raises(BackendError, match=r"steer_.*dtype torch.float64"):
        steer("cpu", hidden.double(), directions, *rest)


@pytest.mark.parametrize("slot", [-2, 3, 2**31 - 1])
def test_slot_out_of_range_is_named_and_nothing_written(backend, slot):
    hidden = torch.zeros(3, 4)
    args = (torch.ones(3, 4), int32(0, 1, slot), int8(3, 3, 3), torch.ones(3, 2))
    with pytest.raises(PersonafastError, match=rf"steer_: `slots` holds {slot}.*valid are -1 to 2"):
        steer(backend, hidden, *args)
    assert not hidden.any()


@pytest.mark.parametrize("code", [-1, 4, 127, -128])
def test_unknown_mode_is_named_and_nothing_written(backend, code):
    hidden = torch.zeros(3, 4)
    mode = int8(3, 3, code)
    known = r"known are 0 \(ablate\), 1 \(clamp\), 2 \(norm_preserving\), 3 \(replace\)"
    with pytest.raises(PersonafastError, match=rf"steer_: `mode` of slot 2 holds the unknown code {code}: {known}"):
        steer(backend, hidden, torch.ones(3, 4), int32(0, -1, 2), mode, torch.ones(3, 2))
    assert not hidden.any()
    # A slot that no row uses may be of any.
    steer(backend, hidden, torch.ones(3, 4), int32(0, -1, 1), mode, torch.ones(3, 2))
    assert hidden.sum(1).tolist() == [4, 0, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"`hidden` has shape \[2, 3, 4\], expected \[T, H\]"),
        ({"hidden": torch.zeros(3, 4, dtype=torch.int32)}, "`hidden` has dtype int32"),
        ({"directions": torch.zeros(2, 5)}, r"`directions` has shape \[2, 5\], expected \[S, H\] with H = 4"),
        ({"directions": torch.zeros(4)}, r"`directions` has shape \[4\]"),
        ({"directions": torch.zeros(2, 4, dtype=torch.float16)}, "`directions` has dtype float16, expected float32"),
        ({"slots": torch.zeros(2, dtype=torch.int32)}, r"`slots` has shape \[2\], expected \[T\] = \[3\]"),
        ({"slots": torch.zeros(3, dtype=torch.int64)}, "`slots` has dtype int64, expected int32"),
        ({"mode": torch.zeros(3, dtype=torch.int8)}, r"`mode` has shape \[3\], expected \[S\] = \[2\]"),
        ({"mode": torch.zeros(2, dtype=torch.int32)}, "`mode` has dtype int32, expected int8"),
        ({"params": torch.zeros(2)}, r"`params` has shape \[2\], expected \[S, 2\] = \[2, 2\]"),
        ({"params": torch.zeros(2, 2, dtype=torch.bfloat16)}, "`params` has dtype bfloat16, expected float32"),
        ({"scale": torch.zeros(4)}, r"`scale` has shape \[4\]"),
        ({"scale": torch.zeros(3, dtype=torch.float64)}, "`scale` has dtype float64"),
        ({"directions": torch.zeros(2, 4, requires_grad=True)}, "no gradient"),
        ({"params": torch.zeros(2, 2, requires_grad=True)}, "no gradient"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "hidden": torch.zeros(3, 4),
        "directions": torch.zeros(2, 4),
        "slots": torch.zeros(3, dtype=torch.int32),
        "mode": torch.zeros(2, dtype=torch.int8),
        "params": torch.zeros(2, 2),
        "scale": torch.zeros(3),
    }
    with pytest.raises(PersonafastError, match=message) as caught:
        ops.steer_(**{**good, **change})
    assert str(caught.value).startswith("steer_: ") and "\n" not in str(caught.value)
