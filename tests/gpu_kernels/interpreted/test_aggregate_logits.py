import math
from unittest import mock

import pytest
import torch
from personafast._triton import aggregate_logits as launcher

from personafast import ops
from personafast.errors import BackendError, PersonafastError
from personafast.ops import _aggregate_logits

INF = math.inf
LINEAR, GEOMETRIC, POWER, JENSEN_SHANNON, MIN, MAX = (int(rule) for rule in ops.Aggregator)
RULES = [(int(rule), p) for rule in ops.Aggregator for p in ([-3.0, -1.0, 0.0, 1e-6, 0.5] if rule == POWER else [1.0])]


def run(ref, policies, weights, aggregator, min_p=0.0, carried=None, p=1.0):
    B = ref.shape[0]
    codes = torch.full((B,), aggregator, dtype=torch.int32) if isinstance(aggregator, int) else aggregator
    floor = torch.full((B,), min_p) if isinstance(min_p, float) else min_p
    exponent = torch.full((B,), p) if isinstance(p, float) else p
    return ops.aggregate_logits(ref, policies, weights, carried, codes, exponent, floor)


def exact(*args):
    """The specification, computing in float64."""
    with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        return _aggregate_logits.reference(*args).double()


def obeys_the_error_rule(args, small=2e-6):
    out, right, plain = ops.aggregate_logits(*args), exact(*args), _aggregate_logits.reference(*args)
    assert out.dtype == torch.float32 and out.shape == right.shape
    finite = right.isfinite()
    assert torch.equal(out[~finite].nan_to_num(), right[~finite].float().nan_to_num())
    assert out[finite].isfinite().all()
    error = (out - right)[finite].abs()
    allowed = (plain - right)[finite].abs()
    if error.numel():
        assert error.max() <= 2 * allowed.max() + small


def mixed(B, N, V, dtype, seed, signs=False):
    """A batch whose rows follow different rules, with holes in the vocabulary and members of weight zero."""
    g = torch.Generator().manual_seed(seed)
    # Eighths, so that no logit lies where rounding decides about the support, and no dtype rounds them.
    ref, policies = ((2 * torch.randn(*shape, generator=g) * 8).round() / 8 for shape in ((B, V), (N, B, V)))
    if V > 1:
        ref[:, 1:][torch.rand(B, V - 1, generator=g) < 0.1] = -INF
        policies[:, :, 1:][torch.rand(N, B, V - 1, generator=g) < 0.1] = -INF
    weights = torch.rand(B, N, generator=g) * 1.5
    weights[torch.rand(B, N, generator=g) < 0.3] = 0
    rows = [RULES[b % len(RULES)] for b in range(B)]
    aggregator = torch.tensor([rule for rule, _ in rows], dtype=torch.int32)
    p = torch.tensor([exponent for _, exponent in rows])
    if signs:
        weights[(aggregator == GEOMETRIC)[:, None] & (torch.rand(B, N, generator=g) < 0.3)] *= -1
    min_p = torch.tensor([0.0, 0.05, 0.3, 1.0])[torch.arange(B) // len(RULES) % 4]
    carried = torch.randn(B, N, generator=g)
    return ref.to(dtype), policies.to(dtype), weights, carried, aggregator, p, min_p


@pytest.mark.parametrize(
    ("N", "V", "dtype"), [(1, 1, torch.float16), (2, 33, torch.float32), (3, 1100, torch.float16)], ids=str
)
def test_every_rule_in_one_batch(N, V, dtype):
    ref, policies, weights, carried, aggregator, p, min_p = mixed(2 * len(RULES), N, V, dtype, N, signs=True)
    obeys_the_error_rule((ref, policies, weights, carried, aggregator, p, min_p))
    obeys_the_error_rule((ref[:4], policies[:, :4], weights[:4], None, aggregator[:4], p[:4], 0 * min_p[:4]))


@pytest.mark.parametrize(
    ("N", "V", "rows"), [(4, 4200, slice(7, 13)), (9, 600, slice(10, 13)), (17, 300, slice(8, 11))]
)
def test_several_chunks_and_many_members(N, V, rows):
    ref, policies, *others = mixed(2 * len(RULES), N, V, torch.float16, N, signs=True)
    obeys_the_error_rule((ref[rows], policies[:, rows], *(each[rows] for each in others)))


def test_no_policies_and_no_rows():
    ref, policies, weights, carried, aggregator, p, min_p = mixed(6, 1, 50, torch.float32, 1)
    args = (policies[:0], weights[:, :0], carried[:, :0], aggregator, p, min_p + 0.1)
    obeys_the_error_rule((ref, *args))
    assert ops.aggregate_logits(ref[:0], policies[:, :0], weights[:0], None, aggregator[:0], p[:0], p[:0]).shape == (
        0,
        50,
    )


def test_what_a_geometric_blend_leaves_of_the_reference_or_takes_of_it():
    ref, policies, *_ = mixed(5, 2, 90, torch.float32, 2)
    weights = torch.tensor([[1.5, 0.7], [0.3, 0.2], [1.0, 0.0], [2.0, -1.0], [0.0, 0.7]])
    codes = torch.full((5,), GEOMETRIC, dtype=torch.int32)
    for min_p in (0.0, 0.2):
        obeys_the_error_rule((ref, policies, weights, None, codes, torch.ones(5), torch.full((5,), min_p)))


@pytest.mark.parametrize("weights", [[1.0, -0.5], [2.0, -1.0], [-0.5, -0.5]])
def test_what_the_linear_rule_takes_away(weights):
    g = torch.Generator().manual_seed(6)
    ref, policies = torch.randn(3, 50, generator=g), 2 * torch.randn(2, 3, 50, generator=g)
    out = run(ref, policies, torch.tensor(weights).repeat(3, 1), LINEAR)
    pi = policies.double().softmax(-1)
    left = (weights[0] * pi[0] + weights[1] * pi[1]).clamp(min=0)
    left = left / left.sum(-1, keepdim=True).clamp(min=1e-30)
    torch.testing.assert_close(out.double().exp(), left, rtol=0.0, atol=1e-6)
    same = run(ref, policies[:1].repeat(3, 1, 1), torch.tensor([[0.3, 0.7, -1.0]]).repeat(3, 1), LINEAR)
    assert (same == -INF).all()
    # What only a member that takes away likes has no support.
    policies = torch.tensor([[0.9, 0.05, 0.05], [0.05, 0.05, 0.9]]).log()[:, None]
    assert run(ref[:1, :3], policies, torch.tensor([[1.0, -0.01]]), LINEAR, 0.1).isfinite().tolist() == [
        [True, False, False]
    ]


@pytest.mark.parametrize("rule", RULES)
def test_members_of_weight_zero_count_for_nothing(rule):
    g = torch.Generator().manual_seed(10)
    ref, policies, carried = torch.randn(2, 40, generator=g), torch.randn(3, 2, 40, generator=g), torch.zeros(2, 3)
    weights = torch.tensor([[0.0, 0.6, 0.4], [0.0, 0.0, 1.0]])
    expected = run(ref, policies, weights, rule[0], 0.05, carried, rule[1])
    policies[0], carried[:, 0] = math.nan, math.nan
    assert torch.equal(run(ref, policies, weights, rule[0], 0.05, carried, rule[1]), expected)
    # The reference where it is no member, too.
    if rule[0] != JENSEN_SHANNON:
        assert torch.equal(run(ref + math.nan, policies, weights, rule[0], 0.05, carried, rule[1]), expected)


@pytest.mark.parametrize("rule", RULES)
def test_nan_and_rows_without_a_softmax_are_not_hidden(rule):
    ref, policies = torch.zeros(4, 1100), torch.zeros(1, 4, 1100)
    policies[0, 1, 1050], policies[0, 2], policies[0, 3, 7] = math.nan, -INF, INF
    for weight in (0.5, 1.0):
        out = run(ref, policies, torch.full((4, 1), weight), rule[0], 0.1, p=rule[1])
        assert out[0].isfinite().all() and out[1:].isnan().all()


@pytest.mark.parametrize("rule", [LINEAR, GEOMETRIC, POWER, MIN, MAX])
def test_one_policy_at_weight_one_is_that_policy(rule):
    ref, policies = torch.randn(4, 1301), 8 * torch.randn(3, 4, 1301)
    ref[:, 7] = -INF  # no coefficient left
    weights = torch.zeros(4, 3)
    weights[:3, 1] = 1.0
    out = run(ref, policies, weights, rule, carried=torch.randn(4, 3))
    torch.testing.assert_close(out[:3], policies[1, :3].log_softmax(-1), rtol=2e-7, atol=2e-6)
    torch.testing.assert_close(out[3:], ref[3:].log_softmax(-1), rtol=2e-7, atol=2e-6)


@pytest.mark.parametrize("rule", RULES)
def test_carried_log_ratios_of_minus_infinity(rule):
    ref, policies = torch.zeros(1, 4), torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(9))
    carried = torch.tensor([[-INF, 0.0]])
    for given in (carried, carried - INF):
        args = (torch.ones(1, 2), given, torch.tensor([rule[0]], dtype=torch.int32), torch.tensor([rule[1]]))
        obeys_the_error_rule((ref, policies, *args, torch.zeros(1)))


@pytest.mark.parametrize("shift", [30.0, 300.0, -300.0])
def test_jensen_shannon_far_from_one(shift):
    g = torch.Generator().manual_seed(8)
    ref, policies = torch.randn(2, 30, generator=g), torch.randn(3, 2, 30, generator=g)
    weights = torch.tensor([0.5, 0.3, 0.2]).repeat(2, 1)
    out = run(ref, policies, weights, JENSEN_SHANNON, carried=torch.full((2, 3), shift))
    pi = policies.double().softmax(-1)
    means = 1 / (0.5 / pi[0] + 0.3 / pi[1] + 0.2 / pi[2]), pi[0] ** 0.5 * pi[1] ** 0.3 * pi[2] ** 0.2
    target = means[0] if shift > 0 else means[1]
    torch.testing.assert_close(out.double(), (target / target.sum(-1, keepdim=True)).log(), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("off", [4e-7, -4e-7])
def test_weights_that_sum_to_one_up_to_rounding_leave_the_reference_no_share(off):
    ref = torch.tensor([[9.0, 0.0, -INF, 0.0]])
    policies = torch.tensor([[[0.0, 0.0, 8.0, 9.0]], [[0.0, 0.0, 9.0, 8.0]]])
    weights = torch.tensor([[0.6, 0.4 - off]])
    whole, masked = run(ref, policies, weights, GEOMETRIC), run(ref, policies, weights, GEOMETRIC, 0.1)
    shared = run(ref, policies, weights - 0.1, GEOMETRIC, 0.1)
    expected = (0.6 * policies[0].log_softmax(-1) + 0.4 * policies[1].log_softmax(-1)).log_softmax(-1)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-5)
    assert masked.isfinite().tolist() == [[False, False, True, True]]
    assert shared.isfinite().tolist() == [[True, False, False, True]]


def test_layouts_and_dtypes():
    ref, policies, weights, carried, aggregator, p, min_p = mixed(7, 2, 70, torch.float32, 3)
    aggregator[aggregator == LINEAR] = MAX
    expected = ops.aggregate_logits(ref, policies, weights, carried, aggregator, p, min_p)
    wide = torch.full((7, 4, 90), math.nan)
    wide[:, 0, 5:75], wide[:, 1, 5:75], wide[:, 3, 5:75] = ref, policies[0], policies[1]
    small = (weights.T.contiguous().T, carried.T.contiguous().T, aggregator, p.repeat_interleave(2)[::2], min_p)
    rows = ops.aggregate_logits(wide[:, 0, 5:75], wide[:, 1::2, 5:75].transpose(0, 1), *small)
    columns = ops.aggregate_logits(
        ref.T.contiguous().T, policies.transpose(0, 2).contiguous().transpose(0, 2), weights.double(), carried.double(),
        aggregator, p.double(), min_p.double(),
    )  # fmt: skip
    both = ops.aggregate_logits(ref.half(), policies, weights, carried, aggregator, p, min_p)
    assert torch.equal(rows, expected) and torch.equal(columns, expected) and torch.equal(both, expected)


def test_a_row_does_not_depend_on_its_batch():
    args = mixed(3, 2, 4200, torch.float32, 4)
    together = ops.aggregate_logits(*args)
    for b in (0, 2):
        row = slice(b, b + 1)
        alone = ops.aggregate_logits(args[0][row], args[1][:, row], *(each[row] for each in args[2:]))
        assert torch.equal(alone, together[row])


def test_rows_at_fault_are_nan_and_bad_values_are_named():
    ref, policies = torch.zeros(7, 40), torch.randn(2, 7, 40)
    weights = torch.tensor([[1.0, -1.0]] * 5 + [[1.0, 1.0]] * 2)
    aggregator = torch.tensor([GEOMETRIC, JENSEN_SHANNON, 6, -1, LINEAR, POWER, MAX], dtype=torch.int32)
    p, min_p = torch.full((7,), math.nan), torch.zeros(7)
    out = launcher(ref, policies, weights, None, aggregator, p, min_p)
    assert out.isnan().all(1).tolist() == [False, True, True, True, False, True, False]
    assert not out[[0, 4, 6]].isnan().any()
    for bad in (slice(1, 2), slice(2, 3), slice(5, 6)):
        with pytest.raises(PersonafastError, match="row 0|unknown code 6"):
            ops.aggregate_logits(ref[bad], policies[:, bad], weights[bad], None, aggregator[bad], p[bad], min_p[bad])
    with pytest.raises(PersonafastError, match="`min_p` of row 0 is 1.5"):
        run(ref[:1], policies[:, :1], weights[:1], LINEAR, 1.5)


def test_what_the_kernels_do_not_take():
    ref, policies, weights = torch.zeros(1, 9), torch.zeros(33, 1, 9), torch.ones(1, 33)
    with pytest.raises(BackendError, match="float64"):
        run(ref.double(), policies, weights, LINEAR)
    with pytest.raises(BackendError, match="more than 32 policies"):
        run(ref, policies, weights, LINEAR)
    assert run(ref, policies[:32], weights[:, :32], GEOMETRIC).isfinite().all()
