"""Rolling rows back by different counts gives what a fresh forward over the kept tokens gives."""

import pytest
import torch
from helpers import tiny

from personafast.errors import UnsupportedModelError
from personafast.models.context import RaggedContext


def fresh(net, ids):
    with torch.no_grad():
        return net(torch.tensor([ids]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "gpt_neo", "gpt_neox", "gemma2"])
def test_rollback_equals_a_fresh_forward(family):
    net = tiny.model(family)
    if family == "gemma2":
        net.config.sliding_window = 6
    generator = torch.Generator().manual_seed(1)
    texts = [[5, 6, 7, 8], [9], [10, 11]]
    context = RaggedContext(net, texts, torch.device("cpu"))
    with torch.no_grad():
        for step in range(12):
            tokens = torch.randint(3, tiny.VOCAB, (len(texts), 3), generator=generator)
            logits = context.feed(tokens, 1)[:, 0]
            texts = [text + new for text, new in zip(texts, tokens.tolist(), strict=True)]
            expected = torch.stack([fresh(net, text) for text in texts])
            torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
            counts = torch.randint(0, 3, (len(texts),), generator=generator)
            context.rollback(counts)
            texts = [text[: len(text) - int(count)] for text, count in zip(texts, counts, strict=True)]
            if step == 6:
                context.keep(torch.tensor([0, 2]))
                texts = [texts[0], texts[2]]
    # Dead columns are gathered away: the cache does not grow with what was rolled back.
    assert context._live.shape[1] <= 1.5 * max(map(len, texts)) + 12


def test_a_model_that_takes_positions_from_columns_refuses_ragged_rollback():
    net = tiny.model()
    forward = net.forward

    def without_positions(input_ids=None, attention_mask=None, past_key_values=None, use_cache=None):
        return forward(input_ids, attention_mask, past_key_values=past_key_values, use_cache=use_cache)

    net.forward = without_positions
    context = RaggedContext(net, [[3, 4, 5], [6, 7, 8]], torch.device("cpu"))
    with torch.no_grad():
        context.feed(torch.randint(3, 60, (2, 6)), 1)
    context.rollback(torch.tensor([2, 2]))
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM takes positions from the columns"):
        context.rollback(torch.tensor([1, 3]))


@torch.no_grad()
def test_rows_of_equal_length_do_not_see_what_was_rolled_back():
    """No padding at the start, so that the first dead columns are those of the rollback."""
    net = tiny.model()
    texts = [[5, 6, 7], [8, 9, 10]]
    context = RaggedContext(net, texts, torch.device("cpu"))
    context.feed(torch.tensor([[11, 12], [13, 14]]), 1)
    context.rollback(torch.tensor([0, 2]))
    logits = context.feed(torch.tensor([[15], [16]]), 1)[:, 0]
    expected = torch.stack([fresh(net, [5, 6, 7, 11, 12, 15]), fresh(net, [8, 9, 10, 16])])
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_live_columns_stay_in_order_when_dead_ones_are_gathered_away(family):
    """Rows take turns in losing almost all they were fed, so that most columns are dead somewhere."""
    net, twin = tiny.model(family), tiny.model(family)
    widths = []
    net.register_forward_pre_hook(
        lambda _, __, given: widths.append(given["attention_mask"].shape[1]), with_kwargs=True
    )
    generator = torch.Generator().manual_seed(2)
    texts = [[5, 6, 7, 8], [9], [10, 11, 12]]
    context = RaggedContext(net, texts, torch.device("cpu"))
    for step in range(9):
        tokens = torch.randint(3, tiny.VOCAB, (3, 5), generator=generator)
        logits = context.feed(tokens, 1)[:, 0]
        texts = [text + new for text, new in zip(texts, tokens.tolist(), strict=True)]
        expected = torch.stack([fresh(twin, text) for text in texts])
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
        counts = torch.tensor([5, 4, 3])
        counts[step % 3] = 0
        context.rollback(counts)
        texts = [text[: len(text) - int(count)] for text, count in zip(texts, counts, strict=True)]
    assert any(after < before for before, after in zip(widths, widths[1:], strict=False)), "nothing was gathered"
