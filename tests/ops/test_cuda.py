"""What of the CUDA C++ path runs without a GPU: the choice, the arguments in the order of the headers, and errors.

Stands in for the core: its launchers run the C++ kernel of the CPU, which takes the same arguments up to the last.
"""

from types import SimpleNamespace

import pytest
import torch

from personafast import ops
from personafast.errors import BackendError, KernelError
from personafast.ops import _backend, _cuda

core = pytest.importorskip("personafast._C")

STREAM = 0x5EED


def scores_accept(scores, accepted, *args):
    of_scores, of_accept, sizes = args[:6], args[6:9], args[9:]
    assert core.chunk_scores(scores, *of_scores, *sizes) == -1
    core.chunk_accept(accepted, scores, *of_accept, sizes[0], sizes[2])


def lora_delta(*args):
    *shared, inner = args
    assert core.lora_delta_(*shared, 1) == -1
    inners.append(inner)


# The memory that lora_delta_ gave its kernel beside its arguments.
inners = []

# The kernel of the CPU that each is, with the number of threads for its last argument if it has any.
LAUNCHERS = {
    "add_inject_rms_norm_cuda": (core.add_inject_rms_norm, 1),
    "chunk_accept_cuda": (core.chunk_accept,),
    "chunk_scores_accept_cuda": (scores_accept,),
    "chunk_scores_cuda": (core.chunk_scores,),
    "inject_cuda": (core.inject_, 1),
    "lora_delta_cuda": (lora_delta,),
    "masked_linear_cuda": (core.masked_linear, 1),
    "sparse_linear_cuda": (core.sparse_linear, 1),
    "steer_cuda": (core.steer_, 1),
}


@pytest.fixture
def calls(monkeypatch):
    """The launches made, with CPU tensors taken for a GPU's."""
    made = []

    def launcher(name):
        def run(*args):
            made.append((name, args[-1]))
            kernel, *threads = LAUNCHERS[name]
            kernel(*args[:-1], *threads)

        return run

    stand_in = SimpleNamespace(__name__="stand-in", **{name: launcher(name) for name in LAUNCHERS})
    monkeypatch.setattr(_backend, "_automatic", {})
    monkeypatch.setattr(_backend, "_modules", {"cuda": stand_in, "triton": "not there"})
    monkeypatch.setitem(_backend._PREFERRED, "cpu", _backend._PREFERRED["cuda"])
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: -1, raising=False)  # where CPU tensors say they are
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: STREAM + index, raising=False)
    return made


def rows(dtype, count, width, stride=None):
    return torch.randn(count, stride or width).to(dtype)[:, :width]


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def dtype(request):
    torch.manual_seed(0)
    return request.param


SLOTS = torch.tensor([0, 2, -1, 1, 9, 9, 9, 9], dtype=torch.int32)


@pytest.mark.parametrize("bank_dtype", [None, torch.float32])
@pytest.mark.parametrize("scaled", [True, False])
def test_inject(calls, dtype, bank_dtype, scaled):
    hidden, bank = rows(dtype, 4, 20, 32), rows(bank_dtype or dtype, 3, 20, 24)
    slots = SLOTS[:4] if scaled else torch.stack([SLOTS[:4], SLOTS[4:]], 1)[:, 0]
    scale = torch.randn(4, 2)[:, 0] if scaled else None
    expected = hidden.clone()
    ops._inject.reference(expected, bank, slots, scale)
    ops.inject_(hidden, bank, slots, scale)
    assert torch.equal(hidden, expected)
    assert calls == [("inject_cuda", STREAM - 1)]


def test_steer(calls, dtype):
    hidden, directions = rows(dtype, 4, 20, 32), rows(torch.float32, 3, 20, 24)
    mode = torch.tensor([[0, 9], [1, 9], [3, 9]], dtype=torch.int8)[:, 0]
    params = torch.tensor([[1.0, -0.5, 2.0], [9.0, 0.5, 9.0]]).t()
    expected = hidden.clone()
    ops._steer.reference(expected, directions, SLOTS[:4], mode, params, torch.ones(4))
    ops.steer_(hidden, directions, SLOTS[:4], mode, params, torch.ones(4))
    torch.testing.assert_close(hidden, expected)
    assert calls == [("steer_cuda", STREAM - 1)]


def test_add_inject_rms_norm(calls, dtype):
    update, residual = rows(dtype, 20, 4).t(), rows(dtype, 4, 20, 24)
    bank, weight = rows(torch.float32, 3, 20, 32), torch.randn(20).to(dtype)
    args = update, residual, bank, SLOTS[:4], torch.randn(4), weight, 1e-5
    for made, expected in zip(ops.add_inject_rms_norm(*args), ops._add_inject_rms_norm.reference(*args), strict=True):
        torch.testing.assert_close(made, expected)
    assert calls == [("add_inject_rms_norm_cuda", STREAM - 1)]


def chunk(B=7, N=3, k=5):
    """The arguments of `chunk_scores_accept`, a row of every rule and one without weights."""
    torch.manual_seed(1)
    ref, policies = -3 * torch.rand(B, k), -3 * torch.rand(N, B, k)
    weights = torch.rand(B, N) * (torch.arange(B) < 6)[:, None]
    of_scores = ref, policies, weights, torch.randn(B, N), torch.arange(B, dtype=torch.int32) % 6, torch.rand(B)
    return *of_scores, 2 * torch.rand(B, k), torch.rand(B, k).log(), torch.arange(B, dtype=torch.int32)


@pytest.mark.parametrize("carried", [True, False])
def test_chunk_scores_and_accept(calls, carried):
    args = list(chunk())
    args[3] = args[3] if carried else None
    expected = ops._chunk_scores.reference(*args[:6])
    accepted = ops._chunk_accept.reference(expected, *args[6:])
    assert 0 < accepted.sum()
    scores = ops.chunk_scores(*args[:6])
    torch.testing.assert_close(scores, expected)
    assert torch.equal(ops.chunk_accept(scores, *args[6:]), accepted)
    for made, one_by_one in zip(ops.chunk_scores_accept(*args), (scores, accepted), strict=True):
        assert torch.equal(made, one_by_one)
    assert [name for name, _ in calls] == ["chunk_scores_cuda", "chunk_accept_cuda", "chunk_scores_accept_cuda"]


@pytest.mark.parametrize(
    ("index", "change", "why"),
    [
        (0, lambda ref: ref.bfloat16(), "dtype torch.bfloat16"),
        (1, lambda policies: policies.transpose(0, 1).contiguous().transpose(0, 1), "not contiguous"),
        (2, lambda weights: weights.double(), "dtype torch.float64"),
        (6, lambda bound: bound[:1].expand(7, 5), "not contiguous"),
        (8, lambda lengths: torch.stack([lengths, lengths], 1)[:, 0], "not contiguous"),
    ],
)
def test_chunks_that_cuda_does_not_take(calls, monkeypatch, index, change, why):
    args = list(chunk())
    args[index] = change(args[index])
    expected = ops._chunk_scores_accept.reference(*args)
    for made, wanted in zip(ops.chunk_scores_accept(*args), expected, strict=True):
        torch.testing.assert_close(made, wanted)
    assert not any(name == "chunk_scores_accept_cuda" for name, _ in calls)
    monkeypatch.setattr(_backend, "_forced", "cuda")
    monkeypatch.setattr(_backend, "pick", lambda *args: "cuda")
    with pytest.raises(BackendError, match=f"backend 'cuda' cannot take .*{why}"):
        ops.chunk_scores_accept(*args)
    operator, part = (ops.chunk_scores, args[:6]) if index < 6 else (ops.chunk_accept, [args[0], *args[6:]])
    with pytest.raises(BackendError, match=f"backend 'cuda' cannot take .*{why}"):
        operator(*part)


def test_more_policies_than_fit_shared_memory(calls):
    args = chunk(B=1, N=257, k=1)
    ops.chunk_scores(*args[:6])
    assert calls == []


def masked(dtype, count=4, outputs=5, features=40):
    masks = ops.pack_mask(torch.rand(3 * outputs, 96) < 0.5).view(3, outputs, 3)[:, :, : -(-features // 32)]
    slots = torch.arange(-1, 3, dtype=torch.int32).repeat(count)[:count]
    return rows(dtype, features, count).t(), rows(dtype, outputs, features, features + 8), masks, slots


@pytest.mark.parametrize("soft", [True, False])
def test_masked_linear(calls, dtype, soft):
    args = *masked(dtype), torch.randn(3, 2)[:, 0] if soft else None, None if soft else torch.randn(10).to(dtype)[::2]
    made = ops.masked_linear(*args)
    torch.testing.assert_close(made, ops._masked_linear.reference(*args))
    assert calls == [("masked_linear_cuda", STREAM - 1)]


def test_masked_linear_of_many_rows_or_of_another_layout_goes_elsewhere_unless_cuda_was_asked_for(calls, monkeypatch):
    few, many = masked(torch.float32, 16), masked(torch.float32, 17)
    ops.masked_linear(*few)
    assert len(calls) == 1
    ops.masked_linear(*many)
    spread = few[0], few[1].repeat_interleave(2, 1)[:, ::2], *few[2:]
    torch.testing.assert_close(ops.masked_linear(*spread), ops.masked_linear(*few))
    odd = masked(torch.float32, 2, features=41)
    ops.masked_linear(*odd)
    assert len(calls) == 2
    monkeypatch.setattr(_backend, "_forced", "cuda")
    monkeypatch.setattr(_backend, "pick", lambda *args: "cuda")
    ops.masked_linear(*many)
    ops.masked_linear(*odd)
    assert len(calls) == 4
    with pytest.raises(BackendError, match="masked_linear: backend 'cuda' cannot take a weight whose rows"):
        ops.masked_linear(*spread)


@pytest.fixture
def adapters(calls, monkeypatch):
    """Arguments of lora_delta_ for a number of rows, where CPU tensors are a GPU's in the choice of a backend too."""
    monkeypatch.setattr(ops._lora_delta, "_size", lambda x, A, B: x.shape[0])
    monkeypatch.setattr(_cuda, "has_clusters", lambda index: True)
    inners.clear()

    def make(count, dtype=torch.float32, rank=6, features=40, outputs=24):
        torch.manual_seed(2)
        A, B = torch.randn(3, rank, features).to(dtype), torch.randn(3, rank, outputs).to(dtype).transpose(1, 2)
        out, x = rows(dtype, count, outputs, outputs + 3), rows(dtype, count, features, features + 8)
        slots = torch.arange(-1, 3, dtype=torch.int32).repeat(count)[:count]
        return out, x, A, B, slots, torch.randn(3), torch.tensor([rank, 2, 0], dtype=torch.int32)

    return make


@pytest.mark.parametrize("clusters", [True, False])
def test_lora_delta(calls, adapters, dtype, clusters, monkeypatch):
    monkeypatch.setattr(_cuda, "has_clusters", lambda index: clusters)
    args = adapters(7, dtype)
    expected = args[0].clone()
    ops._lora_delta.reference(expected, *args[1:])
    ops.lora_delta_(*args)
    torch.testing.assert_close(args[0], expected)
    assert calls == [("lora_delta_cuda", STREAM - 1)]
    assert [inner == 0 for inner in inners] == [clusters]


@torch.no_grad()
def test_bound_lora_delta_launches_at_once_what_the_kernel_is_for(calls, adapters, monkeypatch):
    def through_the_operator(count, **shape):
        out, x, *factors, slots, scale, ranks = adapters(count, **shape)
        delta = ops._lora_delta.BoundDelta(*factors, scale, ranks)
        # As of a GPU's factors, had they not been made on a CPU.
        delta._backend = "cuda"
        expected = out.contiguous()
        found = delta.add_(expected.clone(), x.contiguous(), slots)
        ops._lora_delta.reference(expected, x, *factors, slots, scale, ranks)
        torch.testing.assert_close(found, expected)
        return len(named)

    named, op = [], ops._lora_delta._op
    monkeypatch.setattr(ops._lora_delta, "_op", lambda *args: (named.append(args), op(*args))[1])
    assert through_the_operator(16, rank=64) == 0
    assert calls == [("lora_delta_cuda", STREAM - 1)]


@pytest.mark.parametrize(
    ("shape", "why"),
    [
        ({"rank": 65}, "a rank of 65"),
        ({"dtype": torch.float64}, "dtype torch.float64"),
        ({"features": 42}, None),
        ({"outputs": 27}, None),
        ({"count": 17}, None),
    ],
)
def test_lora_delta_that_the_cuda_kernel_is_not_for(calls, adapters, monkeypatch, shape, why):
    args = adapters(**{"count": 16, **shape})
    expected = args[0].clone()
    ops._lora_delta.reference(expected, *args[1:])
    out = args[0].clone()
    ops.lora_delta_(out, *args[1:])
    torch.testing.assert_close(out, expected)
    assert calls == []
    monkeypatch.setattr(_backend, "_forced", "cuda")
    monkeypatch.setattr(_backend, "pick", lambda *args: "cuda")
    if why:
        with pytest.raises(BackendError, match=f"lora_delta_: backend 'cuda' cannot take {why}"):
            ops.lora_delta_(*args)
        return
    ops.lora_delta_(*args)
    torch.testing.assert_close(args[0], expected)
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["out", "A"])
def test_lora_delta_takes_no_rows_that_are_not_adjacent(calls, adapters, monkeypatch, name):
    args = dict(zip(("out", "x", "A", "B", "slots", "scale", "ranks"), adapters(4), strict=True))
    args[name] = args[name].repeat_interleave(2, -1)[..., ::2]
    ops.lora_delta_(**args)
    assert calls == []
    monkeypatch.setattr(_backend, "_forced", "cuda")
    monkeypatch.setattr(_backend, "pick", lambda *args: "cuda")
    with pytest.raises(BackendError, match=f"'cuda' cannot take an `{name}` whose rows are not adjacent"):
        ops.lora_delta_(**args)


def compressed(dtype, count=4, outputs=5, features=41):
    weight, kept = rows(dtype, outputs, features), torch.rand(outputs, 64) < 0.5
    with ops.use_backend("reference"):
        packed = ops.compress(weight, ops.pack_mask(kept)[:, : -(-features // 32)])
    return rows(dtype, features, count).t(), *packed


@pytest.mark.parametrize("biased", [True, False])
def test_sparse_linear(calls, dtype, biased):
    args = *compressed(dtype), torch.randn(10).to(dtype)[::2] if biased else None
    torch.testing.assert_close(ops.sparse_linear(*args), ops._sparse_linear.reference(*args))
    assert calls == [("sparse_linear_cuda", STREAM - 1)]


def test_sparse_linear_of_many_rows_goes_elsewhere_unless_cuda_was_asked_for(calls, monkeypatch):
    few, many = compressed(torch.bfloat16, 16), compressed(torch.bfloat16, 17)
    ops.sparse_linear(*few)
    assert len(calls) == 1
    torch.testing.assert_close(ops.sparse_linear(*many), ops._sparse_linear.reference(*many), atol=0.1, rtol=0.05)
    assert len(calls) == 1
    monkeypatch.setattr(_backend, "_forced", "cuda")
    monkeypatch.setattr(_backend, "pick", lambda *args: "cuda")
    torch.testing.assert_close(ops.sparse_linear(*many), ops._sparse_linear.reference(*many))
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda x, *packed: (x.double(), packed[0].double(), *packed[1:]), "dtype torch.float64"),
        (lambda x, values, *rest: (x, values.repeat_interleave(2)[::2], *rest), "compressed weights"),
        (lambda x, values, bitmap, offsets: (x, values, bitmap.t().contiguous().t(), offsets), "compressed weights"),
    ],
)
def test_compressed_weights_that_cuda_does_not_take(calls, monkeypatch, change, why):
    args = change(*compressed(torch.float32))
    torch.testing.assert_close(ops.sparse_linear(*args), ops._sparse_linear.reference(*args))
    assert calls == []
    monkeypatch.setattr(_backend, "_forced", "cuda")
    monkeypatch.setattr(_backend, "pick", lambda *args: "cuda")
    with pytest.raises(BackendError, match=f"sparse_linear: backend 'cuda' cannot take {why}"):
        ops.sparse_linear(*args)


@pytest.mark.parametrize(
    "hidden", [torch.ones(2, 3, dtype=torch.float64), torch.ones(3, 2).t()], ids=["dtype", "layout"]
)
def test_what_a_kernel_cannot_take_falls_back_unless_cuda_was_asked_for(calls, monkeypatch, hidden):
    bank = torch.ones(1, 3, dtype=hidden.dtype)
    slots = torch.zeros(2, dtype=torch.int32)
    hidden = hidden.clone(memory_format=torch.preserve_format)
    ops.inject_(hidden, bank, slots)
    assert calls == [] and (hidden == 2).all()
    monkeypatch.setattr(_backend, "_forced", "cuda")
    monkeypatch.setattr(_backend, "pick", lambda *args: "cuda")
    with pytest.raises(BackendError, match="inject_: backend 'cuda' cannot take (dtype torch.float64|rows whose)"):
        ops.inject_(hidden, bank, slots)


def test_the_device_of_the_tensors_is_made_current(calls, monkeypatch):
    current = [0]

    class Device:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            current.append(self.index)

        def __exit__(self, *_):
            current.pop()

    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    monkeypatch.setitem(_backend._modules, "cuda", SimpleNamespace(f=lambda *args: calls.append((*args, current[-1]))))
    _cuda.launch("f", 1, 7)
    _cuda.launch("f", 0, 8)
    assert calls == [(7, STREAM + 1, 1), (8, STREAM, 0)]


@pytest.mark.skipif(not core.build_info()["cuda"], reason="built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="launches at address 0, which only a missing driver forgives")
def test_a_launch_that_fails_raises_a_kernel_error_and_leaves_no_trace():
    assert core.cuda_trouble()
    nothing = [0] * 8
    core.inject_cuda(*nothing, 0, 8, 1, 0)  # no rows: no launch
    for _ in range(2):
        with pytest.raises(KernelError, match=r"^inject_kernel: launch failed on cuda:-1: CUDA .*"):
            core.inject_cuda(*nothing, 1, 8, 1, 0)
