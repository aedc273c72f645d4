import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from personafast import ops
from personafast.ops import _rms_norm


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 31, 32, 100, 896])
def test_the_kernel_rounds_as_the_model_does(dtype, width, within_twice):
    pytest.importorskip("personafast._C")
    g = torch.Generator().manual_seed(0)
    x, norm = torch.randn(2, 3, width, generator=g).to(dtype), LlamaRMSNorm(width, eps=1e-5).to(dtype)
    norm.weight.copy_(torch.randn(width, generator=g))
    plain = norm(x)
    found = ops.rms_norm(x, norm.weight, 1e-5)
    exact = norm.weight.double() * x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert found.dtype == dtype and not found.isnan().any()
    within_twice(found, plain, exact)
    # The sum of squares has another order, which seldom reaches a rounding to 16 bit.
    assert dtype == torch.float32 or (found != plain).float().mean() < 0.02


def test_what_the_kernel_does_not_take_is_plain_torch():
    norm = LlamaRMSNorm(16)
    x = torch.randn(3, 32)[:, ::2]
    assert torch.equal(ops.rms_norm(x, norm.weight, norm.variance_epsilon), norm(x))
    x = torch.randn(3, 16, requires_grad=True)
    assert ops.rms_norm(x, norm.weight, norm.variance_epsilon).requires_grad
    with ops.use_backend("reference"), torch.no_grad():
        assert torch.equal(ops.rms_norm(x, norm.weight, norm.variance_epsilon), norm(x))


@torch.no_grad()
def test_what_is_not_adjacent_or_does_not_fit_never_reaches_the_kernel(monkeypatch):
    monkeypatch.setattr(_rms_norm, "run_kernel", lambda *_: pytest.fail("the kernel was called"))
    weight = torch.randn(16)
    apart = torch.randn(3, 32)[:, ::2]
    expected = weight * (apart * torch.rsqrt(apart.pow(2).mean(-1, keepdim=True) + 1e-5))
    assert torch.equal(ops.rms_norm(apart, weight, 1e-5), expected)
    assert ops.rms_norm(torch.randn(3, 16), weight[:1], 1e-5).shape == (3, 16)
    assert ops.rms_norm(torch.randn(3, 16), torch.randn(32)[::2], 1e-5).shape == (3, 16)
    with pytest.raises(RuntimeError, match="size"):
        ops.rms_norm(torch.randn(3, 16), weight[:8], 1e-5)
    assert ops.rms_norm(torch.randn(3, 16), weight.bfloat16(), 1e-5).shape == (3, 16)
