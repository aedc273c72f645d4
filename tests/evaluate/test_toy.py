import pytest
import torch
from helpers.table import Tables

from personafast import PersonafastError
from personafast.density.direct import sample_direct
from personafast.density.scr import ScrOptions, sample_scr
from personafast.evaluate.toy import Toy, noise, total_variation

LENGTH = 4


@pytest.fixture
def toy():
    return Toy(policies=2, vocabulary=3, order=2, seed=4, apart=0.8)


def spelled_out(toy):
    """The same toy as a table over whole prefixes, which enumerates by other means."""
    tables = Tables(policies=toy.policies, vocab=toy.vocabulary, length=LENGTH)
    for length in range(LENGTH):
        for code, prefix in enumerate(tables.prefixes(length)):
            context = 0
            for token in prefix.tolist():
                context = (context * toy.vocabulary + token) % toy.contexts
            row = tables.row(torch.tensor(code), torch.tensor(length))
            tables.logits[:, row] = toy.logits[:, context]
    return tables


def whole(tables, by_code):
    return by_code[tables.codes(tables.prefixes(LENGTH))]


@pytest.mark.parametrize("aggregator", ["linear", "geometric"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 7])
def test_the_law_is_that_of_a_table_over_prefixes(toy, aggregator, chunk):
    tables = spelled_out(toy)
    expected = whole(tables, tables.chunk_joint(toy.rule(1, aggregator), chunk))
    found = toy.chunk_law(aggregator, chunk, LENGTH)
    assert float(found.sum()) == pytest.approx(1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("aggregator", ["linear", "geometric"])
def test_tokens_that_come_before_are_summed_over(toy, aggregator):
    whole_law = toy.chunk_law(aggregator, 1, 5).view(3**2, 3**3)
    torch.testing.assert_close(toy.chunk_law(aggregator, 1, 3, start=2), whole_law.sum(dim=0))


def test_a_chunk_level_target_depends_on_the_chunk(toy):
    laws = [toy.chunk_law("geometric", chunk, LENGTH) for chunk in (1, 2, 4)]
    assert total_variation(laws[0], laws[1]) > 0.01 and total_variation(laws[1], laws[2]) > 0.01


def test_an_exact_sampler_is_off_by_the_noise_and_scr_by_more():
    toy, texts = Toy(apart=0.7), 20_000
    expected = toy.chunk_law("geometric", 1, 6, start=2)
    law, _ = toy.sampled_law(sample_direct, "geometric", 6, 2, texts=texts, seed=3, batch=7000)
    assert float(law.sum()) == pytest.approx(1)
    assert total_variation(law, expected) < 1.5 * noise(expected, texts)

    target = toy.chunk_law("geometric", 4, 6, start=2)
    law, stats = toy.sampled_law(
        lambda *parts: sample_scr(*parts, ScrOptions(chunk=4)), "geometric", 6, 2, texts=texts, seed=3
    )
    assert total_variation(law, target) > 4 * noise(target, texts), "scr has become exact: say so in the docs"
    assert sum(s.tokens for s in stats) == texts * 8


def test_what_cannot_be_enumerated_is_refused(toy):
    with pytest.raises(PersonafastError, match="max"):
        toy.chunk_law("max", 1, 2)
    with pytest.raises(PersonafastError, match="40 tokens"):
        toy.chunk_law("linear", 1, 40)
    with pytest.raises(PersonafastError, match="0 policies"):
        Toy(policies=0)
