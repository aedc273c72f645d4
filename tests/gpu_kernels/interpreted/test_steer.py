import pytest
import torch
from personafast._triton import launch

from personafast import ops
from personafast.errors import BackendError
from personafast.ops import SteerMode, _steer

# What is divided by nothing is computed all the same, and not used.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")

INF, NAN = float("inf"), float("nan")


def int8(*values):
    return torch.tensor(values, dtype=torch.int8)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@pytest.fixture(params=["one wave", "several waves"])
def waves(request, monkeypatch):
    """Both orders of reading: as on a GPU that holds all programs at once, and as on one that holds none."""
    if request.param == "several waves":
        monkeypatch.setattr(launch, "INTERPRETED", launch.INTERPRETED._replace(multiprocessors=0))


def make(width, dtype, directions_dtype):
    """Six rows, one without a slot and one of a slot that does not exist, the others of the four modes."""
    g = torch.Generator().manual_seed(width)
    wide = torch.randn(6, width + 3, generator=g).to(dtype)
    directions = (2 * torch.randn(4, width, generator=g)).to(directions_dtype)
    params = torch.randn(4, 2, generator=g).sort(1).values
    scale = torch.rand(6, generator=g) + 0.1
    return wide, directions, int32(2, -1, 3, 0, 1, 9), int8(0, 1, 2, 3), params, scale


def by_reference(hidden, directions, slots, mode, params, scale=None, dtype=torch.float64):
    slots = torch.where(slots < directions.shape[0], slots, -1)
    scale = None if scale is None else scale.to(dtype)
    out = hidden.to(dtype, copy=True)
    _steer.reference(out, directions.to(dtype), slots, mode, params.to(dtype), scale)
    return out


def plainly(hidden, directions, slots, mode, params, scale=None):
    """The formulas in the precision of `hidden`: what plain torch errs."""
    out = hidden.clone()
    for t, s in enumerate(slots.tolist()):
        if not 0 <= s < 4:
            continue
        h, d, (p0, p1) = hidden[t], directions[s].to(hidden.dtype), params[s].to(hidden.dtype)
        a = 1.0 if scale is None else scale[t].to(hidden.dtype)
        u = d / d.norm()
        m = h + a * p0 * d
        results = {
            SteerMode.ABLATE: lambda h=h, u=u, a=a, p0=p0: h - a * p0 * (h @ u) * u,
            SteerMode.CLAMP: lambda h=h, u=u, a=a, p0=p0, p1=p1: h + a * ((h @ u).clamp(p0, p1) - h @ u) * u,
            SteerMode.NORM_PRESERVING: lambda h=h, m=m: m * (h.norm() / m.norm()),
            SteerMode.REPLACE: lambda h=h, d=d, a=a, p0=p0: (1 - a) * h + a * p0 * d,
        }
        out[t] = results[SteerMode(int(mode[s]))]()
    return out


@pytest.mark.parametrize("kinds", [(torch.float32,) * 2, (torch.float16,) * 2, (torch.float16, torch.float32)], ids=str)
@pytest.mark.parametrize("width", [1, 127, 1000, 4097, 20490])
@pytest.mark.parametrize("scaled", [False, True])
def test_obeys_the_error_rule(kinds, width, scaled):
    wide, *args, scale = make(width, *kinds)
    args = [*args, scale] if scaled else args
    before, hidden = wide.clone(), wide[:, :width]
    exact, plain = by_reference(hidden, *args), plainly(hidden, *args)
    assert ops.steer_(hidden, *args) is hidden
    assert torch.equal(wide[:, width:], before[:, width:])
    assert torch.equal(wide[[1, 5]], before[[1, 5]])
    assert not torch.equal(wide[0], before[0]) or width == 1
    error, allowed = (hidden.double() - exact).abs().max(), (plain.double() - exact).abs().max()
    # The interpreter adds up a tile of two sums one element after the other, where threads have eight each.
    assert error <= 2 * allowed + 1e-6 + 2e-10 * width


@pytest.mark.parametrize("width", [100, 20490])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_replacing_has_the_bits_of_the_reference(width, dtype):
    wide, directions, slots, _, params, scale = make(width, dtype, dtype)
    slots[-1] = 0
    expected = wide.clone()
    mode = int8(3, 3, 3, 3)
    _steer.reference(expected[:, :width], directions, slots, mode, params, scale)
    ops.steer_(wide[:, :width], directions, slots, mode, params, scale)
    assert torch.equal(wide, expected)


@pytest.mark.parametrize("mode", list(SteerMode))
def test_bfloat16_is_summed_in_float32(mode):
    wide, directions, slots, _, params, scale = make(200, torch.bfloat16, torch.bfloat16)
    args = (directions, slots, int8(*[int(mode)] * 4), params, scale)
    exact = by_reference(wide[:, :200], *args)
    ours = ops.steer_(wide[:, :200], *args)
    # One rounding, of which the interpreter makes a truncation.
    torch.testing.assert_close(ours.double(), exact, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("width", [4, 20484])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_left_alone_keep_their_bits(width, dtype, waves):
    first = torch.tensor([1.0, -0.0, 2.0, -3.0])
    odd = torch.tensor([NAN, -0.0, INF, 1.0])
    hidden = torch.zeros(11, width, dtype=dtype)
    hidden[:, :4] = torch.stack([odd] + [first] * 8 + [odd] * 2).to(dtype)
    before = hidden.clone()
    directions = torch.zeros(8, width)
    directions[2:, :4] = torch.tensor([2.0, 5.0, 4.0, -6.0])
    directions[2, :4] = 2 * first
    directions[7] = NAN
    modes = int8(0, 1, 2, 3, 0, 1, 2, 4)
    # A zero direction, twice; m = 0; nothing kept out or put in; no ablation; within the range; nothing added; a mode
    # that nobody knows.
    params = torch.tensor([[1.0, 0], [5, 6], [-0.5, 0], [1, 0], [0, 0], [-1e9, 1e9], [0, 0], [1, 1]])
    scale = torch.tensor([1.0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1])
    ops.steer_(hidden, directions, int32(-1, 0, 1, 2, 3, 4, 5, 6, 0, 7, 8), modes, params, scale)
    kind = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(hidden.view(kind), before.view(kind))


@pytest.mark.parametrize("width", [7, 20483])
def test_clamping(width):
    g = torch.Generator().manual_seed(width)
    direction = 3 * torch.randn(1, width, generator=g)
    u = direction[0].double() / direction[0].double().norm()
    # Open ranges, a target, bounds that cross, and within each a row on either side.
    params = torch.tensor([[-2, INF], [-INF, 2], [-INF, INF], [1.5, 1.5], [3, -1]])
    coordinates = torch.tensor([-5.0, 5.0]).repeat(5)
    hidden = torch.randn(10, width, generator=g)
    hidden += ((coordinates - hidden.double() @ u)[:, None] * u).float()
    slots = torch.arange(5, dtype=torch.int32).repeat_interleave(2)
    before = hidden.clone()
    ops.steer_(hidden, direction.expand(5, width), slots, int8(1, 1, 1, 1, 1), params)
    expected = torch.tensor([-2.0, 5, -5, 2, -5, 5, 1.5, 1.5, -1, -1]).double()
    torch.testing.assert_close(hidden.double() @ u, expected, rtol=0, atol=1e-5 + 2e-9 * width)
    assert torch.equal(hidden[[1, 2, 4, 5]], before[[1, 2, 4, 5]])


@pytest.mark.parametrize("width", [7, 20483])
def test_nan_spreads_over_its_row_but_for_replacing(width):
    hidden = torch.ones(6, width)
    hidden[:4, 3] = NAN
    # The last two: a bound that is NaN.
    params = torch.tensor([[1.0, 0], [-9, -8], [1, 0], [1, 0], [NAN, 1], [-1, NAN]])
    directions = torch.linspace(1, 2, width).repeat(6, 1)
    ops.steer_(hidden, directions, int32(0, 1, 2, 3, 4, 5), int8(0, 1, 2, 3, 1, 1), params)
    assert hidden[[0, 1, 2, 4, 5]].isnan().all()
    assert hidden[3].isnan().nonzero().tolist() == [[3]]


def test_zero_rows_of_hidden_take_the_direction():
    hidden = torch.zeros(4, 5)
    directions = torch.arange(1.0, 6.0)[None].repeat(4, 1)
    params = torch.tensor([[1.0, 0], [2, 3], [1, 0], [2, 0]])
    ops.steer_(hidden, directions, int32(0, 1, 2, 3), int8(0, 1, 2, 3), params)
    unit = directions[0] / directions[0].norm()
    torch.testing.assert_close(hidden, torch.stack([torch.zeros(5), 2 * unit, torch.zeros(5), 2 * directions[0]]))


def test_empty_batches_and_other_layouts():
    none = torch.empty(0, dtype=torch.int32)
    ops.steer_(torch.empty(0, 4), torch.ones(1, 4), none, int8(0), torch.ones(1, 2))
    hidden = torch.ones(2, 4)
    ops.steer_(hidden, torch.empty(0, 4), int32(-1, 0), int8(), torch.empty(0, 2))
    assert torch.equal(hidden, torch.ones(2, 4))
    ops.steer_(torch.empty(2, 0), torch.empty(1, 0), int32(0, 0), int8(2), torch.ones(1, 2))

    wide, directions, *rest = make(33, torch.float32, torch.float32)
    expected = ops.steer_(wide.clone(), torch.nn.functional.pad(directions, (0, 3)), *rest)
    spread = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in rest]
    turned = wide.T.contiguous().T
    directions = torch.nn.functional.pad(directions, (0, 3)).T.contiguous().T
    assert torch.equal(ops.steer_(turned, directions, *spread), expected)


def test_float64_is_refused_by_name():
    with pytest.raises(BackendError, match=r"steer_: backend 'triton' cannot take dtype torch\.float64"):
        ops.steer_(torch.zeros(1, 2).double(), torch.ones(1, 2), int32(0), int8(0), torch.ones(1, 2))
