import pytest
import torch
import torch.nn.functional as F

from personafast import ops
from personafast.ops import _silu_mul


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel was called."""
    core = pytest.importorskip("personafast._C")
    seen = []

    class Counting:
        def __getattr__(self, name):
            return getattr(core, name)

        def silu_mul(self, *args):
            seen.append(args)
            return core.silu_mul(*args)

    monkeypatch.setitem(_silu_mul._backend._modules, "cpu", Counting())
    return seen


def make(shape, dtype, spread=3.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple((spread * torch.randn(shape, generator=g)).to(dtype) for _ in range(2))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 3), (), (1,), (3, 31), (2, 3, 32), (33,), (2, 100), (1000, 200)])
@pytest.mark.parametrize("spread", [1.0, 40.0])
def test_the_kernel_rounds_as_torch_does(calls, dtype, shape, spread, within_twice):
    gate, up = make(shape, dtype, spread)
    found, plain = ops.silu_mul(gate, up), F.silu(gate) * up
    assert found.dtype == dtype and len(calls) == 1
    exact = F.silu(gate.double()) * up.double()
    within_twice(found, plain, exact, small=1e-6 * spread**2)
    # The exponential may differ in its last bit, which seldom reaches a rounding to 16 bit.
    assert dtype == torch.float32 or found.numel() < 1000 or (found != plain).float().mean() < 0.02


@torch.no_grad()
def test_what_is_not_finite(calls):
    gate = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0, 0.0, -0.0, -1e4])
    up = torch.tensor([2.0, 2.0, 2.0, torch.nan, torch.inf, 1.0, 1.0])
    torch.testing.assert_close(ops.silu_mul(gate, up), F.silu(gate) * up, equal_nan=True)
    assert len(calls) == 1


def test_what_the_kernel_does_not_take_is_torchs(calls):
    gate, up = make((4, 32), torch.float32)
    with torch.no_grad():
        for args in (
            (gate[:, ::2], up[:, ::2]),
            (gate, up[:1]),
            (gate.double(), up.double()),
            (gate, up.bfloat16()),
        ):
            assert torch.equal(ops.silu_mul(*args), F.silu(args[0]) * args[1])
        with ops.use_backend("reference"):
            assert torch.equal(ops.silu_mul(gate, up), F.silu(gate) * up)
        with pytest.raises(RuntimeError, match="size"):
            ops.silu_mul(gate, up[:3])
        torch._dynamo.reset()
        compiled = torch.compile(ops.silu_mul, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(gate, up), F.silu(gate) * up)
        both = torch.func.vmap(ops.silu_mul)(gate, up)
        torch.testing.assert_close(both, F.silu(gate) * up)
    ops.silu_mul(gate.requires_grad_(), up).sum().backward()
    assert gate.grad is not None and calls == []
