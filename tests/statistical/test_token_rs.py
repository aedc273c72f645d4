"""`sample_token_rs` by enumeration: exact with a valid bound, whatever its cap, and not with a smaller one."""

import pytest
import torch
from helpers.table import Tables, p_value, rule, sample, total_variation

from personafast.density import token_rs
from personafast.density.draws import Draws, Stream
from personafast.density.token_rs import sample_token_rs

SAMPLES = 1_000_000
BATCH = 125_000
TABLES = Tables(policies=2, near=0.8)


def run_rs(target, *, min_p=0.0, t=1.0, base=None, **more):
    def run(scorer, transcript, draws):
        of_rows = rule(transcript.alive.numel(), *target, min_p, t)
        if base is not None:
            of_rows.base = torch.full_like(transcript.alive, base)
        sample_token_rs(scorer, transcript, of_rows, draws, **more)

    return run


def no_repeats(ids, scores):
    return scores - 1.5 * (torch.arange(TABLES.vocab) == ids[:, -1:])


def wanted(target, *, min_p=0.0, t=1.0, base=None, process=None, eos=()):
    one = rule(1, *target, min_p, t)
    one.base = None if base is None else torch.tensor([base])
    return TABLES.joint(one, process, eos)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("target", "retries", "eos", "more"),
    [
        (([1.0, 1.0], "geometric"), 16, (), {"min_p": 0.05}),
        (([0.6, 0.4], "linear"), 2, (3,), {"process": no_repeats}),
        (([1.0, 0.0], "geometric"), 8, (), {"base": 1, "t": 0.8}),
        pytest.param(([0.7, -0.4], "geometric"), 1, (0,), {"min_p": 0.3}, marks=pytest.mark.slow),
    ],
)
def test_texts_follow_the_target(target, retries, eos, more, seed):
    expected = wanted(target, eos=eos, **more)
    code, (stats, *_) = sample(run_rs(target, retries=retries, **more), TABLES, SAMPLES, seed, batch=BATCH, eos=eos)
    assert p_value(code, expected) > 1e-3
    assert total_variation(code, expected) < 0.01
    assert stats.accepted + stats.exact == stats.tokens
    assert stats.accepted <= stats.proposed <= retries * stats.tokens


def test_acceptance_is_one_over_the_bound():
    one = Tables(policies=2, length=1, seed=4)
    target = ([1.0, 1.0], "geometric")
    _, (stats,) = sample(run_rs(target, retries=200), one, 40_000, 1, batch=40_000)
    m = float((one.law(rule(1, *target), 0)[0] / one.logits[0, 0].double().softmax(-1)).max())
    assert stats.exact == 0 and stats.accepted == 40_000
    assert abs(stats.acceptance - 1 / m) < 4 * ((1 / m) * (1 - 1 / m) / stats.proposed) ** 0.5


def test_identical_policies_accept_everything():
    same = Tables(policies=2, seed=3)
    same.logits[1:] = same.logits[0]
    _, (stats,) = sample(run_rs(([0.8, 0.7], "geometric")), same, 20_000, 1, batch=20_000)
    assert stats.acceptance > 1 - 1e-4


class Reused(Draws):
    """The uniform that proposes a token also accepts it."""

    def uniform(self, stream, positions, n=1):
        u = super().uniform(stream, positions, n)
        return u[:, ::2].repeat_interleave(2, dim=1) if stream == Stream.RETRY else u


def a_small_bound(ratios):
    """What a bound may be that is taken from ratios seen before: two thirds of what it should be."""
    return ratios.amax(dim=-1, keepdim=True) - 0.4


def shifted_ratios(log_q, log_b):
    return (log_q - log_b).roll(1, dims=1)


@pytest.mark.parametrize(
    "mistake", [{"_log_bound": a_small_bound}, {"_log_ratios": shifted_ratios}, Reused], ids=["bound", "ratios", "u"]
)
def test_mistakes_are_caught(mistake, monkeypatch):
    """Positive controls."""
    more = {}
    if mistake is Reused:
        more["kind"] = mistake
    else:
        for name, function in mistake.items():
            monkeypatch.setattr(token_rs, name, function)
    target = ([1.0, 1.0], "geometric")
    code, _ = sample(run_rs(target, retries=12), TABLES, 250_000, 1, batch=BATCH, **more)
    assert p_value(code, wanted(target)) < 1e-6
