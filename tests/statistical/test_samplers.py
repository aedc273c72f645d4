"""Samplers against the distributions they claim, by enumeration: 4 tokens, length 4, 256 texts, a million samples."""

import pytest
import torch
from helpers.table import Tables, TableScorer, p_value, rule, total_variation

from personafast.density.direct import sample_direct
from personafast.density.draws import Draws, row_seed
from personafast.density.scr import ScrOptions, sample_scr
from personafast.density.transcript import Transcript

SAMPLES = 1_000_000
BATCH = 125_000  # tables and draws of one batch stay in the cache
TABLES = Tables(policies=2)


def draws(rows, seed, kind=Draws):
    return kind(torch.randint(2**62, (rows,), generator=torch.Generator().manual_seed(seed)))


def texts(sampler, seed, weights, aggregator, *, tables=TABLES, rows=SAMPLES, min_p=0.0, t=1.0, kind=Draws, **more):
    """Codes of the sampled texts, and the statistics of the last batch."""
    codes = []
    for start in range(0, rows, BATCH):
        transcript = Transcript(torch.zeros(BATCH, 1, dtype=torch.long), tables.length, eos=())
        of_batch = draws(BATCH, seed * rows + start, kind)
        sampler(TableScorer(tables, BATCH), transcript, rule(BATCH, weights, aggregator, min_p, t), of_batch, **more)
        tokens = transcript.sequences(0)[:, 1:]
        code = torch.zeros(BATCH, dtype=torch.long)
        for j in range(tables.length):
            code = code * tables.vocab + tokens[:, j]
        codes.append(code)
    return torch.cat(codes), transcript.stats


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
    code, _ = texts(sample_direct, seed, weights, aggregator, min_p=min_p, t=temperature)
    assert p_value(code, expected) > 1e-3
    assert total_variation(code, expected) < 0.008


def test_a_wrong_target_is_caught():
    """Positive control: a weight off by 2 % must fail the same test."""
    expected = TABLES.joint(rule(1, [1.0, 1.02], "geometric"))
    code, _ = texts(sample_direct, 1, [1.0, 1.0], "geometric")
    assert p_value(code, expected) < 1e-6


def test_a_reused_uniform_is_caught():
    """Positive control: one uniform for all positions of a text makes the positions dependent."""

    class Reused(Draws):
        def uniform(self, stream, positions, n=1):
            return super().uniform(stream, torch.zeros_like(positions), n)

    expected = TABLES.joint(rule(1, [1.0, 1.0], "geometric"))
    code, _ = texts(sample_direct, 1, [1.0, 1.0], "geometric", kind=Reused)
    assert p_value(code, expected) < 1e-6


def test_carried_weights_give_the_sequence_level_mixture():
    """With carry, a text is one draw from sum_i alpha_i pi_i over whole texts."""
    policies = [TABLES.joint(rule(1, weights, "linear")) for weights in ([1.0, 0.0], [0.0, 1.0])]
    expected = 0.3 * policies[0] + 0.7 * policies[1]
    code, _ = texts(sample_direct, 1, [0.3, 0.7], "linear", carry=True)
    assert p_value(code, expected) > 1e-3
    reset = TABLES.joint(rule(1, [0.3, 0.7], "linear"))
    assert p_value(code, reset) < 1e-6


def test_scr_of_one_token_with_identical_policies_is_the_reference():
    """Policies equal to the reference: every ratio is 1, so whatever SCR accepts is a draw from the reference."""
    same = Tables(policies=1, seed=3)
    same.logits[1] = same.logits[0]
    expected = same.joint(rule(1, [1.0], "linear"))
    code, stats = texts(sample_scr, 4, [1.0], "linear", tables=same, options=ScrOptions(2, gamma=1.0, warmup=1))
    assert p_value(code, expected) > 1e-3
    assert stats.acceptance > 0.99


def test_scr_is_close_to_its_target_and_not_exact():
    """Single tokens, where the chunk-level target is the token-level one: the estimated bound leaves a bias."""
    weights, near = [0.6, 0.4], Tables(policies=2, vocab=3, length=6, near=0.5)
    expected = near.joint(rule(1, weights, "linear"))
    code, stats = texts(sample_scr, 5, weights, "linear", tables=near, options=ScrOptions(chunk=1))
    bias = total_variation(code, expected)
    print(f"scr, k = 1: TV {bias:.3f}, clipped {stats.clipped_mass:.3f}")
    assert p_value(code, expected) < 1e-6, "scr has become exact: say so in the docs"
    reference = near.joint(rule(1, [0.0, 0.0], "linear"))
    assert bias < 0.5 * total_variation(code, reference)


def test_scr_ends_a_row_at_an_eos_inside_the_chunk():
    rows = 2000
    transcript = Transcript(torch.zeros(rows, 1, dtype=torch.long), TABLES.length, eos=(3,))
    sample_scr(
        TableScorer(TABLES, rows), transcript, rule(rows, [0.5, 0.5], "linear"), draws(rows, 6), ScrOptions(warmup=1)
    )
    tokens = transcript.sequences(9)[:, 1:]
    after = (tokens == 3).long().cumsum(1) - (tokens == 3).long() > 0
    assert (tokens[after] == 9).all() and (tokens[~after] != 9).all()


def test_row_seeds_differ():
    seeds = {row_seed(seed, row) for seed in range(100) for row in range(100)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)
