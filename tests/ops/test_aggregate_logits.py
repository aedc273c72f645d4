import math

import pytest
import torch
from helpers.backends import BACKENDS, on
from hypothesis import given, settings
from hypothesis import strategies as st

from personafast import ops
from personafast.errors import BackendError, PersonafastError

INF = math.inf
LINEAR, GEOMETRIC, POWER, JENSEN_SHANNON, MIN, MAX = (int(rule) for rule in ops.Aggregator)
RULES = [(int(rule), p) for rule in ops.Aggregator for p in ([-1.0, 0.0, 0.5] if rule == POWER else [1.0])]
EXPONENTS = [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]


def joined(rule, p, w, c, pi, pi0):
    """The target of one row in float64, not normalised, by the formulas alone; w and c are numbers, pi [V] each."""
    total = sum(w)
    scaled = [math.exp(x) * q for x, q in zip(c, pi, strict=True)]
    if rule == LINEAR:
        return sum(a * x for a, x in zip(w, scaled, strict=True)).clamp(min=0)
    if rule == MIN:
        return torch.stack(scaled).amin(0)
    if rule == MAX:
        return torch.stack(scaled).amax(0)
    if rule == JENSEN_SHANNON:
        s = torch.ones_like(pi0)
        for a, x in zip(w, scaled, strict=True):
            r = x / torch.where(pi0 > 0, pi0, 1.0)
            s = s * (r / (1 + r)) ** (a / total)
        return torch.where(pi0 > 0, pi0 * s / (1 - s), 0.0)
    if p == 0:
        return torch.stack([x ** (a / total) for a, x in zip(w, scaled, strict=True)]).prod(0)
    return sum(a / total * x**p for a, x in zip(w, scaled, strict=True)) ** (1 / p)


def by_hand(ref, policies, weights, carried, aggregator, p, min_p):
    """Probabilities in float64, row by row from the definition, and what their rounding errors are proportional to."""
    N, B, V = policies.shape
    pi0, pi = ref.double().softmax(-1), policies.double().softmax(-1)
    out, size = torch.zeros(B, V, dtype=torch.float64), torch.ones(B, dtype=torch.float64)
    for b in range(B):
        used = [n for n in range(N) if float(weights[b, n])]
        w = [float(weights[b, n]) for n in used]
        c = [float(carried[b, n]) if carried is not None else 0.0 for n in used]
        members = [pi[n, b] for n in used]
        rest = 1 - float(weights[b].sum())
        supporting = members
        if not used:
            supporting, target = [pi0[b]], pi0[b].clone()
        elif aggregator[b] == GEOMETRIC:
            if rest > 1e-6:
                supporting = [*members, pi0[b]]
            factors = list(zip(w, members, strict=True))
            if abs(rest) > 1e-6:
                factors.append((rest, pi0[b]))
            possible = torch.stack([q > 0 for _, q in factors]).all(0)
            logs = sum(f * torch.where(q > 0, q, 1.0).log() for f, q in factors)
            target = torch.where(possible, (logs - logs.max()).exp(), 0.0)
        else:
            target = joined(int(aggregator[b]), float(p[b]), w, c, members, pi0[b])
            if aggregator[b] == LINEAR:
                supporting = [q for a, q in zip(w, members, strict=True) if a > 0]
                taken_from = joined(LINEAR, 1.0, [max(a, 0.0) for a in w], c, members, pi0[b])
        keep = torch.zeros(V, dtype=torch.bool)
        for q in supporting:
            keep |= q >= float(min_p[b]) * q.max() * (1 - 1e-9)
        target = torch.where(keep, target, 0.0)
        out[b] = target / target.sum() if target.sum() > 0 else target
        if aggregator[b] == LINEAR and used and min(w) < 0 and target.sum() > 0:
            size[b] = 1 + taken_from.sum() / target.sum()
    return out, size


def run(ref, policies, weights, aggregator, min_p=0.0, carried=None, p=1.0):
    B = ref.shape[0]
    codes = torch.full((B,), aggregator, dtype=torch.int32) if isinstance(aggregator, int) else aggregator
    floor = torch.full((B,), min_p) if isinstance(min_p, float) else min_p
    exponent = torch.full((B,), p) if isinstance(p, float) else p
    return ops.aggregate_logits(ref, policies, weights, carried, codes, exponent, floor)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=150)
@given(
    B=st.integers(0, 5),
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
    aggregator = torch.randint(0, 6, (B,), generator=g, dtype=torch.int32)
    p = torch.tensor(EXPONENTS)[torch.randint(0, len(EXPONENTS), (B,), generator=g)]
    if sparse:
        weights[torch.rand(B, N, generator=g) < 0.5] = 0
    if signs:
        weights[(aggregator <= GEOMETRIC)[:, None] & (torch.rand(B, N, generator=g) < 0.3)] *= -1
    if V > 1:
        ref[:, 1:][torch.rand(B, V - 1, generator=g) < holes] = -INF
        policies[:, :, 1:][torch.rand(N, B, V - 1, generator=g) < holes] = -INF
    min_p = torch.tensor([0.0, 0.05, 0.3, 0.9, 1.0])[torch.randint(0, 5, (B,), generator=g)]
    carried = torch.randn(B, N, generator=g) if carry else None
    with on(backend):
        out = run(ref, policies, weights, aggregator, min_p, carried, p)
    expected, size = by_hand(ref, policies, weights, carried, aggregator, p, min_p)
    assert out.dtype == torch.float32
    for b in range(B):
        if size[b] == 1:
            torch.testing.assert_close(out[b].double(), expected[b].log(), rtol=2e-5, atol=2e-5)
        else:
            # What one member takes away of another may leave little, and then has few digits.
            torch.testing.assert_close(out[b].double().exp(), expected[b], rtol=0.0, atol=2e-5 * float(size[b]))


def exact(ref, policies, weight, carried, rule, p):
    """Log target in float64 of rows that share their weights [N], all tokens possible; by logs, lest they underflow."""
    logp0, logp = ref.double().log_softmax(-1), policies.double().log_softmax(-1)
    w = weight.double()[:, None, None]
    x = logp + carried.double().T[:, :, None]
    used = weight != 0
    x, w, logp = x[used], w[used], logp[used]
    if rule == LINEAR:
        most = x.amax(0)
        target = most + (w * (x - most).exp()).sum(0).log()
    elif rule == GEOMETRIC:
        target = (1 - w.sum(0)) * logp0 + (w * logp).sum(0)
    elif rule == POWER:
        target = (w * x).sum(0) / w.sum(0) if p == 0 else (w.log() + p * x).logsumexp(0) / p
    elif rule == JENSEN_SHANNON:
        log_s = (w / w.sum() * torch.nn.functional.logsigmoid(x - logp0)).sum(0)
        target = logp0 + log_s - torch.log(-torch.expm1(log_s))
    else:
        target = x.amin(0) if rule == MIN else x.amax(0)
    return target.log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("aggregator", "p"), [*RULES, (POWER, -3.0), (POWER, 1e-3), (POWER, -1e-6), (POWER, 40.0)])
@pytest.mark.parametrize("weights", [[1.0, 0.0, 0.0], [0.4, 0.3, 0.3], [1.5, 1.0, 0.7]])
def test_error_rule(dtype, aggregator, p, weights, within_twice):
    g = torch.Generator().manual_seed(1)
    ref = (4 * torch.randn(5, 9001, generator=g)).to(dtype)
    policies = (ref + torch.randn(3, 5, 9001, generator=g)).to(dtype)
    weight, carried = torch.tensor(weights).repeat(5, 1), torch.randn(5, 3, generator=g)
    with on("cpu"):
        out = run(ref, policies, weight, aggregator, carried=carried, p=p)
    with on("torch"):
        plain = run(ref, policies, weight, aggregator, carried=carried, p=p)
    expected = exact(ref, policies, weight[0], carried, aggregator, p)
    within_twice(out, plain, expected)
    assert (plain.double() - expected).abs().max() < 2e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_harmonic_mean_is_the_power_of_minus_one(backend):
    g = torch.Generator().manual_seed(4)
    ref, policies = 2 * torch.randn(3, 40, generator=g), 2 * torch.randn(3, 3, 40, generator=g)
    weights = torch.tensor([0.5, 0.3, 0.2]).repeat(3, 1)
    with on(backend):
        out = run(ref, policies, weights, POWER, p=-1.0)
    pi = policies.double().softmax(-1)
    harmonic = 1 / (0.5 / pi[0] + 0.3 / pi[1] + 0.2 / pi[2])
    torch.testing.assert_close(out.double().exp(), harmonic / harmonic.sum(-1, keepdim=True), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_power_means_are_continuous_at_zero_and_meet_the_other_rules_at_their_ends(backend):
    g = torch.Generator().manual_seed(5)
    ref, policies = torch.randn(2, 60, generator=g), 2 * torch.randn(4, 2, 60, generator=g)
    weights, carried = torch.rand(2, 4, generator=g), torch.randn(2, 4, generator=g)
    args = {"carried": carried, "ref": ref, "policies": policies, "weights": weights}
    with on(backend):
        at_zero = run(aggregator=POWER, p=0.0, **args)
        shares = weights / weights.sum(1, keepdim=True)
        geometric = run(aggregator=GEOMETRIC, **{**args, "weights": shares})
        torch.testing.assert_close(at_zero, geometric, rtol=1e-5, atol=1e-5)
        for p in (1e-30, -1e-30, 1e-8, -1e-8, 1e-6, -1e-6):
            torch.testing.assert_close(run(aggregator=POWER, p=p, **args), at_zero, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(run(aggregator=POWER, p=1.0, **args), run(aggregator=LINEAR, **args))
        for p, end in ((-1e5, MIN), (1e5, MAX), (-1e38, MIN), (1e38, MAX)):
            torch.testing.assert_close(run(aggregator=POWER, p=p, **args), run(aggregator=end, **args), rtol=0.0,
                                       atol=1e-3)  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, -0.5], [2.0, -1.0]])
def test_the_linear_rule_is_the_explicit_mixture_and_clamps_what_is_taken_away(backend, weights):
    g = torch.Generator().manual_seed(6)
    ref, policies = torch.randn(3, 50, generator=g), 2 * torch.randn(2, 3, 50, generator=g)
    with on(backend):
        out = run(ref, policies, torch.tensor(weights).repeat(3, 1), LINEAR)
        same = run(ref, policies[:1].repeat(2, 1, 1), torch.tensor([[1.0, -1.0]]).repeat(3, 1), LINEAR)
        three = run(ref, policies[:1].repeat(3, 1, 1), torch.tensor([[0.3, 0.7, -1.0]]).repeat(3, 1), LINEAR)
        negative = run(ref, policies, torch.full((3, 2), -0.5), LINEAR)
    pi = policies.double().softmax(-1)
    mixture = (weights[0] * pi[0] + weights[1] * pi[1]).clamp(min=0)
    torch.testing.assert_close(
        out.double().exp(), mixture / mixture.sum(-1, keepdim=True), rtol=0.0, atol=1e-6
    )  # fmt: skip
    assert (out == -INF).any().item() == (min(weights) < 0)
    # Nothing is left, and rounding does not pass for something.
    assert (same == -INF).all() and (three == -INF).all() and (negative == -INF).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("aggregator", "p"), RULES)
def test_equal_policies_and_a_single_one_are_the_target_themselves(backend, aggregator, p):
    g = torch.Generator().manual_seed(7)
    ref, policies = 3 * torch.randn(3, 90, generator=g), 3 * torch.randn(3, 3, 90, generator=g)
    policies[:, :, 4] = -INF
    expected = policies[1].log_softmax(-1)
    one = torch.zeros(3, 3)
    one[:, 1] = 1 if aggregator == GEOMETRIC else 0.7
    thirds = torch.tensor([0.2, 0.3, 0.5]).repeat(3, 1)
    with on(backend):
        alone = run(ref, policies, one, aggregator, p=p, carried=torch.randn(3, 3) if aggregator < 3 else None)
        equal = run(ref, policies[1].repeat(3, 1, 1), thirds, aggregator, p=p)
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(equal, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_member_excludes(backend):
    ref = torch.zeros(1, 3)
    policies = torch.tensor([[[0.0, 0.0, -INF]], [[0.0, -INF, 0.0]]])
    weights = torch.full((1, 2), 0.5)
    kept = {}
    with on(backend):
        for rule, p in [(LINEAR, 1.0), (GEOMETRIC, 1.0), *((POWER, p) for p in EXPONENTS), (JENSEN_SHANNON, 1.0),
                        (MIN, 1.0), (MAX, 1.0)]:  # fmt: skip
            kept[rule, p] = run(ref, policies, weights, rule, p=p)[0].isfinite().tolist()
        unseen = run(torch.tensor([[0.0, 0.0, -INF]]), torch.zeros(2, 1, 3), weights, JENSEN_SHANNON)
    every, shared = [True] * 3, [True, False, False]
    for (rule, p), tokens in kept.items():
        open_rule = rule in (LINEAR, MAX) or (rule == POWER and p > 0)
        assert tokens == (every if open_rule else shared), (rule, p)
    torch.testing.assert_close(unseen, torch.tensor([[0.0, 0.0, -INF]]).log_softmax(-1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_jensen_shannon_far_from_one(backend):
    """Ratios so large that s rounds to 1: the target is the harmonic mean; and so small that it is the product."""
    g = torch.Generator().manual_seed(8)
    ref, policies = torch.randn(2, 30, generator=g), torch.randn(3, 2, 30, generator=g)
    weights = torch.tensor([0.5, 0.3, 0.2]).repeat(2, 1)
    pi = policies.double().softmax(-1)
    for carried in (30.0, 90.0, 300.0):
        with on(backend):
            large = run(ref, policies, weights, JENSEN_SHANNON, carried=torch.full((2, 3), carried))
            small = run(ref, policies, weights, JENSEN_SHANNON, carried=torch.full((2, 3), -carried))
        harmonic = 1 / (0.5 / pi[0] + 0.3 / pi[1] + 0.2 / pi[2])
        product = pi[0] ** 0.5 * pi[1] ** 0.3 * pi[2] ** 0.2
        for out, target in ((large, harmonic), (small, product)):
            target = (target / target.sum(-1, keepdim=True)).log()
            torch.testing.assert_close(out.double(), target, rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_only_subtracted_opens_no_support(backend):
    """A token that is left some probability, though only a member that takes away likes it."""
    policies = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.05, 0.9]]).log()[:, None].repeat(1, 2, 1)
    weights = torch.tensor([[1.0, -0.01], [-0.01, 1.0]])
    with on(backend):
        whole = run(torch.zeros(2, 3), policies, weights, LINEAR).isfinite()
        kept = run(torch.zeros(2, 3), policies, weights, LINEAR, 0.1).isfinite()
    assert whole.all() and kept.tolist() == [[True, False, False], [False, False, True]]


@pytest.mark.parametrize("min_p", [0.0, 0.05])
@pytest.mark.parametrize(("aggregator", "p"), RULES)
def test_kernel_rows_do_not_depend_on_their_batch_or_on_threads(aggregator, p, min_p):
    pytest.importorskip("personafast._C")
    g = torch.Generator().manual_seed(2)
    ref, policies = 4 * torch.randn(3, 200_003, generator=g), 4 * torch.randn(4, 3, 200_003, generator=g)
    weights, threads = torch.rand(3, 4, generator=g), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            with on("cpu"):
                results.append(run(ref, policies, weights, aggregator, min_p, p=p))
                results.append(torch.cat([run(ref[b : b + 1], policies[:, b : b + 1], weights[b : b + 1], aggregator,
                                              min_p, p=p) for b in range(3)]))  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("width", [1, 40, 300])
@pytest.mark.parametrize("dtype", [0, 1, 2])
@pytest.mark.parametrize(("aggregator", "p"), RULES)
def test_kernel_writes_every_output_and_nothing_else(aggregator, p, dtype, width):
    core = pytest.importorskip("personafast._C")
    kind = (torch.float32, torch.bfloat16, torch.float16)[dtype]
    ref, policies = torch.randn(3, width).to(kind), torch.randn(2, 3, width).to(kind)
    weights, codes = torch.rand(3, 2), torch.full((3,), aggregator, dtype=torch.int32)
    exponent, min_p, out = torch.full((3,), p), torch.tensor([0.0, 0.5, 0.05]), torch.full((5, width), float("nan"))
    wrong = core.aggregate_logits(
        out[1:].data_ptr(), ref.data_ptr(), width, policies.data_ptr(), 3 * width, width, weights.data_ptr(), 0,
        codes.data_ptr(), exponent.data_ptr(), min_p.data_ptr(), 3, 2, width, dtype, 2,
    )  # fmt: skip
    assert wrong == -1
    assert not out[1:4].isnan().any() and out[[0, 4]].isnan().all()
    assert (out[1:4].exp().sum(-1) - 1).abs().max() < 1e-5


@pytest.mark.parametrize(("aggregator", "p"), RULES)
def test_kernel_serves_every_layout(aggregator, p):
    g = torch.Generator().manual_seed(3)
    ref, policies, weights = torch.randn(3, 70, generator=g), torch.randn(2, 3, 70, generator=g), torch.rand(3, 2)
    with on("cpu"):
        expected = run(ref, policies, weights, aggregator, 0.05, p=p)
        wide = torch.full((3, 4, 90), float("nan"))
        wide[:, 0, 5:75], wide[:, 1, 5:75], wide[:, 3, 5:75] = ref, policies[0], policies[1]
        rows = run(wide[:, 0, 5:75], wide[:, 1::2, 5:75].transpose(0, 1), weights, aggregator, 0.05, p=p)
        columns = run(
            ref.T.contiguous().T, policies.transpose(0, 2).contiguous().transpose(0, 2), weights.T.contiguous().T,
            aggregator, 0.05, p=p,
        )  # fmt: skip
        mixed = run(ref, policies.bfloat16(), weights, aggregator, 0.05, p=p)
        half = run(ref, policies.bfloat16().float(), weights.double(), aggregator, 0.05, p=p)
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
@pytest.mark.parametrize(("aggregator", "p"), [(GEOMETRIC, 1.0), (POWER, -1.0), (POWER, 0.0), (JENSEN_SHANNON, 1.0),
                                               (MIN, 1.0)])  # fmt: skip
def test_a_target_without_any_token_is_left_empty(backend, aggregator, p):
    ref = torch.tensor([[1.0, 0.0, -4.0], [1.0, 0.0, -4.0]])
    policies = torch.tensor([[[0.0, -INF, -INF], [0.0, 1.0, 2.0]], [[-INF, 0.0, -INF], [0.0, 1.0, 2.0]]])
    with on(backend):
        for min_p in (0.0, 0.1):
            out = run(ref, policies, torch.ones(2, 2), aggregator, min_p, p=p)
            assert (out[0] == -INF).all() and abs(float(out[1].exp().sum()) - 1) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("aggregator", "p"), RULES)
def test_carried_log_ratios_of_minus_infinity(backend, aggregator, p):
    """A member that excludes the text so far adds nothing, or excludes every token."""
    ref, policies = torch.zeros(1, 4), torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(9))
    carried = torch.tensor([[-INF, 0.0]])
    with on(backend):
        out = run(ref, policies, torch.ones(1, 2), aggregator, carried=carried, p=p)
        none = run(ref, policies, torch.ones(1, 2), aggregator, carried=carried - INF, p=p)
    if aggregator == GEOMETRIC:
        assert torch.equal(out, none) and out.isfinite().all()
        return
    assert (none == -INF).all()
    if aggregator in (LINEAR, MAX) or p == 0.5:
        torch.testing.assert_close(out, policies[1].log_softmax(-1), rtol=1e-5, atol=1e-5)
    else:
        assert (out == -INF).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("aggregator", "p"), RULES)
def test_nan_is_not_hidden(backend, aggregator, p):
    ref, policies = torch.zeros(2, 4), torch.zeros(1, 2, 4)
    policies[0, 1, 2] = float("nan")
    with on(backend):
        for weight in (0.5, 1.0):
            out = run(ref, policies, torch.full((2, 1), weight), aggregator, 0.1, p=p)
            assert out[0].isfinite().all() and out[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("aggregator", "p"), RULES)
def test_nan_of_weight_zero_counts_for_nothing(backend, aggregator, p):
    g = torch.Generator().manual_seed(10)
    ref, policies, carried = torch.randn(2, 40, generator=g), torch.randn(3, 2, 40, generator=g), torch.zeros(2, 3)
    weights = torch.tensor([[0.0, 0.6, 0.4], [0.0, 0.0, 1.0]])
    with on(backend):
        expected = run(ref, policies[1:], weights[:, 1:], aggregator, 0.05, carried[:, 1:], p)
        policies[0], carried[:, 0] = float("nan"), float("nan")
        assert torch.equal(run(ref, policies, weights, aggregator, 0.05, carried, p), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_values_are_named(backend):
    ref, policies = torch.zeros(2, 4), torch.zeros(1, 2, 4)
    with on(backend):
        for rule, name in ((POWER, "power"), (JENSEN_SHANNON, "jensen_shannon"), (MIN, "min"), (MAX, "max")):
            mixed = torch.tensor([LINEAR, rule], dtype=torch.int32)
            with pytest.raises(PersonafastError, match=f"`weights` of row 1 hold -1, but the {name} rule needs 0"):
                run(ref, policies, torch.full((2, 1), -1.0), mixed)
        for bad in (INF, -INF, float("nan")):
            exponent = torch.tensor([1.0, bad])
            with pytest.raises(PersonafastError, match=f"`p` of row 1 is {bad:g}, but the power rule needs a finite"):
                run(ref, policies, torch.ones(2, 1), POWER, p=exponent)
            assert run(ref, policies, torch.ones(2, 1), MIN, p=exponent).isfinite().all()
        with pytest.raises(PersonafastError, match="unknown code 6"):
            run(ref, policies, torch.ones(2, 1), 6)
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
@pytest.mark.parametrize(("aggregator", "p"), RULES)
def test_a_member_of_weight_zero_gives_no_token_support(backend, aggregator, p):
    ref, policies = torch.zeros(2, 4), torch.zeros(2, 2, 4)
    ref[:, 1] = policies[0, :, 0] = policies[1, :, 2] = 9.0
    weights = torch.tensor([[0.0, 1.0], [0.0, 0.0]])  # only the second policy; only the reference
    with on(backend):
        kept = run(ref, policies, weights, aggregator, 0.5, p=p).isfinite()
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
