"""`sample_mixture` by enumeration: the chunk-level mixture, which depends on the chunk, and the sequence-level one."""

import pytest
import torch
from helpers.table import Tables, p_value, rule, sample, total_variation

from personafast.density.draws import Draws, Stream
from personafast.density.mixture import sample_mixture

SAMPLES = 1_000_000
BATCH = 125_000
TABLES = Tables(policies=3)
WEIGHTS = [0.6, 0.3, 0.3]  # sum to 1.2: shares are what counts


def run_mixture(*, weights=WEIGHTS, min_p=0.0, t=1.0, **more):
    def run(scorer, transcript, draws):
        sample_mixture(scorer, transcript, rule(transcript.alive.numel(), weights, "linear", min_p, t), draws, **more)

    return run


def laws(min_p, t):
    """Every policy's own distribution, masked by its own largest probability."""
    found = []
    for count in range(TABLES.length):
        law = (TABLES.members(count)[1:].double() / t).softmax(-1)
        law = torch.where(law >= min_p * law.amax(-1, keepdim=True), law, 0.0)
        found.append(law / law.sum(-1, keepdim=True))
    return found


def expected(chunk, eos=(), min_p=0.0, t=1.0):
    return TABLES.by_code(TABLES.mixture_joint(WEIGHTS, chunk, laws(min_p, t)), eos)


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("chunk", "more"),
    [
        (1, {}),
        (2, {"eos": (3,)}),
        (3, {"min_p": 0.3, "t": 0.7}),
        pytest.param(2, {}, marks=pytest.mark.slow),
        pytest.param(7, {"eos": (0,), "min_p": 0.05}, marks=pytest.mark.slow),
    ],
)
def test_chunks_come_from_one_policy_each(chunk, more, seed):
    more = dict(more)
    eos = more.pop("eos", ())
    code, _ = sample(run_mixture(chunk=chunk, **more), TABLES, SAMPLES, seed, batch=BATCH, eos=eos)
    assert p_value(code, expected(chunk, eos, **more)) > 1e-3
    assert total_variation(code, expected(chunk, eos, **more)) < 0.01
    if not (eos or more):
        assert p_value(code, expected(chunk + 1)) < 1e-6, "the target depends on the chunk"


def test_single_tokens_are_the_token_level_target():
    torch.testing.assert_close(expected(1), TABLES.joint(rule(1, WEIGHTS, "linear")), atol=1e-7, rtol=1e-5)
    torch.testing.assert_close(expected(2), TABLES.chunk_joint(rule(1, WEIGHTS, "linear"), 2), atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_carried_policy_writes_the_whole_text(chunk):
    code, _ = sample(run_mixture(chunk=chunk, carry=True), TABLES, SAMPLES, 1, batch=BATCH, eos=(2,))
    assert p_value(code, expected(TABLES.length, (2,))) > 1e-3


def test_a_carried_text_does_not_depend_on_the_chunk():
    options = {"tables": TABLES, "rows": 20_000, "seed": 3, "batch": 20_000, "eos": (2,)}
    found = [sample(run_mixture(chunk=chunk, carry=True), **options)[0] for chunk in (1, 2, 7)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("carry", [False, True])
def test_a_text_does_not_depend_on_its_batch(carry):
    every = torch.randint(2**62, (3000,), generator=torch.Generator().manual_seed(1))

    def sampled(batch):
        starts = iter(range(0, 3000, batch))

        class Of(Draws):
            def __init__(self, seeds):
                start = next(starts)
                super().__init__(every[start : start + seeds.numel()])

        run = run_mixture(chunk=2, carry=carry, min_p=0.1)
        return sample(run, TABLES, 3000, 0, batch=batch, eos=(3,), kind=Of)[0]

    assert torch.equal(sampled(3000), sampled(170))


@pytest.mark.parametrize("member", [0, 2])
def test_one_hot_weights_give_that_policy(member):
    weights = [float(i == member) for i in range(3)]
    code, stats = sample(run_mixture(weights=weights, chunk=3), TABLES, 250_000, 1, batch=BATCH)
    assert p_value(code, TABLES.by_code(TABLES.mixture_joint(weights, 1))) > 1e-3
    assert stats[0].tokens_per_round == pytest.approx(2)


class OneNumber(Draws):
    """The policy and its first token by one uniform."""

    def uniform(self, stream, positions, n=1):
        return super().uniform(Stream.SAMPLE if stream == Stream.MEMBER else stream, positions, n)


class OnePolicy(Draws):
    """The policy that was drawn for the first chunk writes the others too."""

    def uniform(self, stream, positions, n=1):
        return super().uniform(stream, torch.zeros_like(positions) if stream == Stream.MEMBER else positions, n)


@pytest.mark.parametrize("mistake", [OneNumber, OnePolicy])
def test_mistakes_are_caught(mistake):
    """Positive controls."""
    code, _ = sample(run_mixture(chunk=2), TABLES, 500_000, 1, batch=BATCH, kind=mistake)
    assert p_value(code, expected(2)) < 1e-6
