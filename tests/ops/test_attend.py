import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.ops import _attend

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel was called."""
    core = pytest.importorskip("personafast._C")
    seen = []

    class Counting:
        def __getattr__(self, name):
            return getattr(core, name)

        def attend(self, *args):
            seen.append(args)
            return core.attend(*args)

    monkeypatch.setitem(_attend._backend._modules, "cpu", Counting())
    return seen


def make(batch=2, key_heads=2, groups=3, queries=1, columns=40, width=16, dtype=torch.float32, seed=0):
    """Keys and values are parts of longer buffers, whose other columns are NaN."""
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, queries, key_heads * groups, width, generator=g).to(dtype).transpose(1, 2)
    pair = []
    for _ in range(2):
        buffer = torch.full((batch, key_heads, columns + 3, width), torch.nan, dtype=dtype)
        buffer[:, :, :columns] = torch.randn(batch, key_heads, columns, width, generator=g)
        pair.append(buffer[:, :, :columns])
    return query, *pair


def make_mask(kind, batch, queries, columns, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    if kind is None:
        return None
    seen = torch.rand(batch, 1, queries, columns + 5, generator=g) < 0.7
    seen[0, 0, 0] = kind == "additive"  # a query that sees nothing
    if kind == "bool":
        return seen[..., :columns]
    return torch.where(seen, torch.randn(seen.shape, generator=g), -torch.inf).to(dtype)[..., :columns]


def exact(query, key, value, mask, scale=None):
    mask = mask if mask is None or mask.dtype == torch.bool else mask.double()
    doubles = (query.double(), key.double(), value.double())
    return F.scaled_dot_product_attention(*doubles, mask, scale=scale, enable_gqa=True)


@torch.no_grad()
@settings(deadline=None, max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 5),
    queries=st.sampled_from([1, 1, 2, 9, 16]),
    columns=st.sampled_from([1, 2, 15, 16, 17, 40, 127, 128, 129, 300]),
    width=st.sampled_from([1, 7, 8, 31, 32, 33, 64, 65, 80, 128, 256]),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from([None, "bool", "additive"]),
    one_mask=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 1000),
)
def test_error_rule(
    within_twice, batch, key_heads, groups, queries, columns, width, dtype, kind, one_mask, scale, seed
):
    pytest.importorskip("personafast._C")
    q, k, v = make(batch, key_heads, groups, queries, columns, width, dtype, seed)
    mask = make_mask(kind, 1 if one_mask else batch, queries, columns, dtype, seed)
    found = ops.attend(q, k, v, mask, scale)
    assert found.dtype == dtype and found.transpose(1, 2).is_contiguous()
    plain = F.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=True)
    expected = exact(q, k, v, mask, scale)
    small = 1e-6 + torch.finfo(dtype).eps / 2 * expected.abs().max().item()  # the last rounding
    within_twice(found, plain, expected, small)
    if kind == "bool":
        assert not found[0, :, 0].any()


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_depends_neither_on_the_others_nor_on_threads(calls, dtype):
    q, k, v = make(batch=17, key_heads=4, queries=5, columns=200, width=64, dtype=dtype)
    mask = make_mask("bool", 17, 5, 200, dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [ops.attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], mask[b : b + 1]) for b in range(17)]
        torch.set_num_threads(4)
        together = ops.attend(q, k, v, mask)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(torch.cat(alone), together)
    # Nor does a query on those after it.
    first = ops.attend(q[:, :, :1], k, v, mask[:, :, :1])
    assert torch.equal(first, together[:, :, :1])
    assert len(calls) == 19


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores(calls, dtype):
    q, k, v = make(columns=300, dtype=dtype)
    q = q * 200
    found, expected = ops.attend(q, k, v), exact(q, k, v, None)
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)
    assert len(calls) == 1


@torch.no_grad()
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(calls, bad):
    q, k, v = make(columns=200)
    k[0, 0, 150] = bad
    found = ops.attend(q, k, v)
    assert found[0, :3].isnan().all() and not found[0, 3:].isnan().any() and not found[1:].isnan().any()
    seen = torch.ones(1, 1, 1, 200, dtype=torch.bool)
    seen[..., 150] = False
    assert not ops.attend(q, k, v, seen).isnan().any()
    assert len(calls) == 2


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q[..., ::2], k[..., ::2], v[..., ::2]),
        lambda q, k, v: (q.double(), k.double(), v.double()),
        lambda q, k, v: (q, k, v[..., :8]),
        lambda q, k, v: (q.expand(-1, -1, 17, -1), k, v),
        lambda q, k, v: (q, k, v, torch.ones(2, 6, 1, 40, dtype=torch.bool)),
        lambda q, k, v: (q, k, v, torch.zeros(1, 1, 1, 80)[..., ::2]),
        lambda q, k, v: (torch.cat([q] * 17, -1), torch.cat([k] * 17, -1), torch.cat([v] * 17, -1)),
    ],
    ids=["strided", "double", "another width", "many queries", "mask by head", "strided mask", "wide"],
)
def test_what_the_kernel_does_not_take_is_torchs(calls, change):
    args = change(*make())
    torch.testing.assert_close(ops.attend(*args), F.scaled_dot_product_attention(*args, enable_gqa=True))
    assert calls == []


def test_gradients_and_the_reference_are_torchs(calls):
    q, k, v = make()
    with ops.use_backend("reference"), torch.no_grad():
        assert torch.equal(ops.attend(q, k, v), F.scaled_dot_product_attention(q, k, v, enable_gqa=True))
    q.requires_grad_()
    ops.attend(q, k, v).sum().backward()
    assert q.grad is not None and calls == []


@torch.no_grad()
def test_torchs_errors_are_torchs(calls):
    q, k, v = make()
    with pytest.raises(RuntimeError):
        ops.attend(q, k.bfloat16(), v)
    with pytest.raises(RuntimeError):
        ops.attend(q, k, v, torch.ones(1, 1, 1, 7, dtype=torch.bool))
    assert calls == []


@torch.no_grad()
def test_who_has_to_see_an_operator_sees_one(calls):
    q, k, v = make()
    expected = ops.attend(q, k, v)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: ops.attend(q, k, v), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q), expected)
    over = torch.func.vmap(lambda q: ops.attend(q, k, v))(torch.stack([q, q]))
    torch.testing.assert_close(over[1], expected)
    assert len(calls) == 1
