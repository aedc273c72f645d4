import math

import pytest
import torch
from helpers.backends import BACKENDS, on
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import PersonafastError

INF = math.inf


LINEAR, GEOMETRIC, POWER, JENSEN_SHANNON, MIN, MAX = (int(rule) for rule in ops.Aggregator)
RULES = [(int(rule), p) for rule in ops.Aggregator for p in ([-1.0, 0.0, 0.5] if rule == POWER else [1.0])]
EXPONENTS = [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]


def joined(rule, p, members):
    """Log of the joint ratio of members (weight, log ratio), by cases, in float64."""
    total = sum(w for w, _ in members)
    ratios = [math.exp(t) for _, t in members]
    low, high = min(t for _, t in members), max(t for _, t in members)
    if rule == MIN or rule == MAX:
        return low if rule == MIN else high
    if rule == LINEAR:
        whole = sum(w * math.exp(t - high) for w, t in members) if high > -INF else 0.0
        return high + math.log(whole) if whole > 0 else -INF
    if low == -INF and (rule != POWER or p <= 0):
        return -INF
    if rule == GEOMETRIC:
        return sum(w * t for w, t in members)
    if rule == JENSEN_SHANNON:
        s = math.prod((r / (1 + r)) ** (w / total) for (w, _), r in zip(members, ratios, strict=True))
        return math.log(s / (1 - s))
    if p == 0:
        return sum(w * t for w, t in members) / total
    return math.log(sum(w * r**p for (w, _), r in zip(members, ratios, strict=True))) / p if high > -INF else -INF


def by_hand(ref, policy, weights, carried, aggregator, p):
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
            out[b, j] = joined(int(aggregator[b]), float(p[b]), terms) if terms else 0.0
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=150)
@given(
    B=st.integers(0, 6),
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
    aggregator = torch.randint(0, 6, (B,), generator=g, dtype=torch.int32)
    p = torch.tensor(EXPONENTS)[torch.randint(0, len(EXPONENTS), (B,), generator=g)]
    if holes:
        ref[torch.rand(B, k, generator=g) < 0.15] = -INF
        policy[torch.rand(N, B, k, generator=g) < 0.15] = -INF
        weights[torch.rand(B, N, generator=g) < 0.4] = 0
    weights[(aggregator <= GEOMETRIC)[:, None] & (torch.rand(B, N, generator=g) < 0.3)] *= -1
    carried = torch.randn(B, N, generator=g) if carry else None
    ref, policy, weights = ref.to(dtype), policy.to(dtype), weights.to(dtype)
    with on(backend):
        scores = ops.chunk_scores(ref, policy, weights, carried, aggregator, p.to(dtype))
    assert scores.dtype == torch.float32 and scores.shape == (B, k)
    expected = by_hand(ref, policy, weights, carried, aggregator, p)
    subtracted = (aggregator == LINEAR) & (weights < 0).any(1)
    torch.testing.assert_close(scores[~subtracted].double(), expected[~subtracted], rtol=1e-5, atol=1e-5)
    # Of what a difference leaves, the ratio is exact to what it was taken from.
    most = by_hand(ref, policy, weights.clamp(min=0), carried, aggregator, p)[subtracted].exp()
    error = (scores[subtracted].double().exp() - expected[subtracted].exp()).abs()
    assert (error <= 2e-5 * most).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_linear_rule_clamps_what_is_taken_away(backend):
    ref = torch.full((4, 2), -1.0)
    policy = torch.tensor([[-1.0, -0.5], [-0.5, -2.0], [-1.0, -0.5]])[:, None].repeat(1, 4, 1)
    weights = torch.tensor([[1.0, -0.5, 0.0], [1.0, 0.0, -1.0], [0.3, 0.0, -0.3], [-1.0, 0.0, 0.0]])
    with on(backend):
        scores = ops.chunk_scores(ref, policy, weights, None, torch.zeros(4, dtype=torch.int32), torch.ones(4))
    first = [math.log(1 - 0.5 * math.exp(0.5)), math.log(math.exp(0.5) - 0.5 * math.exp(-0.5))]
    torch.testing.assert_close(scores[0], torch.tensor(first), rtol=1e-5, atol=1e-5)
    # Nothing is left, and rounding does not pass for something.
    assert (scores[1:] == -INF).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_power_means_are_in_order_and_continuous_at_zero(backend):
    g = torch.Generator().manual_seed(3)
    ref, policy = -3 * torch.rand(3, 4, generator=g), -3 * torch.rand(3, 3, 4, generator=g)
    weights, carried = torch.tensor([0.5, 0.3, 0.2]).repeat(3, 1), 3 * torch.randn(3, 3, generator=g)

    def scores(rule, p=1.0):
        codes = torch.full((3,), rule, dtype=torch.int32)
        return ops.chunk_scores(ref, policy, weights, carried, codes, torch.full((3,), p))

    with on(backend):
        ladder = [scores(MIN), *(scores(POWER, p) for p in (-1e38, -3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 1e38)),
                  scores(MAX)]  # fmt: skip
        torch.testing.assert_close(scores(POWER, 1.0), scores(LINEAR))
        torch.testing.assert_close(scores(POWER, 0.0), scores(GEOMETRIC))
        for p in (1e-30, -1e-30, 1e-8, -1e-6):
            torch.testing.assert_close(scores(POWER, p), scores(POWER, 0.0), rtol=1e-5, atol=1e-5 + 30 * abs(p))
    for lower, upper in zip(ladder, ladder[1:], strict=False):
        assert (lower <= upper + 1e-5).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("aggregator", "p"), RULES)
@pytest.mark.parametrize("carried", [-300.0, -20.0, 0.0, 20.0, 300.0])
def test_equal_policies_give_their_own_ratio_however_far_from_one(backend, aggregator, p, carried):
    ref, policy = torch.tensor([[-1.0, -2.0, -0.5]]), torch.tensor([[[-0.5, -4.0, -0.1]]]).repeat(3, 1, 1)
    weights = torch.tensor([[0.5, 0.25, 0.25]])
    with on(backend):
        scores = ops.chunk_scores(
            ref, policy, weights, torch.full((1, 3), carried), torch.tensor([aggregator], dtype=torch.int32),
            torch.tensor([p]),
        )  # fmt: skip
    torch.testing.assert_close(scores, carried + (policy[0] - ref).cumsum(1), rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_overflow_far_from_one(backend):
    ref, policy = torch.full((1, 3), -1.0), torch.full((2, 1, 3), -400.0)
    rule = torch.tensor([0], dtype=torch.int32)
    with on(backend):
        scores = ops.chunk_scores(ref, policy, torch.ones(1, 2), None, rule, torch.ones(1))
    expected = [math.log(2) - 399.0 * j for j in (1, 2, 3)]
    torch.testing.assert_close(scores[0], torch.tensor(expected))


@pytest.mark.parametrize(("aggregator", "p"), [*RULES, (POWER, -3.0), (POWER, 1e-3), (POWER, 40.0)])
def test_error_rule(aggregator, p, within_twice):
    g = torch.Generator().manual_seed(1)
    ref, policy = -3 * torch.rand(500, 8, generator=g), -3 * torch.rand(4, 500, 8, generator=g)
    weights, carried = torch.rand(500, 4, generator=g), 5 * torch.randn(500, 4, generator=g)
    args = ref, policy, weights, carried, torch.full((500,), aggregator, dtype=torch.int32), torch.full((500,), p)
    with on("cpu"):
        out = ops.chunk_scores(*args)
    with on("torch"):
        plain = ops.chunk_scores(*args)
    x = (policy.double() - ref.double()).cumsum(2) + carried.double().T[:, :, None]
    w = weights.double().T[:, :, None]
    if aggregator == JENSEN_SHANNON:
        log_s = (w / w.sum(0) * torch.nn.functional.logsigmoid(x)).sum(0)
        exact = log_s - torch.log(-torch.expm1(log_s))
    elif aggregator in (MIN, MAX):
        exact = x.amin(0) if aggregator == MIN else x.amax(0)
    elif aggregator == GEOMETRIC or p == 0:
        exact = (w * x).sum(0) / (w.sum(0) if p == 0 else 1)
    else:
        exact = (w.log() + p * x).logsumexp(0) / p
    within_twice(out, plain, exact)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("aggregator", "p"), RULES)
def test_nan_goes_through_and_nowhere_else(backend, aggregator, p):
    ref, policy, weights = torch.full((4, 3), -1.0), torch.full((2, 4, 3), -2.0), torch.ones(4, 2)
    nan = float("nan")
    policy[1, 0, 1], ref[1, 1], weights[3, 1], policy[1, 3] = nan, nan, 0, nan
    codes = torch.full((4,), aggregator, dtype=torch.int32)
    with on(backend):
        scores = ops.chunk_scores(ref, policy, weights, None, codes, torch.full((4,), p))
    expected = [[False, True, True], [False, True, True], [False] * 3, [False] * 3]
    assert scores.isnan().tolist() == expected


def test_kernel_writes_every_output_and_nothing_else():
    core = pytest.importorskip("personafast._C")
    ref, policy, weights = -torch.rand(3, 4), -torch.rand(2, 3, 4), torch.rand(3, 2)
    out, codes = torch.full((5, 4), float("nan")), torch.tensor([0, 2, 3], dtype=torch.int32)
    p = torch.ones(3)
    args = ref.data_ptr(), policy.data_ptr(), weights.data_ptr(), 0, codes.data_ptr(), p.data_ptr(), 3, 2, 4
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
    p = torch.ones(2)
    with on(backend):
        for rule, name in ((POWER, "power"), (JENSEN_SHANNON, "jensen_shannon"), (MIN, "min"), (MAX, "max")):
            mixed = torch.tensor([1, rule], dtype=torch.int32)
            with pytest.raises(PersonafastError, match=f"`weights` of row 1 hold -0.5, but the {name} rule needs 0 or"):
                ops.chunk_scores(ref, policy, weights, None, mixed, p)
        powers = torch.tensor([POWER, POWER], dtype=torch.int32)
        for bad in (INF, -INF, float("nan")):
            with pytest.raises(PersonafastError, match=f"`p` of row 1 is {bad:g}, but the power rule needs a finite"):
                ops.chunk_scores(ref, policy, weights.abs(), None, powers, torch.tensor([1.0, bad]))
        with pytest.raises(PersonafastError, match=r"unknown code 7: known are 0 \(linear\), 1 \(geometric\), 2"):
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
@pytest.mark.parametrize(("aggregator", "p"), RULES)
def test_a_member_of_weight_zero_bars_no_token(backend, aggregator, p):
    ref = torch.full((2, 3), -1.0)
    policy = torch.tensor([[-0.5, -INF, -0.5], [-0.25, -2.0, -1.0]])[:, None].repeat(1, 2, 1)
    weights = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    codes = torch.full((2,), aggregator, dtype=torch.int32)
    with on(backend):
        scores = ops.chunk_scores(ref, policy, weights, None, codes, torch.full((2,), p))
        barred = ops.chunk_scores(ref, policy, weights[:1].flip(1).repeat(2, 1), None, codes, torch.full((2,), p))
    torch.testing.assert_close(scores, torch.tensor([[0.75, -0.25, -0.25], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(barred, torch.tensor([[0.5, -INF, -INF]]).repeat(2, 1))
