import importlib

import pytest
import torch
import torch.nn.functional as F
from helpers.inline_ptx import understood

from personafast import ops
from personafast.errors import BackendError
from personafast.ops import _sparse_linear

kernels = importlib.import_module("personafast._triton.sparse_linear")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(rows, outputs, features, dtype, density=0.5, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=g).to(dtype)
    weight = torch.randn(outputs, features, generator=g).to(dtype)
    kept = torch.rand(outputs, features, generator=g) < density
    bias = torch.randn(outputs, generator=g).to(dtype)
    return x, weight, kept, bias


def compressed_of(weight, kept):
    with ops.use_backend("reference"):
        return ops.compress(weight, ops.pack_mask(kept))


def check(y, x, weight, kept, bias):
    def linear(dtype):
        return F.linear(x.to(dtype), weight.to(dtype) * kept, None if bias is None else bias.to(dtype))

    exact, plain = linear(torch.float64), linear(x.dtype)
    assert y.dtype == x.dtype and y.shape == exact.shape and not y.isnan().any()
    if y.numel():
        # The interpreter truncates to bf16 where hardware rounds: up to an ulp more.
        ulp = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}[x.dtype]
        error, allowed = (y.double() - exact).abs().max(), (plain.double() - exact).abs().max()
        assert error <= 2 * allowed + ulp * max(1.0, exact.abs().max().item())


@pytest.fixture
def tensor_cores(monkeypatch):
    """The kernel with inline assembly, which the interpreter is taught here, and what it was launched with."""
    launched = []

    def launch(kernel, grid, config, *args):
        launched.append((kernel, config.constants))
        return real(kernel, grid, config, *args)

    real = kernels.launch
    monkeypatch.setattr(kernels, "launch", launch)
    monkeypatch.setattr(kernels, "interpreting", lambda: False)
    with understood():
        yield launched


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "outputs", "features", "density", "biased"),
    [
        (1, 5, 45, 0.5, True),
        (3, 4, 300, 0.3, False),
        (9, 2, 31, 1.0, True),
        (2, 3, 64, 0.0, True),
        (0, 3, 8, 0.5, False),
    ],
)
def test_any_kernel(rows, outputs, features, density, biased, dtype):
    x, weight, kept, bias = make(rows, outputs, features, dtype, density)
    bias = bias if biased else None
    check(ops.sparse_linear(x, *compressed_of(weight, kept), bias), x, weight, kept, bias)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(
    ("rows", "outputs", "features", "density", "biased"),
    [
        (1, 5, 256, 0.5, True),  # one warp
        (3, 4, 520, 0.3, False),  # two warps, of which the second has less
        (2, 2, 2048, 0.7, True),  # eight warps, tiles of 256 features exactly
        (9, 3, 264, 1.0, True),
        (1, 9, 1032, 0.9, False),
    ],
)
def test_kernel_on_tensor_cores(tensor_cores, rows, outputs, features, density, biased, dtype):
    x, weight, kept, bias = make(rows, outputs, features, dtype, density)
    bias = bias if biased else None
    check(ops.sparse_linear(x, *compressed_of(weight, kept), bias), x, weight, kept, bias)
    assert [kernel for kernel, _ in tensor_cores] == [kernels.sparse_linear_kernel]


def test_many_outputs_take_one_warp_each_and_few_eight():
    device = kernels.device_of(torch.empty(0))
    assert kernels.sparse_linear_config(1, 14336, 4096, device).constants["WARPS"] == 1
    assert kernels.sparse_linear_config(1, 896, 4864, device).constants["WARPS"] == 8
    assert kernels.sparse_linear_config(1, 4, 256, device).constants["WARPS"] == 1


@pytest.mark.parametrize("warps", [1, 2])
def test_one_warp_walks_over_several_tiles(tensor_cores, monkeypatch, warps):
    config = kernels.Config({"PAIRS": 2, "ROWS": 2, "WARPS": warps, "EVEN": False}, num_warps=warps)
    monkeypatch.setattr(kernels, "sparse_linear_config", lambda *args: config)
    x, weight, kept, bias = make(2, 6, 1304, torch.float16)
    kept[1], kept[3] = False, True
    check(ops.sparse_linear(x, *compressed_of(weight, kept), bias), x, weight, kept, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("features", "outputs"), [(45, 5), (512, 3)])
def test_many_rows_meet_the_dense_weight_put_together(dtype, features, outputs):
    x, weight, kept, bias = make(kernels.EXPANDED_ABOVE + 1, outputs, features, dtype)
    check(ops.sparse_linear(x, *compressed_of(weight, kept), bias), x, weight, kept, bias)


def test_layouts():
    x, weight, kept, bias = make(3, 4, 72, torch.float16)
    compressed = compressed_of(weight, kept)
    apart = [torch.stack([part, part], -1)[..., 0] for part in compressed]
    spread = torch.stack([x, x], -1)[..., 0]
    check(ops.sparse_linear(spread, *apart, torch.stack([bias, bias], 1)[:, 0]), x, weight, kept, bias)


def test_the_kernel_for_tensor_cores_is_passed_over_where_it_cannot_run(tensor_cores, monkeypatch):
    cases = [
        make(1, 2, 512, torch.float32),
        make(1, 2, 515, torch.float16),  # rows of x are not at multiples of 16 bytes
        make(1, 2, 64, torch.float16),  # fewer values than a tile
    ]
    for x, weight, kept, _ in cases:
        check(ops.sparse_linear(x, *compressed_of(weight, kept)), x, weight, kept, None)
    x, weight, kept, _ = make(2, 2, 512, torch.float16)
    shifted = torch.empty(2, 513, dtype=x.dtype)[:, 1:].copy_(x)
    check(ops.sparse_linear(shifted, *compressed_of(weight, kept)), x, weight, kept, None)
    assert [kernel for kernel, _ in tensor_cores] == [kernels.sparse_linear_any_kernel] * 4


class Values:
    """Stands for values whose memory crosses a multiple of 4 GiB."""

    def __init__(self, address, count):
        self.address, self.count = address, count

    def data_ptr(self):
        return self.address

    def numel(self):
        return self.count


def test_values_across_a_multiple_of_4_gib_are_left_to_the_other_kernel(monkeypatch):
    monkeypatch.setattr(kernels, "interpreting", lambda: False)
    x = torch.empty(1, 512, dtype=torch.float16)
    assert kernels._fits(x, Values((1 << 32) - 4096, 2047))
    assert not kernels._fits(x, Values((1 << 32) - 4096, 2049))


@pytest.mark.parametrize("features", [520, 515])
def test_a_bitmap_or_offsets_of_other_weights_read_nothing_outside(tensor_cores, monkeypatch, features):
    x, weight, kept, _ = make(2, 5, features, torch.float16)
    values, bitmap, offsets = compressed_of(weight, kept)
    # What is outside is infinite, so that it would show.
    around = torch.full((values.numel() + 4096,), float("inf"), dtype=values.dtype)
    inner = around[2048:-2048].copy_(values)
    monkeypatch.setattr(_sparse_linear, "_check_offsets", lambda *args: None)  # as on a GPU
    full = torch.full_like(bitmap, -1)
    for wrong in (offsets, offsets - 700, offsets + 700, torch.full_like(offsets, 2**40), -offsets):
        assert ops.sparse_linear(x, inner, full, wrong).isfinite().all()
        assert kernels._expanded(inner, full, wrong, features).isfinite().all()
    monkeypatch.setattr(kernels, "interpreting", lambda: True)
    assert ops.sparse_linear(x, inner, full, offsets + 700).isfinite().all()


def test_no_values_and_no_outputs():
    x, weight, _, bias = make(2, 3, 40, torch.float16)
    compressed = ops.compress(weight, torch.zeros(3, 2, dtype=torch.int32))
    assert torch.equal(ops.sparse_linear(x, *compressed, bias), bias.expand(2, 3))
    none = ops.compress(weight[:0], torch.zeros(0, 2, dtype=torch.int32))
    assert ops.sparse_linear(x, *none).shape == (2, 0)


def test_double_precision_is_refused_by_name():
    x, weight, kept, _ = make(1, 2, 40, torch.float64)
    compressed = compressed_of(weight, kept)
    with pytest.raises(BackendError, match="sparse_linear: backend 'triton' cannot take dtype torch.float64"):
        ops.sparse_linear(x, *compressed)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("features", [1, 32, 45, 1100])
def test_compress_keeps_what_the_mask_keeps(dtype, features):
    _, weight, kept, _ = make(1, 3, 2 * features, dtype)
    weight, kept = weight[:, ::2], kept[:, ::2]
    with ops.use_backend("reference"):
        packed = ops.pack_mask(kept)
    dirty = torch.stack([packed, packed], -1)[..., 0]
    if features % 32:
        dirty[:, -1] |= -1 << features % 32
    for mine, right in zip(ops.compress(weight, dirty), compressed_of(weight, kept), strict=True):
        assert mine.dtype == right.dtype and torch.equal(mine, right)


@pytest.mark.parametrize("features", [45, 264])
def test_bits_beyond_the_last_feature_are_ignored(tensor_cores, features):
    x, weight, kept, bias = make(1, 3, features, torch.float16)
    weight[1, kept[1]] = float("inf")  # what a bit too many in the row before would find
    values, bitmap, offsets = compressed_of(weight, kept)
    bitmap[:, -1] |= -1 << features % 32
    y = ops.sparse_linear(x, values, bitmap, offsets, bias)[:, [0, 2]]
    check(y, x, weight[[0, 2]], kept[[0, 2]], bias[[0, 2]])
