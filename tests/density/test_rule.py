"""The target of a row: what the policy temperature does to it, and what the text so far does to a mixture."""

from dataclasses import replace

import pytest
import torch
from helpers.table import Tables, TableScorer, rule

from personafast.density.direct import sample_direct
from personafast.density.draws import Draws, Stream, row_seed
from personafast.density.rule import Rule
from personafast.density.transcript import Transcript


def test_the_policy_temperature_acts_on_rows_without_policies():
    reference = 3 * torch.randn(2, 5)
    alone = Rule(torch.zeros(2, 0), torch.zeros(2, dtype=torch.int32), torch.zeros(2), 0.5)
    target = alone.target(reference, torch.empty(0, 2, 5))
    torch.testing.assert_close(target.log_softmax(-1), (2 * reference).log_softmax(-1))


@pytest.mark.parametrize("aggregator", ["linear", "geometric"])
def test_the_policy_temperature_acts_on_plain_rows_beside_others(aggregator):
    reference, policies = 3 * torch.randn(3, 5), 3 * torch.randn(2, 3, 5)
    mixed = rule(3, [0.0, 0.0], aggregator, temperature=0.5)
    mixed.weights[1] = torch.tensor([0.0, 1.0])
    target = mixed.target(reference, policies).log_softmax(-1)
    torch.testing.assert_close(target[[0, 2]], (2 * reference[[0, 2]]).log_softmax(-1))
    torch.testing.assert_close(target[1], (2 * policies[1, 1]).log_softmax(-1))


def test_a_plain_row_at_temperature_one_keeps_its_raw_logits():
    """Processors see there what stock generate shows them."""
    reference, policies = 3 * torch.randn(3, 5), 3 * torch.randn(1, 3, 5)
    mixed = rule(3, [0.0], "geometric")
    mixed.weights[1] = 0.5
    assert torch.equal(mixed.target(reference, policies)[[0, 2]], reference[[0, 2]])
    assert rule(3, [], "linear").target(reference, policies[:0]) is reference


def test_carried_weights_follow_their_row_and_the_policy_temperature():
    """`sample_direct` with carry, against the mixture over whole texts by hand; rows end and leave the batch."""
    tables, weights, t, eos = Tables(policies=2, vocab=3, length=7, seed=4), [0.3, 0.7], 0.6, 2
    rows = 60
    seeds = [row_seed(5, row) for row in range(rows)]

    def by_hand(seed):
        text, code, mix = [], 0, torch.tensor(weights, dtype=torch.float64)
        while len(text) < tables.length and eos not in text:
            index = tables.row(torch.tensor(code), torch.tensor(len(text)))
            of = (tables.logits[1:, index].double() / t).softmax(-1)
            u = float(Draws(torch.tensor([seed])).uniform(Stream.SAMPLE, torch.tensor([len(text)]))[0, 0])
            target = (mix / mix.sum()) @ of
            token = int((target.cumsum(0) <= u).sum())
            mix = mix * of[:, token]
            text.append(token)
            code = code * tables.vocab + token
        return text

    transcript = Transcript(torch.zeros(rows, 1, dtype=torch.long), tables.length, [eos])
    target = rule(rows, weights, "linear", temperature=t)
    sample_direct(TableScorer(tables, rows), transcript, target, Draws(torch.tensor(seeds)), carry=True)
    assert transcript.alive.numel() < rows, "no row left the batch: the test is empty"
    for text, seed in zip(transcript.sequences(-1)[:, 1:].tolist(), seeds, strict=True):
        wanted = by_hand(seed)
        assert text == wanted + [-1] * (len(text) - len(wanted))


@pytest.mark.parametrize("aggregator", ["linear", "power", "jensen_shannon"])
def test_a_base_is_at_the_policy_temperature_once(aggregator):
    """b g(r) / Z with everything at temperature t is the target at temperature 1 of logits divided by t."""
    t, reference, policies = 0.6, 2 * torch.randn(3, 5), 2 * torch.randn(3, 3, 5)
    weights = [0.7, 0.3, 0.0]
    hot = replace(rule(3, weights, aggregator, 0.1, t), base=torch.tensor([2, -1, 2]))
    cold = replace(rule(3, weights, aggregator, 0.1), base=torch.tensor([2, -1, 2]))
    torch.testing.assert_close(hot.target(reference, policies), cold.target(reference / t, policies / t))


def test_rows_with_functions_are_what_they_are_alone():
    """Rows that share a function and its weights are served together, and none sees another."""

    def sum_of_squares(ratios, weights):
        return (weights.view(-1, *[1] * (ratios.dim() - 1)) * (2 * ratios).exp()).sum(0).log()

    reference, policies = torch.randn(5, 7), torch.randn(3, 5, 7)
    mixed = rule(5, [0.5, 0.2, 0.0], "linear", 0.1)
    mixed.weights[3] = torch.tensor([0.0, 0.4, 0.0])
    mixed.custom = [sum_of_squares, None, sum_of_squares, sum_of_squares, lambda ratios, weights: ratios.amax(0)]
    mixed.base = torch.tensor([-1, 2, 2, 2, -1])
    carried = torch.randn(5, 3)
    together = mixed.target(reference, policies, carried)
    scores = mixed.scores(reference, policies, carried)
    for row in range(5):
        index = torch.tensor([row])
        alone = mixed.select(index)
        torch.testing.assert_close(alone.target(reference[index], policies[:, index], carried[index])[0], together[row])
        torch.testing.assert_close(alone.scores(reference[index], policies[:, index], carried[index])[0], scores[row])
    assert not any(torch.allclose(together[0], other) for other in together[1:])
