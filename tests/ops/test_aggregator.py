"""What the operators of density ratios check alike, and what they do on a GPU, where no row can be looked at."""

import math

import pytest
import torch
from helpers.backends import on

from personafast import ops
from personafast.errors import PersonafastError
from personafast.ops import _aggregator, _means

CODES = torch.tensor(list(ops.Aggregator), dtype=torch.int32)


def test_rows_at_fault_are_those_that_raise():
    nan = float("nan")
    rows = [
        (rule, weight, p)
        for rule in [-1, *(int(code) for code in ops.Aggregator), 6]
        for weight in (-0.5, 0.5)
        for p in (1.0, math.inf, nan)
    ]
    aggregator = torch.tensor([rule for rule, _, _ in rows], dtype=torch.int32)
    weights, p = torch.tensor([[1.0, weight] for _, weight, _ in rows]), torch.tensor([p for _, _, p in rows])
    fault = _aggregator.at_fault(aggregator, weights, p)
    for row, wrong in enumerate(fault.tolist()):
        one = slice(row, row + 1)
        if wrong:
            with pytest.raises(PersonafastError):
                _aggregator.rules_in_use("op", aggregator[one], weights[one], p[one])
        else:
            assert _aggregator.rules_in_use("op", aggregator[one], weights[one], p[one]) == {rows[row][0]}
    # Both unknown codes whatever the rest; a negative weight in four rules; two exponents of the power rule.
    assert fault.sum() == 2 * 6 + 4 * 3 + 2


def test_every_rule_at_once_gives_each_row_its_own():
    """As on a GPU, where all rules are computed for all rows: none may leak into the row of another."""
    g = torch.Generator().manual_seed(0)
    ref, policies = torch.randn(6, 20, generator=g), torch.randn(3, 6, 20, generator=g)
    policies[1, :, 3], policies[0, :, 4], ref[:, 5] = -math.inf, -math.inf, -math.inf
    weights = torch.tensor([1.0, 0.5, 0.0]).repeat(6, 1)
    weights[:2, 1] = -0.25  # impossible for the other rules
    policies[2, :, 0] = float("nan")  # of no weight
    p, min_p = torch.tensor([math.nan, math.inf, -1.0, math.nan, 0.0, 0.0]), torch.full((6,), 0.01)
    carried = torch.randn(6, 3, generator=g)
    logp0, logp = ref.log_softmax(-1), policies.log_softmax(-1)
    with on("torch"):
        targets = ops.aggregate_logits(ref, policies, weights, carried, CODES, p, min_p)
        scores = ops.chunk_scores(logp0, logp, weights, carried, CODES, p)
        for row in range(6):
            b = slice(row, row + 1)
            rest = weights[b], carried[b], CODES[b], p[b]
            target = ops.aggregate_logits(ref[b], policies[:, b], *rest, min_p[b])
            score = ops.chunk_scores(logp0[b], logp[:, b], *rest)
            torch.testing.assert_close(targets[b], target, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(scores[b], score, rtol=1e-6, atol=1e-6)
    assert not targets.isnan().any() and not scores.isnan().any()


def test_means_without_members_are_nothing():
    rules = {int(code) for code in ops.Aggregator}
    out = _means.join(torch.zeros(0, 6, 3), torch.zeros(0, 6, 1), CODES, torch.ones(6), rules)
    assert (out == -math.inf).all() and out.shape == (6, 3)
