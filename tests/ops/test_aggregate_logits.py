import math

import pytest
import torch
from helpers.backends import BACKENDS, on
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import BackendError, PersonafastError

INF = math.inf
LINEAR, GEOMETRIC = int(ops.Aggregator.LINEAR), int(ops.Aggregator.GEOMETRIC)


def by_hand(ref, policies, weights, carried, aggregator, min_p):
    """Log probabilities in float64, row by row from the definition."""
    N, B, V = policies.shape
    pi0, pi = ref.double().softmax(-1), policies.double().softmax(-1)
    out = torch.full((B, V), -INF, dtype=torch.float64)
    for b in range(B):
        used = [n for n in range(N) if float(weights[b, n])]
        w = {n: float(weights[b, n]) for n in used}
        members, target = [pi[n, b] for n in used], torch.zeros(V, dtype=torch.float64)
        rest = 1 - float(weights[b].sum())
        if not used:
            members, target = [pi0[b]], pi0[b].clone()
        elif aggregator[b] == LINEAR:
            for n in used:
                target += w[n] * (math.exp(float(carried[b, n])) if carried is not None else 1.0) * pi[n, b]
        else:
            if rest > 1e-6:
                members = [*members, pi0[b]]
            factors = [(w[n], pi[n, b]) for n in used]
            if abs(rest) > 1e-6:
                factors.append((rest, pi0[b]))
            possible = torch.stack([q > 0 for _, q in factors]).all(0)
            logs = sum(f * torch.where(q > 0, q, 1.0).log() for f, q in factors)
            target = torch.where(possible, (logs - logs.max()).exp(), 0.0)
        keep = torch.zeros(V, dtype=torch.bool)
        for q in members:
            keep |= q >= float(min_p[b]) * q.max() * (1 - 1e-9)
        target = torch.where(keep, target, 0.0)
        if target.sum() == 0:
            target = torch.where(pi0[b] >= float(min_p[b]) * pi0[b].max() * (1 - 1e-9), pi0[b], 0.0)
        out[b] = (target / target.sum()).log()
    return out


def run(ref, policies, weights, aggregator, min_p=0.0, carried=None):
    B = ref.shape[0]
    codes = torch.full((B,), aggregator, dtype=torch.int32) if isinstance(aggregator, int) else aggregator
    floor = torch.full((B,), min_p) if isinstance(min_p, float) else min_p
    return ops.aggregate_logits(ref, policies, weights, carried, codes, torch.ones(B), floor)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=100)
@given(
    B=st.integers(0, 4),
    N=st.integers(0, 4),
    V=st.sampled_from([1, 2, 5, 15, 16, 33, 64, 65, 255, 257, 300, 4096, 4099, 8500]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    carry=st.booleans(),
    holes=st.sampled_from([0.0, 0.2, 0.95]),
    sparse=st.booleans(),
    signs=st.booleans(),
    offset=st.sampled_from([0.0, 1000.0]),
    seed=st.integers(0, 1000),
)
def test_against_float64(backend, B, N, V, dtype, carry, holes, sparse, signs, offset, seed):
    g = torch.Generator().manual_seed(seed)
    # Eighths, so that no logit lies where rounding decides about the support, and no dtype rounds them.
    ref, policies = ((2 * torch.randn(*shape, generator=g) * 8).round() / 8 for shape in ((B, V), (N, B, V)))
    if dtype == torch.float32:
        ref, policies = ref + offset, policies - offset
    ref, policies = ref.to(dtype), policies.to(dtype)
    weights = torch.rand(B, N, generator=g) * 1.5
    aggregator = torch.randint(0, 2, (B,), generator=g, dtype=torch.int32)
    if sparse:
        weights[torch.rand(B, N, generator=g) < 0.5] = 0
    if signs:
        weights[(aggregator == GEOMETRIC)[:, None] & (torch.rand(B, N, generator=g) < 0.3)] *= -1
    if V > 1:
        ref[:, 1:][torch.rand(B, V - 1, generator=g) < holes] = -INF
        policies[:, :, 1:][torch.rand(N, B, V - 1, generator=g) < holes] = -INF
    min_p = torch.tensor([0.0, 0.05, 0.3, 0.9, 1.0])[torch.randint(0, 5, (B,), generator=g)]
    carried = torch.randn(B, N, generator=g) if carry else None
    with on(backend):
        out = run(ref, policies, weights, aggregator, min_p, carried)
    expected = by_hand(ref, policies, weights, carried, aggregator, min_p)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aggregator", [LINEAR, GEOMETRIC])
@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0], [0.4, 0.3, 0.3], [1.5, 1.0, 0.7]])
def test_error_rule(dtype, aggregator, weights, within_twice):
    g = torch.Generator().manual_seed(1)
    ref = (4 * torch.randn(5, 9001, generator=g)).to(dtype)
    policies = (ref + torch.randn(3, 5, 9001, generator=g)).to(dtype)
    weight, carried = torch.tensor(weights).repeat(5, 1), torch.randn(5, 3, generator=g)
    with on("cpu"):
        out = run(ref, policies, weight, aggregator, carried=carried)
    with on("torch"):
        plain = run(ref, policies, weight, aggregator, carried=carried)
    logp0, logp = ref.double().log_softmax(-1), policies.double().log_softmax(-1)
    w = weight[0].double()
    if aggregator == LINEAR:
        exact = ((w.log() + carried.double()).T[:, :, None] + logp).logsumexp(0)
    else:
        exact = (1 - w.sum()) * logp0 + (w[:, None, None] * logp).sum(0)
    within_twice(out, plain, exact.log_softmax(-1))


@pytest.mark.parametrize("min_p", [0.0, 0.05])
@pytest.mark.parametrize("aggregator", [LINEAR, GEOMETRIC])
def test_kernel_rows_do_not_depend_on_their_batch_or_on_threads(aggregator, min_p):
    pytest.importorskip("personafast._C")
    g = torch.Generator().manual_seed(2)
    ref, policies = 4 * torch.randn(3, 200_003, generator=g), 4 * torch.randn(4, 3, 200_003, generator=g)
    weights, threads = torch.rand(3, 4, generator=g), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            with on("cpu"):
                results.append(run(ref, policies, weights, aggregator, min_p))
                results.append(torch.cat([run(ref[b : b + 1], policies[:, b : b + 1], weights[b : b + 1], aggregator,
                                              min_p) for b in range(3)]))  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("width", [1, 40, 300])
@pytest.mark.parametrize("dtype", [0, 1, 2])
@pytest.mark.parametrize("aggregator", [LINEAR, GEOMETRIC])
def test_kernel_writes_every_output_and_nothing_else(aggregator, dtype, width):
    core = pytest.importorskip("personafast._C")
    kind = (torch.float32, torch.bfloat16, torch.float16)[dtype]
    ref, policies = torch.randn(3, width).to(kind), torch.randn(2, 3, width).to(kind)
    weights, codes = torch.rand(3, 2), torch.full((3,), aggregator, dtype=torch.int32)
    min_p, out = torch.tensor([0.0, 0.5, 0.05]), torch.full((5, width), float("nan"))
    wrong = core.aggregate_logits(
        out[1:].data_ptr(), ref.data_ptr(), width, policies.data_ptr(), 3 * width, width, weights.data_ptr(), 0,
        codes.data_ptr(), min_p.data_ptr(), 3, 2, width, dtype, 2,
    )  # fmt: skip
    assert wrong == -1
    assert not out[1:4].isnan().any() and out[[0, 4]].isnan().all()
    assert (out[1:4].exp().sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("aggregator", [LINEAR, GEOMETRIC])
def test_kernel_serves_every_layout(aggregator):
    g = torch.Generator().manual_seed(3)
    ref, policies, weights = torch.randn(3, 70, generator=g), torch.randn(2, 3, 70, generator=g), torch.rand(3, 2)
    with on("cpu"):
        expected = run(ref, policies, weights, aggregator, 0.05)
        wide = torch.full((3, 4, 90), float("nan"))
        wide[:, 0, 5:75], wide[:, 1, 5:75], wide[:, 3, 5:75] = ref, policies[0], policies[1]
        rows = run(wide[:, 0, 5:75], wide[:, 1::2, 5:75].transpose(0, 1), weights, aggregator, 0.05)
        columns = run(
            ref.T.contiguous().T, policies.transpose(0, 2).contiguous().transpose(0, 2), weights.T.contiguous().T,
            aggregator, 0.05,
        )  # fmt: skip
        mixed = run(ref, policies.bfloat16(), weights, aggregator, 0.05)
        half = run(ref, policies.bfloat16().float(), weights.double(), aggregator, 0.05)
    assert torch.equal(rows, expected) and torch.equal(columns, expected) and torch.equal(mixed, half)


def test_float64_runs_in_torch_and_not_in_the_kernel():
    pytest.importorskip("personafast._C")
    args = torch.randn(2, 9).double(), torch.randn(1, 2, 9).double(), torch.ones(2, 1), GEOMETRIC
    torch.testing.assert_close(run(*args), args[1][0].float().log_softmax(-1))
    with on("cpu"), pytest.raises(BackendError, match="aggregate_logits: backend 'cpu' cannot take dtype"):
        run(*args)


# The kernel sums in another order than log_softmax: it obeys the error rule (`test_error_rule`).
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("aggregator", [LINEAR, GEOMETRIC])
def test_one_policy_at_weight_one_is_that_policy_bit_for_bit(backend, dtype, aggregator):
    ref, policies = torch.randn(6, 301).to(dtype), (8 * torch.randn(3, 6, 301)).to(dtype)
    policies[0, :, 5] = -INF  # of no weight: counts for nothing
    ref[:, 7] = -INF  # no coefficient left
    weights = torch.zeros(6, 3)
    weights[:4, 1] = 1.0
    with on(backend):
        out = run(ref, policies, weights, aggregator, carried=torch.randn(6, 3))
    assert torch.equal(out[:4], policies[1, :4].float().log_softmax(-1))
    assert torch.equal(out[4:], ref[4:].float().log_softmax(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_policy_equal_to_the_reference_changes_nothing(backend):
    ref = 3 * torch.randn(4, 50)
    with on(backend):
        out = run(ref, ref.expand(3, 4, 50), torch.full((4, 3), 1.3), GEOMETRIC)
    torch.testing.assert_close(out, ref.log_softmax(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_reference_is_a_member_only_where_the_blend_leaves_it_a_share(backend):
    ref = torch.tensor([[0.0, 8.0, -8.0]]).repeat(3, 1)
    policy = torch.tensor([[0.0, -8.0, 8.0]]).repeat(3, 1)[None]
    weights = torch.tensor([[0.5], [1.0], [1.5]])
    with on(backend):
        kept = run(ref, policy, weights, GEOMETRIC, 0.5).isfinite()
    assert kept.tolist() == [[False, True, True], [False, False, True], [False, False, True]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_target_without_any_token_is_the_reference(backend):
    ref = torch.tensor([[1.0, 0.0, -4.0]])
    policies = torch.tensor([[[0.0, -INF, -INF]], [[-INF, 0.0, -INF]]])
    with on(backend):
        out = run(ref, policies, torch.ones(1, 2), GEOMETRIC)
        masked = run(ref, policies, torch.ones(1, 2), GEOMETRIC, 0.1)
    torch.testing.assert_close(out, ref.log_softmax(-1))
    torch.testing.assert_close(masked[:, :2], ref[:, :2].log_softmax(-1))
    assert masked[0, 2] == -INF


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregator", [LINEAR, GEOMETRIC])
def test_nan_is_not_hidden(backend, aggregator):
    ref, policies = torch.zeros(2, 4), torch.zeros(1, 2, 4)
    policies[0, 1, 2] = float("nan")
    with on(backend):
        for weight in (0.5, 1.0):
            out = run(ref, policies, torch.full((2, 1), weight), aggregator, 0.1)
            assert out[0].isfinite().all() and out[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_values_are_named(backend):
    ref, policies = torch.zeros(2, 4), torch.zeros(1, 2, 4)
    with on(backend):
        with pytest.raises(PersonafastError, match="`weights` of row 0 hold -1"):
            run(ref, policies, torch.full((2, 1), -1.0), LINEAR)
        with pytest.raises(PersonafastError, match="unknown code 5"):
            run(ref, policies, torch.ones(2, 1), 5)
        with pytest.raises(PersonafastError, match="`min_p` of row 1 is 1.5, expected 0 to 1"):
            run(ref, policies, torch.ones(2, 1), LINEAR, torch.tensor([0.0, 1.5]))
        assert run(ref, policies, torch.full((2, 1), -1.0), GEOMETRIC).isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref": torch.zeros(2, 4, dtype=torch.int64)}, "`ref` has dtype int64"),
        ({"policies": torch.zeros(2, 4)}, r"`policies` has shape \[2, 4\], expected \[N, B, V\]"),
        ({"policies": torch.zeros(1, 2, 5)}, r"`policies` has shape \[1, 2, 5\]"),
        ({"weights": torch.ones(2)}, r"`weights` has shape \[2\]"),
        ({"carried": torch.ones(2, 2)}, r"`carried` has shape \[2, 2\]"),
        ({"aggregator": torch.zeros(1, dtype=torch.int32)}, r"`aggregator` has shape \[1\]"),
        ({"min_p": torch.zeros(1)}, r"`min_p` has shape \[1\]"),
        ({"policies": torch.zeros(1, 2, 4, requires_grad=True)}, "no gradient"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "ref": torch.zeros(2, 4),
        "policies": torch.zeros(1, 2, 4),
        "weights": torch.ones(2, 1),
        "carried": None,
        "aggregator": torch.zeros(2, dtype=torch.int32),
        "p": torch.ones(2),
        "min_p": torch.zeros(2),
    }
    with pytest.raises(PersonafastError, match=message):
        ops.aggregate_logits(**{**good, **change})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregator", [LINEAR, GEOMETRIC])
def test_a_member_of_weight_zero_gives_no_token_support(backend, aggregator):
    ref, policies = torch.zeros(2, 4), torch.zeros(2, 2, 4)
    ref[:, 1] = policies[0, :, 0] = policies[1, :, 2] = 9.0
    weights = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # only the second policy; only the reference
    with on(backend):
        kept = run(ref, policies, weights, aggregator, 0.5).isfinite()
    assert kept.tolist() == [[False, False, True, False], [False, True, False, False]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("off", [4e-7, -4e-7])
def test_weights_that_sum_to_one_up_to_rounding_leave_the_reference_no_share(backend, off):
    ref = torch.tensor([[9.0, 0.0, -INF, 0.0]])
    policies = torch.tensor([[[0.0, 0.0, 8.0, 9.0]], [[0.0, 0.0, 9.0, 8.0]]])
    weights = torch.tensor([[0.6, 0.4 - off]])
    assert 0 < abs(float(1 - weights.sum())) < 1e-6
    with on(backend):
        whole = run(ref, policies, weights, GEOMETRIC)
        masked = run(ref, policies, weights, GEOMETRIC, 0.1)
        shared = run(ref, policies, weights - 0.1, GEOMETRIC, 0.1)
    expected = (0.6 * policies[0].log_softmax(-1) + 0.4 * policies[1].log_softmax(-1)).log_softmax(-1)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    # The reference bars no token, and what it alone likes is in no support.
    assert masked.isfinite().tolist() == [[False, False, True, True]]
    assert shared.isfinite().tolist() == [[True, False, False, True]]
