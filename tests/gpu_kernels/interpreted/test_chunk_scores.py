import math

import pytest
import torch

from personafast import _triton, ops
from personafast.errors import PersonafastError
from personafast.ops import _chunk_accept, _chunk_scores, _chunk_scores_accept

INF, NAN = math.inf, math.nan
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
EXPONENTS = [-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0]
RULES = [(int(rule), p) for rule in ops.Aggregator for p in ([-1.0, 0.0, 0.5] if rule.name == "POWER" else [1.0])]


def make(B, N, k, *, carry=True, holes=False, dtype=F32, seed=0):
    """Arguments of `chunk_scores`, a rule and an exponent a row, and those that `chunk_accept` has besides."""
    g = torch.Generator().manual_seed(seed)
    ref, policy = -3 * torch.rand(B, k, generator=g), -3 * torch.rand(N, B, k, generator=g)
    weights = torch.rand(B, N, generator=g)
    rules = torch.arange(B, dtype=torch.int32) % 6
    p = torch.tensor(EXPONENTS).repeat(B)[torch.arange(B) // 6 % 7]
    if holes:
        ref[torch.rand(B, k, generator=g) < 0.15] = -INF
        policy[torch.rand(N, B, k, generator=g) < 0.15] = -INF
        weights[torch.rand(B, N, generator=g) < 0.4] = 0
    weights[(rules <= 1)[:, None] & (torch.rand(B, N, generator=g) < 0.3)] *= -1
    carried = torch.randn(B, N, generator=g) if carry else None
    accept = 2 * torch.rand(B, k, generator=g), torch.rand(B, k, generator=g).log()
    lengths = torch.randint(0, k + 1, (B,), generator=g, dtype=torch.int32)
    scores = ref.to(dtype), policy.to(dtype), weights.to(dtype), carried, rules, p.to(dtype)
    return scores, (*(x.to(dtype) for x in accept), lengths)


@pytest.mark.parametrize(
    ("B", "N", "k", "options"),
    [
        (84, 3, 5, {"holes": True}),
        (12, 4, 8, {"carry": False, "dtype": F16}),
        (6, 5, 3, {"holes": True, "dtype": BF16}),
        (6, 2, 4, {"dtype": F64}),
        (6, 0, 4, {"holes": True}),
        (2, 9, 70, {"holes": True}),
        (1, 1, 1, {}),
        (2, 2, 0, {}),
        (0, 2, 3, {}),
    ],
    ids=str,
)
def test_equals_the_reference(B, N, k, options):
    of_scores, of_accept = make(B, N, k, **options)
    expected = _chunk_scores.reference(*of_scores)
    scores, accepted = ops.chunk_scores_accept(*of_scores, *of_accept)
    assert scores.dtype == torch.float32 and accepted.dtype == torch.int32
    torch.testing.assert_close(scores, expected, rtol=2e-5, atol=2e-5)
    assert torch.equal(ops.chunk_scores(*of_scores), scores)
    kept = _chunk_accept.reference(scores, *of_accept)
    assert torch.equal(accepted, kept) and torch.equal(ops.chunk_accept(scores, *of_accept), kept)


@pytest.mark.parametrize(("rule", "p"), [*RULES, (2, -3.0), (2, 1e-3), (2, 40.0)])
def test_error_rule(rule, p):
    g = torch.Generator().manual_seed(1)
    B = 24
    ref, policy = -3 * torch.rand(B, 8, generator=g), -3 * torch.rand(4, B, 8, generator=g)
    weights, carried = torch.rand(B, 4, generator=g), 5 * torch.randn(B, 4, generator=g)
    args = ref, policy, weights, carried, torch.full((B,), rule, dtype=torch.int32), torch.full((B,), p)
    out, plain = ops.chunk_scores(*args), _chunk_scores._vectorised(*args)
    x = (policy.double() - ref.double()).cumsum(2) + carried.double().T[:, :, None]
    w = weights.double().T[:, :, None]
    name = ops.Aggregator(rule).name
    if name == "JENSEN_SHANNON":
        log_s = (w / w.sum(0) * torch.nn.functional.logsigmoid(x)).sum(0)
        exact = log_s - torch.log(-torch.expm1(log_s))
    elif name in ("MIN", "MAX"):
        exact = x.amin(0) if name == "MIN" else x.amax(0)
    elif name == "GEOMETRIC" or p == 0:
        exact = (w * x).sum(0) / (w.sum(0) if p == 0 else 1)
    else:
        exact = (w.log() + p * x).logsumexp(0) / p
    allowed = 2 * (plain.double() - exact).abs().max() + 1e-6
    assert (out.double() - exact).abs().max() <= allowed


@pytest.mark.parametrize(("rule", "p"), RULES)
def test_nan_goes_through_and_nowhere_else(rule, p):
    ref, policy, weights = torch.full((4, 3), -1.0), torch.full((2, 4, 3), -2.0), torch.ones(4, 2)
    policy[1, 0, 1], ref[1, 1], weights[3, 1], policy[1, 3] = NAN, NAN, 0, NAN
    codes = torch.full((4,), rule, dtype=torch.int32)
    scores = ops.chunk_scores(ref, policy, weights, None, codes, torch.full((4,), p))
    assert scores.isnan().tolist() == [[False, True, True], [False, True, True], [False] * 3, [False] * 3]


def test_rows_at_fault_are_nan_in_the_kernel_and_raise_on_a_cpu():
    ref, policy, weights = torch.zeros(6, 3), torch.zeros(2, 6, 3), torch.ones(6, 2)
    codes = torch.tensor([0, 7, -1, 3, 2, 1], dtype=torch.int32)
    p = torch.tensor([NAN, 1, 1, 1, INF, 1])
    weights[3, 1] = weights[5, 1] = -0.5
    accept = torch.zeros(6, 3), torch.full((6, 3), -9.0), torch.full((6,), 3, dtype=torch.int32)
    scores, accepted = _triton.chunk_scores_accept(ref, policy, weights, None, codes, p, *accept)
    assert scores.isnan().all(1).tolist() == [False, True, True, True, True, False]
    assert not scores[[0, 5]].isnan().any()
    assert accepted.tolist() == [3, 0, 0, 0, 0, 3]
    for row, message in ((1, "unknown code 7"), (3, "`weights` of row 0 hold -0.5"), (4, "`p` of row 0 is inf")):
        one = slice(row, row + 1)
        with pytest.raises(PersonafastError, match=f"chunk_scores_accept: .*{message}"):
            ops.chunk_scores_accept(
                ref[one], policy[:, one], weights[one], None, codes[one], p[one], *(x[one] for x in accept)
            )


def test_a_token_that_the_reference_cannot_propose_bars_what_follows_whatever_the_policies_say():
    ref = torch.tensor([[-1.0, -INF, -1.0]]).repeat(2, 1)
    policy = torch.tensor([[[-1.0, -INF, NAN]]]).repeat(1, 2, 1)
    codes = torch.tensor([0, 1], dtype=torch.int32)
    for weight in (1.0, 0.0):
        scores = ops.chunk_scores(ref, policy, torch.full((2, 1), weight), None, codes, torch.ones(2))
        assert scores.tolist() == [[0.0, -INF, -INF]] * 2


def test_what_accepts():
    scores = torch.tensor([[0.0, 1.0, 0.5], [-INF, NAN, 1.0], [0.0, 0.0, 0.0], [0.0, -5.0, 0.0]])
    bound = torch.tensor([[0.5, 0.5, 0.5], [-INF, 0.0, NAN], [-INF, 0.0, -INF], [0.0, 0.0, 0.0]])
    log_u = torch.full((4, 3), -0.1)
    lengths = torch.tensor([2, 3, -4, 99], dtype=torch.int32)
    assert ops.chunk_accept(scores, bound, log_u, lengths).tolist() == [2, 0, 0, 3]
    # In float32 the two are equal; where one of the three is float64 they are not.
    close = torch.tensor([[1e-9]], dtype=F64), torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, dtype=torch.int32)
    assert ops.chunk_accept(*close).tolist() == [1]
    wide = torch.ones(1, 1), torch.ones(1, 1, dtype=F64) - 1e-9, torch.zeros(1, 1), close[3]
    assert ops.chunk_accept(*wide).tolist() == [1]
    assert ops.chunk_accept(wide[0], wide[1].float(), wide[2], close[3]).tolist() == [0]


def test_every_layout_is_read_in_place():
    of_scores, of_accept = make(6, 3, 4, seed=2)
    expected = ops.chunk_scores_accept(*of_scores, *of_accept)
    ref, policy, weights, carried, rules, p = of_scores
    bound, log_u, lengths = of_accept
    found = ops.chunk_scores_accept(
        ref.T.contiguous().T,
        policy.transpose(0, 2).contiguous().transpose(0, 2),
        weights.T.contiguous().T,
        torch.cat([carried, carried], 1)[:, :3],
        rules.repeat(2, 1).T[:, 0],
        p,
        bound.T.contiguous().T,
        log_u[:, :1].expand_as(log_u),
        lengths,
    )
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], _chunk_accept.reference(found[0], bound, log_u[:, :1].expand_as(log_u), lengths))
    turned = ops.chunk_accept(expected[0].T.contiguous().T, bound, log_u, lengths)
    assert torch.equal(turned, expected[1])


def test_the_reference_is_one_after_the_other():
    of_scores, of_accept = make(6, 2, 3, seed=4)
    scores, accepted = _chunk_scores_accept.reference(*of_scores, *of_accept)
    assert torch.equal(scores, _chunk_scores.reference(*of_scores))
    assert torch.equal(accepted, _chunk_accept.reference(scores, *of_accept))
