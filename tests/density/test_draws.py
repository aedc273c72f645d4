"""`choose` at the ends of the unit interval, where rounding decides."""

import math

import pytest
import torch

from personafast.density.draws import choose

LAST_BELOW_ONE = 1 - 2.0**-53


def at(u, rows):
    return torch.full((rows,), u, dtype=torch.float64)


@pytest.mark.parametrize("u", [0.0, 1e-300, 2.0**-54, 0.3, LAST_BELOW_ONE, 1.0])
def test_a_token_of_probability_zero_is_never_drawn(u):
    generator = torch.Generator().manual_seed(2)
    logp = 4 * torch.randn(500, 37, generator=generator)
    possible = torch.rand(500, 37, generator=generator) < 0.4
    possible[:, 20] = True
    possible[:, [0, 36]] = False  # nothing at either end
    token = choose(torch.where(possible, logp, -math.inf), at(u, 500))
    assert ((token >= 0) & (token < 37)).all()
    assert possible.gather(1, token[:, None]).all()


def test_the_ends_of_the_interval_are_the_first_and_the_last_token_that_can_be_drawn():
    logp = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf, 0.5, -math.inf]])
    assert [int(choose(logp, at(u, 1))) for u in (0.0, 1e-300, LAST_BELOW_ONE, 1.0)] == [1, 1, 4, 4]


def test_rounding_of_the_sum_does_not_fall_to_a_negligible_last_token():
    """Shares that add up to a little less than 1 leave no gap for u to fall through."""
    logp = torch.randn(2000, 300, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logp[:, -1] = -600.0  # possible, once in 10^260 draws
    assert (logp.softmax(-1).cumsum(-1)[:, -1] < LAST_BELOW_ONE).any(), "no sum is short: the test is empty"
    assert (choose(logp, at(LAST_BELOW_ONE, 2000)) < 299).all()


def test_a_token_is_drawn_as_often_as_its_probability_says():
    logp = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64).log()
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    token = choose(logp.expand(1000, 4), u)
    assert token.bincount(minlength=4).tolist() == [100, 0, 600, 300]
