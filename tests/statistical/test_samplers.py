"""Samplers against the distributions they claim, by enumeration: 4 tokens, length 4, 256 texts, a million samples."""

import pytest
import torch
from helpers.table import Tables, p_value, rule, sample, total_variation

from personafast.density.direct import sample_direct
from personafast.density.draws import Draws, row_seed

SAMPLES = 1_000_000
BATCH = 125_000  # tables and draws of one batch stay in the cache
TABLES = Tables(policies=2)


def texts(seed, weights, aggregator, *, min_p=0.0, t=1.0, kind=Draws, eos=(), tables=TABLES, rows=SAMPLES, **more):
    """Codes of the texts of `sample_direct`, and the statistics of the last batch."""

    def run(scorer, transcript, draws):
        sample_direct(scorer, transcript, rule(transcript.alive.numel(), weights, aggregator, min_p, t), draws, **more)

    code, stats = sample(run, tables, rows, seed, batch=BATCH, kind=kind, eos=eos)
    return code, stats[-1]


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("aggregator", "weights", "min_p", "temperature"),
    [
        ("geometric", [1.0, 1.0], 0.0, 1.0),
        ("geometric", [1.0, 1.0], 0.05, 1.0),
        ("geometric", [0.7, -0.4], 0.1, 1.0),
        ("linear", [0.6, 0.4], 0.0, 1.0),
        ("linear", [0.6, 0.4], 0.2, 0.7),
    ],
)
def test_direct_draws_the_token_level_target(aggregator, weights, min_p, temperature, seed):
    expected = TABLES.joint(rule(1, weights, aggregator, min_p, temperature))
    code, _ = texts(seed, weights, aggregator, min_p=min_p, t=temperature)
    assert p_value(code, expected) > 1e-3
    assert total_variation(code, expected) < 0.008


def test_a_wrong_target_is_caught():
    """Positive control: a weight off by 2 % must fail the same test."""
    expected = TABLES.joint(rule(1, [1.0, 1.02], "geometric"))
    code, _ = texts(1, [1.0, 1.0], "geometric")
    assert p_value(code, expected) < 1e-6


def test_a_reused_uniform_is_caught():
    """Positive control: one uniform for all positions of a text makes the positions dependent."""

    class Reused(Draws):
        def uniform(self, stream, positions, n=1):
            return super().uniform(stream, torch.zeros_like(positions), n)

    expected = TABLES.joint(rule(1, [1.0, 1.0], "geometric"))
    code, _ = texts(1, [1.0, 1.0], "geometric", kind=Reused)
    assert p_value(code, expected) < 1e-6


def test_carried_weights_give_the_sequence_level_mixture():
    """With carry, a text is one draw from sum_i alpha_i pi_i over whole texts."""
    policies = [TABLES.joint(rule(1, weights, "linear")) for weights in ([1.0, 0.0], [0.0, 1.0])]
    expected = 0.3 * policies[0] + 0.7 * policies[1]
    code, _ = texts(1, [0.3, 0.7], "linear", carry=True)
    assert p_value(code, expected) > 1e-3
    reset = TABLES.joint(rule(1, [0.3, 0.7], "linear"))
    assert p_value(code, reset) < 1e-6


def test_a_process_sees_the_text_that_leads_to_a_token():
    def process(ids, scores):
        return scores - 1.5 * (torch.arange(TABLES.vocab) == ids[:, -1:])

    expected = TABLES.joint(rule(1, [1.0, 1.0], "geometric"), process, (3,))
    code, _ = texts(1, [1.0, 1.0], "geometric", eos=(3,), process=process)
    assert p_value(code, expected) > 1e-3


@pytest.mark.parametrize("vocab", [4, 9])
def test_a_ratio_is_one_on_average(vocab):
    """E_pi0[pi_i(C) / pi_0(C)] = 1, for texts of any length."""
    tables = Tables(policies=2, vocab=vocab, length=3, seed=2)
    logp = torch.zeros(3, 1, dtype=torch.float64)
    for count in range(tables.length):
        logp = (logp[..., None] + tables.members(count).double().log_softmax(-1)).flatten(1)
        ratio = rule(1, [1.0, 0.0], "linear").select(torch.zeros(logp.shape[1], dtype=torch.long))
        found = ratio.scores(logp[0, :, None].float(), logp[1:, :, None].float())[:, 0].double().exp()
        assert float((logp[0].exp() * found).sum()) == pytest.approx(1, abs=1e-5)


def test_row_seeds_differ():
    seeds = {row_seed(seed, row) for seed in range(100) for row in range(100)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)
