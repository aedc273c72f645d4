import math

import pytest
import torch
from helpers.backends import BACKENDS, on
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import PersonafastError

INF = math.inf


def by_hand(ref, policy, weights, carried, aggregator):
    """In float64 and plain Python numbers; log(0) and impossible tokens by cases."""
    N, B, k = policy.shape
    out = torch.empty(B, k, dtype=torch.float64)
    for b in range(B):
        for j in range(k):
            if any(float(ref[b, i]) == -INF for i in range(j + 1)):
                out[b, j] = -INF
                continue
            terms = []
            for n in range(N):
                w = float(weights[b, n])
                if w:
                    total = float(carried[b, n]) if carried is not None else 0.0
                    total += sum(float(policy[n, b, i]) - float(ref[b, i]) for i in range(j + 1))
                    terms.append((w, total))
            if not terms:
                out[b, j] = 0.0
            elif aggregator[b] == 0:
                top = max(total for _, total in terms)
                out[b, j] = -INF if top == -INF else top + math.log(sum(w * math.exp(t - top) for w, t in terms))
            else:
                out[b, j] = -INF if any(t == -INF for _, t in terms) else sum(w * t for w, t in terms)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=80)
@given(
    B=st.integers(0, 4),
    N=st.integers(0, 4),
    k=st.integers(0, 5),
    carry=st.booleans(),
    holes=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_against_float64(backend, B, N, k, carry, holes, dtype, seed):
    g = torch.Generator().manual_seed(seed)
    ref, policy = -3 * torch.rand(B, k, generator=g), -3 * torch.rand(N, B, k, generator=g)
    weights = torch.rand(B, N, generator=g)
    aggregator = torch.randint(0, 2, (B,), generator=g, dtype=torch.int32)
    if holes:
        ref[torch.rand(B, k, generator=g) < 0.15] = -INF
        policy[torch.rand(N, B, k, generator=g) < 0.15] = -INF
        weights[torch.rand(B, N, generator=g) < 0.4] = 0
    weights[aggregator == 1] *= torch.where(torch.rand(int((aggregator == 1).sum()), N, generator=g) < 0.3, -1.0, 1.0)
    carried = torch.randn(B, N, generator=g) if carry else None
    ref, policy, weights = ref.to(dtype), policy.to(dtype), weights.to(dtype)
    with on(backend):
        scores = ops.chunk_scores(ref, policy, weights, carried, aggregator, torch.ones(B))
    assert scores.dtype == torch.float32 and scores.shape == (B, k)
    expected = by_hand(ref, policy, weights, carried, aggregator)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_overflow_far_from_one(backend):
    ref, policy = torch.full((1, 3), -1.0), torch.full((2, 1, 3), -400.0)
    rule = torch.tensor([0], dtype=torch.int32)
    with on(backend):
        scores = ops.chunk_scores(ref, policy, torch.ones(1, 2), None, rule, torch.ones(1))
    expected = [math.log(2) - 399.0 * j for j in (1, 2, 3)]
    torch.testing.assert_close(scores[0], torch.tensor(expected))


@pytest.mark.parametrize("aggregator", [0, 1])
def test_error_rule(aggregator, within_twice):
    g = torch.Generator().manual_seed(1)
    ref, policy = -3 * torch.rand(500, 8, generator=g), -3 * torch.rand(4, 500, 8, generator=g)
    weights, carried = torch.rand(500, 4, generator=g), 5 * torch.randn(500, 4, generator=g)
    args = ref, policy, weights, carried, torch.full((500,), aggregator, dtype=torch.int32), torch.ones(500)
    with on("cpu"):
        out = ops.chunk_scores(*args)
    with on("torch"):
        plain = ops.chunk_scores(*args)
    ratio = (policy.double() - ref.double()).cumsum(2) + carried.double().T[:, :, None]
    weight = weights.double().T[:, :, None]
    exact = (weight * ratio).sum(0) if aggregator else (weight.log() + ratio).logsumexp(0)
    within_twice(out, plain, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregator", [0, 1])
def test_nan_goes_through_and_nowhere_else(backend, aggregator):
    ref, policy, weights = torch.full((4, 3), -1.0), torch.full((2, 4, 3), -2.0), torch.ones(4, 2)
    nan = float("nan")
    policy[1, 0, 1], ref[1, 1], weights[3, 1], policy[1, 3] = nan, nan, 0, nan
    with on(backend):
        scores = ops.chunk_scores(
            ref, policy, weights, None, torch.full((4,), aggregator, dtype=torch.int32), weights[:, 0]
        )
    expected = [[False, True, True], [False, True, True], [False] * 3, [False] * 3]
    assert scores.isnan().tolist() == expected


def test_kernel_writes_every_output_and_nothing_else():
    core = pytest.importorskip("personafast._C")
    ref, policy, weights = -torch.rand(3, 4), -torch.rand(2, 3, 4), torch.rand(3, 2)
    out, codes = torch.full((5, 4), float("nan")), torch.tensor([0, 1, 0], dtype=torch.int32)
    args = ref.data_ptr(), policy.data_ptr(), weights.data_ptr(), 0, codes.data_ptr(), 3, 2, 4
    assert core.chunk_scores(out[1:].data_ptr(), *args) == -1
    assert not out[1:4].isnan().any() and out[[0, 4]].isnan().all()


def test_kernel_serves_every_layout():
    g = torch.Generator().manual_seed(2)
    ref, policy = -torch.rand(3, 4, generator=g), -torch.rand(2, 3, 4, generator=g)
    weights, codes = torch.rand(3, 2, generator=g), torch.tensor([0, 1, 0], dtype=torch.int32)
    with on("cpu"):
        expected = ops.chunk_scores(ref, policy, weights, weights, codes, torch.ones(3))
        turned = weights.T.contiguous().T
        found = ops.chunk_scores(
            ref.T.contiguous().T,
            policy.transpose(0, 2).contiguous().transpose(0, 2),
            turned,
            turned,
            codes.repeat(2, 1).T[:, 0],
            torch.ones(3),
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_values_are_named(backend):
    ref, policy, weights = torch.zeros(2, 3), torch.zeros(2, 2, 3), torch.tensor([[1.0, -0.5], [1.0, -0.5]])
    p, mixed = torch.ones(2), torch.tensor([1, 0], dtype=torch.int32)
    with on(backend):
        with pytest.raises(PersonafastError, match="`weights` of row 1 hold -0.5, but the linear rule needs 0 or more"):
            ops.chunk_scores(ref, policy, weights, None, mixed, p)
        with pytest.raises(PersonafastError, match=r"unknown code 7: known are 0 \(linear\), 1 \(geometric\)"):
            ops.chunk_scores(ref, policy, weights, None, torch.tensor([1, 7], dtype=torch.int32), p)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_logp": torch.zeros(2)}, r"`ref_logp` has shape \[2\]"),
        ({"policy_logp": torch.zeros(2, 3)}, r"`policy_logp` has shape \[2, 3\]"),
        (
            {"policy_logp": torch.zeros(2, 2, 4)},
            r"`policy_logp` has shape \[2, 2, 4\], expected \[N, B, k\] = \[2, 2, 3\]",
        ),
        ({"weights": torch.zeros(2, 3)}, r"`weights` has shape \[2, 3\]"),
        ({"carried": torch.zeros(1, 2)}, r"`carried` has shape \[1, 2\]"),
        ({"aggregator": torch.zeros(2)}, "`aggregator` has dtype float32"),
        ({"p": torch.ones(3)}, r"`p` has shape \[3\]"),
        ({"ref_logp": torch.zeros(2, 3, requires_grad=True)}, "no gradient"),
    ],
)
def test_bad_input_is_named(change, message):
    good = {
        "ref_logp": torch.zeros(2, 3),
        "policy_logp": torch.zeros(2, 2, 3),
        "weights": torch.ones(2, 2),
        "carried": None,
        "aggregator": torch.zeros(2, dtype=torch.int32),
        "p": torch.ones(2),
    }
    with pytest.raises(PersonafastError, match=message):
        ops.chunk_scores(**{**good, **change})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregator", [0, 1])
def test_a_member_of_weight_zero_bars_no_token(backend, aggregator):
    ref = torch.full((2, 3), -1.0)
    policy = torch.tensor([[-0.5, -INF, -0.5], [-0.25, -2.0, -1.0]])[:, None].repeat(1, 2, 1)
    weights = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    codes = torch.full((2,), aggregator, dtype=torch.int32)
    with on(backend):
        scores = ops.chunk_scores(ref, policy, weights, None, codes, torch.ones(2))
        barred = ops.chunk_scores(ref, policy, weights[:1].flip(1).repeat(2, 1), None, codes, torch.ones(2))
    torch.testing.assert_close(scores, torch.tensor([[0.75, -0.25, -0.25], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(barred, torch.tensor([[0.5, -INF, -INF]]).repeat(2, 1))
