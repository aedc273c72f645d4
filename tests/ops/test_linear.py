import pytest
import torch
import torch.fx.experimental.proxy_tensor
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.ops import _linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel was called."""
    core = pytest.importorskip("personafast._C")
    seen = []

    class Counting:
        def __getattr__(self, name):
            return getattr(core, name)

        def linear(self, *args):
            seen.append(args)
            return core.linear(*args)

    monkeypatch.setitem(_linear._backend._modules, "cpu", Counting())
    return seen


def make(shape, outputs, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=g).to(dtype)
    weight = torch.randn(outputs, shape[-1], generator=g).to(dtype)
    return x, weight, torch.randn(outputs, generator=g).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.sampled_from([0, 1, 2, 6, 7, 13, 64]),
    features=st.sampled_from([1, 31, 32, 33, 100, 1024, 1030]),
    outputs=st.integers(1, 11),
    dtype=st.sampled_from(DTYPES),
    biased=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_error_rule(rows, features, outputs, dtype, biased, seed):
    pytest.importorskip("personafast._C")
    x, weight, bias = make((rows, features), outputs, dtype, seed)
    bias = bias if biased else None
    with torch.no_grad():
        y = ops.linear(x, weight, bias)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    plain = F.linear(x, weight, bias).double()
    assert y.dtype == dtype and y.shape == exact.shape and not y.isnan().any()
    if rows:
        terms = (x.double().abs() @ weight.double().abs().T).max().item()
        ulp = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
        error, allowed = (y.double() - exact).abs().max(), (plain - exact).abs().max()
        assert error <= 2 * allowed + ulp * max(1.0, exact.abs().max().item()) + 2.0**-24 * terms


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_masked_linear_without_masks(dtype):
    x, weight, bias = make((9, 200), 30, dtype)
    masks, slots = torch.empty(0, 30, 7, dtype=torch.int32), torch.full((9,), -1, dtype=torch.int32)
    pytest.importorskip("personafast._C")
    with ops.use_backend("cpu"):
        assert torch.equal(ops.linear(x, weight, bias), ops.masked_linear(x, weight, masks, slots, None, bias))


@torch.no_grad()
@pytest.mark.parametrize("shape", [(40,), (3, 40), (2, 3, 40), (0, 40)])
def test_leading_dimensions_are_kept(calls, shape):
    x, weight, bias = make(shape, 5, torch.float32)
    torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias))
    assert len(calls) == 1


def test_what_the_kernel_does_not_take_is_torchs(calls):
    x, weight, bias = make((4, 40), 5, torch.float32)
    wide = torch.randn(4, 80)[:, ::2]
    many = torch.randn(_linear.KERNEL_ROWS[torch.float32] + 1, 40)
    with torch.no_grad():
        for args in (
            (wide, weight, bias),
            (many, weight, bias),
            (x.double(), weight.double(), bias.double()),
            (x, weight.T.contiguous().T, bias),
        ):
            assert torch.equal(ops.linear(*args), F.linear(*args))
        with ops.use_backend("reference"):
            assert torch.equal(ops.linear(x, weight, bias), F.linear(x, weight, bias))
        assert ops.linear(x.to("meta"), weight.to("meta")).shape == (4, 5)
    weight.requires_grad_()
    ops.linear(x, weight, bias).sum().backward()
    assert weight.grad is not None
    assert calls == []
    with torch.no_grad():
        ops.linear(x, weight, bias)
    assert len(calls) == 1


@torch.no_grad()
def test_torchs_errors_are_torchs():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ops.linear(torch.zeros(2, 3), torch.zeros(4, 5))
    with pytest.raises(RuntimeError, match="dtype"):
        ops.linear(torch.zeros(2, 3), torch.zeros(4, 3, dtype=torch.bfloat16))


@torch.no_grad()
def test_under_compile_it_is_one_graph(calls):
    x, weight, bias = make((4, 40), 5, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ops.linear(x, weight, bias) + 1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.linear(x, weight, bias) + 1)
    assert calls == []


class Wrapped(torch.Tensor):
    """A tensor whose bytes are somewhere else, as a quantised weight's are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return function(*(a.inner if isinstance(a, Wrapped) else a for a in args), **(kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl


@torch.no_grad()
def test_weights_that_only_look_plain_are_torchs(calls):
    x, weight, bias = make((4, 40), 5, torch.float32)
    expected = F.linear(x, weight, bias)
    for args in ((x, Wrapped(weight), bias), (x, weight, Wrapped(bias)), (x, weight.to_sparse_csr(), bias)):
        torch.testing.assert_close(ops.linear(*args), expected)
    assert calls == []


@torch.no_grad()
def test_a_bias_of_another_shape_is_torchs(calls):
    x, weight, bias = make((4, 40), 5, torch.float32)
    assert torch.equal(ops.linear(x, weight, bias[:1]), F.linear(x, weight, bias[:1]))
    with pytest.raises(RuntimeError, match="size"):
        ops.linear(x, weight, bias[:3])
    assert calls == []


def test_who_has_to_see_an_operator_sees_one(calls):
    x, weight, bias = make((4, 40), 5, torch.float32)
    tangent, other = torch.randn_like(x), torch.randn_like(x)

    def ours(x):
        return ops.linear(x, weight, bias)

    _, changed = torch.func.jvp(ours, (x,), (tangent,))
    torch.testing.assert_close(changed, F.linear(tangent, weight))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(ours(dual)).tangent, F.linear(tangent, weight))
    torch.testing.assert_close(torch.func.vmap(ours)(torch.stack([x, other]))[1], F.linear(other, weight, bias))
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: ops.linear(x, weight, bias), (x,), check_trace=False)
        torch.testing.assert_close(traced(other), F.linear(other, weight, bias))
        graph = torch.fx.experimental.proxy_tensor.make_fx(ours)(x)
        torch.testing.assert_close(graph(other), F.linear(other, weight, bias))
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(x).dtype == F.linear(x, weight, bias).dtype == torch.bfloat16
    assert calls == []
