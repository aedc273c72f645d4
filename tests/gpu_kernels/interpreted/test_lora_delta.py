import pytest
import torch

from personafast import ops
from personafast.errors import BackendError
from personafast.ops import _lora_delta

DTYPES = [torch.float32, torch.float16]


def make(rows, features, outputs, adapters, rank, dtype, adjacent_outputs=True, pad=0, seed=0):
    """Arguments, what no row's result depends on NaN: gaps between rows, and the factors beyond each adapter's rank."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        wide = torch.full((*shape[:-1], shape[-1] + pad), float("nan"), dtype=dtype)
        wide[..., : shape[-1]] = (scale * torch.randn(shape, generator=g)).to(dtype)
        return wide[..., : shape[-1]]

    out, x = normal(rows, outputs), normal(rows, features)
    A = normal(adapters, rank, features, scale=features**-0.5)
    B = normal(adapters, rank, outputs).transpose(1, 2) if adjacent_outputs else normal(adapters, outputs, rank)
    slots = torch.randint(-1, adapters + 1, (rows,), generator=g, dtype=torch.int32)  # M is out of range
    scale = torch.randn(adapters, generator=g)
    ranks = torch.randint(0, rank + 1, (adapters,), generator=g, dtype=torch.int32)
    ranks[-1:] = rank
    for m, r in enumerate(ranks.tolist()):
        A[m, r:] = float("nan")
        B[m, :, r:] = float("nan")
    return out, x, A, B, slots, scale, ranks


def by_hand(out, x, A, B, slots, scale, ranks, dtype=torch.float64):
    out = out.to(dtype).clone()
    for m in range(A.shape[0]):
        rows, r = slots == m, int(ranks[m].clamp(0, A.shape[1]))
        inner = x[rows].to(dtype) @ A[m, :r].to(dtype).T
        out[rows] += scale[m].to(dtype) * (inner @ B[m, :, :r].to(dtype).T)
    return out


def run(args, small=1e-6):
    """Runs the kernel and holds it to the error rule; gives the result."""
    out, slots = args[0], args[4]
    exact, plain, before = by_hand(*args), by_hand(*args, dtype=out.dtype), out.clone()
    ops.lora_delta_(*args)
    assert not out.isnan().any()
    error, allowed = ((each.double() - exact).abs().max().item() for each in (out, plain))
    # The scale of the sums, and the one rounding at the end, in which plain torch may be lucky in a few values.
    ulp = exact.abs().max().item() * torch.finfo(out.dtype).eps / 2
    assert error <= 2 * allowed + small * exact.abs().max().item() + ulp, (error, allowed)
    alone = (slots < 0) | (slots >= args[2].shape[0])
    assert torch.equal(out[alone], before[alone])
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "features", "outputs", "adapters", "rank"),
    [
        (1, 16, 16, 1, 16),
        (5, 129, 70, 3, 5),  # tails everywhere
        (3, 40, 65, 7, 17),  # more adapters than rows, two blocks of rank in fp32
        (90, 530, 33, 1, 8),  # more rows of an adapter than a tile has
        (17, 300, 20, 20, 3),  # the same in a bank of more adapters than slots looked through
        (4, 4500, 16, 2, 4),  # more features than there are pieces for
        (2, 70, 130, 2, 70),  # a rank of several blocks
    ],
)
def test_obeys_the_error_rule(dtype, rows, features, outputs, adapters, rank):
    run(make(rows, features, outputs, adapters, rank, dtype))


@pytest.mark.parametrize("adjacent_outputs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, adjacent_outputs):
    out, x, A, B, *rest = make(6, 33, 21, 3, 4, dtype, adjacent_outputs, pad=3)
    wide = out.new_full((6, 24), float("nan"))
    wide[:, :21] = out
    run((wide[:, :21], x, A, B, *rest))
    assert wide[:, 21:].isnan().all()
    columns = x.T.contiguous().T, A.transpose(1, 2).contiguous().transpose(1, 2)
    run((out.T.contiguous().T, *columns, B, *rest))
    spread = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in rest]
    run((out.clone(), x, A, B, *spread))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("adapters", "rank"), [(3, 5), (40, 20)])
def test_many_rows_are_grouped(dtype, adapters, rank, monkeypatch):
    from personafast._triton import lora_delta

    monkeypatch.setattr(lora_delta, "MOST_ROWS", 30)
    run(make(150, 70, 140, adapters, rank, dtype, pad=3))


def test_the_features_are_cut_alike_for_every_batch():
    from personafast._triton.launch import INTERPRETED
    from personafast._triton.lora_delta import lora_delta_config

    cuts = set()
    for width, by_row, adapters in ((16, True, 40), (16, False, 3), (256, False, 64)):
        shrink = lora_delta_config(width, by_row, 4096, 14336, adapters, 16, 2, INTERPRETED, True).shrink.constants
        cuts.add((shrink["BLOCK_I"], shrink["STEPS"], shrink["ROWS"]))
    assert len(cuts) == 1


@pytest.mark.parametrize("rows", [4, 400])
def test_nothing_to_add(rows):
    out, x, A, B, slots, scale, ranks = make(rows, 8, 9, 2, 3, torch.float32)
    before = out.clone()
    ops.lora_delta_(out, x, A, B, torch.full_like(slots, -1), scale, ranks)
    ops.lora_delta_(out, x, A, B, slots, scale, torch.zeros_like(ranks))
    ops.lora_delta_(out, x, A[:0], B[:0], slots, scale[:0], ranks[:0])
    ops.lora_delta_(out, x, A[:, :0], B[..., :0], slots, scale, ranks)
    ops.lora_delta_(out, x[:, :0], A[..., :0], B, slots, scale, ranks)
    ops.lora_delta_(out[:0], x[:0], A, B, slots[:0], scale, ranks)
    assert torch.equal(out, before)


def test_a_rank_beyond_the_factors_is_theirs_and_one_below_none():
    out, x, A, B, _, scale, _ = make(2, 20, 30, 2, 6, torch.float32)
    A, B = A.nan_to_num(1.0), B.nan_to_num(1.0)
    A[:, 4:], B[:, :, 4:] = float("nan"), float("nan")
    A, B = A[:, :4], B[:, :, :4]
    slots, ranks = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([4000, -3], dtype=torch.int32)
    run((out, x, A, B, slots, scale, ranks))


def test_fp16_between_the_products_is_as_wide_as_fp32():
    x = torch.full((3, 64), 60000.0, dtype=torch.float16)
    A = torch.ones(1, 2, 64, dtype=torch.float16)
    A[0, 1] = 2.0**-24
    B = torch.tensor([2.0**-20, 0.5], dtype=torch.float16).expand(1, 5, 2)
    slots, scale, ranks = torch.zeros(3, dtype=torch.int32), torch.ones(1), torch.tensor([2], dtype=torch.int32)
    out = ops.lora_delta_(torch.zeros(3, 5, dtype=torch.float16), x, A, B, slots, scale, ranks)
    exact = 64 * 60000 * (2.0**-20 + 2.0**-25)
    assert (out.double() - exact).abs().max() <= 2.0**-11 * exact


def test_fp16_is_rounded_once():
    out, x, A, B, _, scale, ranks = make(20, 64, 40, 1, 1, torch.float16)
    args = (torch.zeros_like(out), x, A, B, torch.zeros(20, dtype=torch.int32), scale, ranks)
    exact = by_hand(*args)
    assert ((ops.lora_delta_(*args).double() - exact).abs() <= 1.01 * 2.0**-11 * exact.abs() + 1e-6).all()


@pytest.mark.parametrize("adapters", [2, 40])
def test_slots_of_no_adapter(adapters):
    out, x, A, B, _, scale, ranks = make(6, 20, 30, adapters, 4, torch.float32)
    # What lies about the bank would be seen.
    A, B = (torch.ones(adapters + 2, *tensor.shape[1:])[1:-1].copy_(tensor.nan_to_num(1.0)) for tensor in (A, B))
    scale, ranks = (
        torch.cat([scale, scale, scale])[adapters:-adapters],
        torch.cat([ranks + 4, ranks + 4, ranks + 4])[adapters:-adapters],
    )
    slots = torch.tensor([-1, adapters, 1, -7, -1, adapters], dtype=torch.int32)
    run((out, x, A, B, slots, scale, ranks))


def test_float64_is_refused_by_name():
    args = make(2, 5, 6, 1, 2, torch.float64)
    with pytest.raises(BackendError, match="lora_delta_: backend 'triton' cannot take dtype torch.float64"):
        ops.lora_delta_(*args)


@torch.no_grad()
def test_bound_factors_take_the_kernel():
    out, x, A, B, slots, scale, ranks = make(5, 40, 30, 3, 4, torch.float32)
    expected = run((out.clone(), x, A, B, slots, scale, ranks))
    found = _lora_delta.BoundDelta(A, B, scale, ranks).add_(out.view(5, 1, 30), x.view(5, 1, 40), slots)
    assert torch.equal(found.view(5, 30), expected)
