import pytest
import torch

from personafast import ops
from personafast.errors import BackendError
from personafast.ops import _add_inject_rms_norm

EPS = 1e-6


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def make(width, dtype, bank_dtype, weight_dtype):
    """Four rows with gaps between them, one without a slot and one of a slot that does not exist."""
    g = torch.Generator().manual_seed(width)
    update, residual = (torch.randn(4, width + 3, generator=g).to(dtype)[:, :width] for _ in range(2))
    bank = torch.randn(3, width, generator=g).to(bank_dtype)
    weight = (1 + 0.3 * torch.randn(width, generator=g)).to(weight_dtype)
    return update, residual, bank, int32(2, -1, 7, 0), torch.randn(4, generator=g), weight


def by_reference(update, residual, bank, slots, scale, weight, eps, dtype=None):
    slots = torch.where(slots < bank.shape[0], slots, -1)
    floats = (None if x is None else x.to(dtype or x.dtype) for x in (update, residual, bank, scale, weight))
    update, residual, bank, scale, weight = floats
    return _add_inject_rms_norm.reference(update, residual, bank, slots, scale, weight, eps)


def plainly(update, residual, bank, slots, scale, weight, eps):
    """The steps one after the other in the precision of `update`: what plain torch errs."""
    total = update + residual
    for t, s in enumerate(slots.tolist()):
        if 0 <= s < bank.shape[0]:
            total[t] += (bank[s] * (1 if scale is None else scale[t])).to(total.dtype)
    return total * torch.rsqrt(total.square().mean(1, keepdim=True) + eps) * weight.to(total.dtype), total


@pytest.mark.parametrize(
    "kinds",
    [
        (torch.float32,) * 3,
        (torch.float16,) * 3,
        (torch.float16, torch.float32, torch.float16),
        (torch.float16, torch.float16, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("width", [1, 127, 1000, 4097, 20490])
@pytest.mark.parametrize("scaled", [False, True])
def test_obeys_the_error_rule(kinds, width, scaled):
    *args, scale, weight = make(width, *kinds)
    args = (*args, scale if scaled else None, weight, EPS)
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
    ours, same = ops.add_inject_rms_norm(*args), by_reference(*args)
    exact, plain = by_reference(*args, dtype=torch.float64), plainly(*args)
    for x, was in zip(args, before, strict=True):
        assert torch.equal(x, was) if isinstance(x, torch.Tensor) else x is was
    # Sums are element by element in a fixed order, so that residual_out has the bits of the reference.
    assert torch.equal(ours[1], same[1])
    for result, usual, right in zip(ours, plain, exact, strict=True):
        assert result.dtype == kinds[0] and result.is_contiguous()
        error, allowed = (result.double() - right).abs().max(), (usual.double() - right).abs().max()
        assert error <= 2 * allowed + 1e-6
    # The norm is that of what has been stored, and it is rounded once.
    x = ours[1].double()
    right = x / (x.square().mean(1, keepdim=True) + EPS).sqrt() * args[5].double()
    half_ulp = 2.0**-11 if kinds[0] == torch.float16 else 0
    torch.testing.assert_close(ours[0].double(), right, rtol=half_ulp + 1e-6, atol=2.0**-25)


@pytest.mark.parametrize("width", [200, 20490])
def test_bfloat16_is_summed_in_float32(width):
    args = (*make(width, *[torch.bfloat16] * 3), EPS)
    # One rounding each, of which the interpreter makes a truncation.
    for ours, right in zip(ops.add_inject_rms_norm(*args), by_reference(*args, dtype=torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=2**-6, atol=1e-6)


@pytest.mark.parametrize("width", [33, 20483])
def test_slot_minus_one_reads_nothing_of_the_bank(width):
    update, residual, _, _, _, weight = make(width, *[torch.float16] * 3)
    poison = torch.full((2, width), float("nan"), dtype=torch.float16)
    poison[1] = 1.0
    scale = torch.tensor([float("nan"), 2.0, float("inf"), 0.0])
    normed, total = ops.add_inject_rms_norm(update, residual, poison, int32(-1, 1, 2, 1), scale, weight, EPS)
    expected = update.float() + residual.float()
    expected[1] += 2
    assert torch.equal(total, expected.half()) and not normed.isnan().any()


@pytest.mark.parametrize("width", [20, 20484])
def test_eps_is_part_of_the_root(width):
    zeros, weight = torch.zeros(2, width), torch.full((width,), 3.0)
    normed, _ = ops.add_inject_rms_norm(zeros + 3, zeros, torch.zeros(0, width), int32(-1, 0), None, weight, 7.0)
    torch.testing.assert_close(normed, torch.full((2, width), 2.25))  # 3 / sqrt(9 + 7) * 3
    normed, _ = ops.add_inject_rms_norm(zeros, zeros, torch.zeros(0, width), int32(-1, -1), None, weight, EPS)
    assert not normed.any()


def test_empty_batches_and_other_layouts():
    for rows, width in [(0, 4), (2, 0), (0, 0)]:
        hidden, slots = torch.empty(rows, width), torch.zeros(rows, dtype=torch.int32)
        made = ops.add_inject_rms_norm(hidden, hidden, torch.empty(1, width), slots, None, torch.ones(width), EPS)
        assert [tuple(out.shape) for out in made] == [(rows, width)] * 2
    args = make(33, *[torch.float32] * 3)
    expected = ops.add_inject_rms_norm(*args, EPS)
    turned = [x.T.contiguous().T for x in args[:3]] + [torch.stack([x, x], -1)[..., 0] for x in args[3:]]
    for ours, same in zip(ops.add_inject_rms_norm(*turned, EPS), expected, strict=True):
        assert ours.is_contiguous() and torch.equal(ours, same)


def test_float64_is_refused_by_name():
    x = torch.zeros(1, 2).double()
    with pytest.raises(BackendError, match=r"add_inject_rms_norm: backend 'triton' cannot take dtype torch\.float64"):
        ops.add_inject_rms_norm(x, x, x, int32(0), None, x[0], EPS)
