import importlib

import pytest
import torch
import torch.nn.functional as F
from helpers.inline_ptx import understood
from personafast._triton.launch import Device
from personafast._triton.masked_linear import (
    masked_linear_few_config,
    masked_linear_many_config,
    masked_linear_way,
)

from personafast import ops
from personafast.errors import BackendError

kernels = importlib.import_module("personafast._triton.masked_linear")


@pytest.fixture
def assembly(monkeypatch):
    """The kernels with inline assembly, which the interpreter is taught here; lists what they were launched with."""
    launched = []

    def launch(kernel, grid, config, *args):
        launched.append(config.constants)
        return real(kernel, grid, config, *args)

    real = kernels.launch
    monkeypatch.setattr(kernels, "launch", launch)
    monkeypatch.setattr(kernels, "interpreting", lambda: False)
    configs = kernels._few, kernels._many
    for config in (*configs, kernels.masked_linear_few_config, kernels.masked_linear_many_config):
        getattr(config, "cache_clear", lambda: None)()
    with understood():
        yield launched
    for config in configs:
        config.cache_clear()


def make(rows, features, outputs, personas, dtype, pad=0):
    g = torch.Generator().manual_seed(rows + features)
    x = torch.randn(rows, features + pad, generator=g).to(dtype)[:, :features]
    weight = torch.randn(outputs, features + pad, generator=g).to(dtype)[:, :features]
    kept = torch.rand(personas, outputs, features, generator=g) < 0.5
    with ops.use_backend("auto"):
        masks = ops.pack_mask(kept.flatten(0, 1)).view(personas, outputs, -1)
    slots = torch.randint(-1, personas, (rows,), generator=g, dtype=torch.int32)
    gamma = torch.rand(personas, generator=g)
    bias = torch.randn(outputs, generator=g).to(dtype)
    return x, weight, kept, masks, slots, gamma, bias


def by_hand(x, weight, kept, slots, gamma, bias, dtype=torch.float64):
    """Row by row in `dtype`: float64 is the truth, the dtype of x is plain torch."""
    out = []
    for t, slot in enumerate(slots.tolist()):
        w = weight.to(dtype)
        if 0 <= slot < kept.shape[0]:
            left = w.new_zeros(()) if gamma is None else w * gamma[slot].to(dtype)
            w = torch.where(kept[slot], w, left)
        out.append(F.linear(x[t : t + 1].to(dtype), w, None if bias is None else bias.to(dtype)))
    return torch.cat(out)


def check(x, weight, kept, slots, gamma, bias, actual):
    exact = by_hand(x, weight, kept, slots, gamma, bias)
    plain = by_hand(x, weight, kept, slots, gamma, bias, x.dtype)
    # A handful of values may all be lucky in plain torch: half an ulp of the terms added up, and one of the result.
    terms = (x.double().abs() @ weight.double().abs().T).max()
    ulp = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[x.dtype]
    allowed = 2 * (plain.double() - exact).abs().max() + 2.0**-24 * terms + ulp * exact.abs().max()
    assert actual.dtype == x.dtype and actual.shape == exact.shape
    assert (actual.double() - exact).abs().max() <= allowed


FEW = [(1, 256, 5, 1), (2, 40, 17, 3), (3, 513, 20, 2), (7, 300, 9, 4), (8, 256, 16, 8), (11, 33, 6, 3)]
MANY = [(17, 40, 9, 1), (40, 64, 130, 1), (70, 100, 20, 2), (33, 33, 66, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("shape", FEW + MANY, ids=str)
def test_obeys_the_error_rule(shape, dtype, soft):
    x, weight, kept, masks, slots, gamma, bias = make(*shape, dtype, pad=3)
    gamma, bias = (gamma, None) if soft else (None, bias)
    assert masked_linear_way(shape[0], shape[3]) == ("few" if shape in FEW else "many")
    actual = ops.masked_linear(x, weight, masks, slots, gamma, bias)
    check(x, weight, kept, slots, gamma, bias, actual)


def test_bf16_is_summed_in_fp32():
    x, weight, kept, masks, slots, _, bias = make(5, 300, 6, 2, torch.bfloat16)
    check(x, weight, kept, slots, None, bias, ops.masked_linear(x, weight, masks, slots, None, bias))


@pytest.mark.parametrize("rows", [6, 40])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_masked_out_weight_takes_no_part_whatever_it_is(rows, value):
    x, weight, kept, masks, slots, _, _ = make(rows, 70, 6, 1, torch.float32)
    slots.zero_()
    wild = torch.where(kept[0], weight, value)
    assert torch.equal(ops.masked_linear(x, wild, masks, slots), ops.masked_linear(x, weight, masks, slots))


@pytest.mark.parametrize("rows", [6, 40])
def test_slots_out_of_range_are_dense_and_bits_beyond_the_features_are_ignored(rows):
    x, weight, kept, masks, slots, _, _ = make(rows, 45, 6, 2, torch.float32)
    slots[0], slots[1], slots[-1] = 2, -5, 2**31 - 1
    masks[:, :, 1] |= ~((1 << 13) - 1)
    check(x, weight, kept, slots, None, None, ops.masked_linear(x, weight, masks, slots))


@pytest.mark.parametrize("rows", [0, 3, 20])
def test_no_rows_no_masks_no_outputs_and_no_features(rows):
    x, weight, _, masks, slots, gamma, bias = make(rows, 8, 4, 1, torch.float32)
    y = ops.masked_linear(x, weight, masks[:0], slots, gamma[:0], bias)
    torch.testing.assert_close(y, F.linear(x, weight, bias))
    assert ops.masked_linear(x, weight[:0], masks[:, :0], slots).shape == (rows, 0)
    y = ops.masked_linear(x[:, :0], weight[:, :0], masks[:, :, :0], slots, None, bias)
    assert torch.equal(y, bias.expand(rows, 4))


@pytest.mark.parametrize("rows", [4, 20])
def test_layouts(rows):
    x, weight, kept, masks, slots, gamma, bias = make(rows, 64, 6, 2, torch.float32)
    expected = ops.masked_linear(x, weight, masks, slots, gamma, bias)
    twice = [tensor.repeat_interleave(2, -1)[..., ::2] for tensor in (x, masks, slots, gamma, bias)]
    assert torch.equal(ops.masked_linear(twice[0], weight, *twice[1:]), expected)
    with pytest.raises(BackendError, match="adjacent"):
        ops.masked_linear(x, weight.T.contiguous().T, masks, slots)
    with pytest.raises(BackendError, match="float64"):
        ops.masked_linear(x.double(), weight.double(), masks, slots)


def test_a_row_does_not_depend_on_the_batch():
    x, weight, _, masks, slots, gamma, _ = make(11, 520, 7, 3, torch.float16)
    together = ops.masked_linear(x, weight, masks, slots, gamma)
    for t in (0, 4, 10):
        assert torch.equal(ops.masked_linear(x[t : t + 1], weight, masks, slots[t : t + 1], gamma)[0], together[t])


def test_configurations():
    large, small = Device(90, 132, 227 << 10), Device(120, 170, 99 << 10)
    few = masked_linear_few_config(8, 14336, 4096, torch.bfloat16, False, large).constants
    assert (few["ROWS"], few["BLOCK_O"], few["EVEN"], few["STAGES"]) == (8, 16, True, 4)
    assert masked_linear_few_config(1, 256, 4096, torch.bfloat16, False, small).constants["BLOCK_O"] == 4
    assert masked_linear_few_config(8, 14336, 4096, torch.bfloat16, True, small).constants["BLOCK_O"] == 8
    assert masked_linear_few_config(3, 9, 8, torch.float32, True, large) is masked_linear_few_config(
        4, 9, 16, torch.float32, False, large
    )
    assert masked_linear_many_config(2048, 4096, 4, torch.bfloat16, large).constants["BLOCK_T"] == 256
    assert masked_linear_many_config(2048, 4096, 4, torch.bfloat16, small).constants["BLOCK_T"] == 128
    assert masked_linear_many_config(20, 4096, 4, torch.bfloat16, small).constants["BLOCK_T"] == 32
    assert [masked_linear_way(rows, 64) for rows in (16, 64, 128, 129)] == ["few", "few", "few", "many"]
    assert [masked_linear_way(rows, 1) for rows in (8, 11, 12)] == ["few", "few", "many"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("rows", [3, 40])
def test_assembly_decides_by_every_byte_of_a_mask(assembly, rows, soft, dtype):
    """256 bytes, each with its own bits; what is masked out is infinite or no number, and dense rows are among them."""
    if rows > 8 and dtype == torch.bfloat16:
        pytest.skip("the interpreter multiplies the bits of bf16 instead of its numbers")
    g = torch.Generator().manual_seed(rows)
    features, outputs = 2048, 3
    x = torch.randn(rows, features, generator=g).to(dtype)
    weight = torch.randn(outputs, features, generator=g).to(dtype)
    masks = torch.stack([torch.randperm(256, generator=g) for _ in range(2 * outputs)]).to(torch.uint8)
    masks = masks.view(torch.int32).view(2, outputs, -1)
    with ops.use_backend("reference"):
        kept = ops.unpack_mask(masks.flatten(0, 1), features).view(2, outputs, features)
    slots = torch.arange(rows, dtype=torch.int32) % (3 if soft else 2) - (1 if soft else 0)
    gamma = torch.tensor([0.25, -2.0]) if soft else None
    if not soft:
        bad = ~kept.any(0)
        assert bad.any()
        weight[bad] = torch.tensor([float("inf"), float("nan"), -float("inf")]).to(dtype)[torch.arange(bad.sum()) % 3]
    actual = ops.masked_linear(x, weight, masks, slots, gamma, None)
    weight = torch.where(weight.isfinite(), weight, 0.0)
    assert assembly and assembly[-1]["ASM"] and actual.isfinite().all()
    check(x, weight, kept, slots, gamma, None, actual)
