"""A context of fixed size feeds, rolls back and replays as a fresh forward would have it."""

import pytest
import torch
from helpers import tiny

from personafast.models.graphs import Tape
from personafast.models.static_context import BUCKET, RECORDED, StaticContext

CPU = torch.device("cpu")


def fresh(net, text):
    return net(torch.tensor([text]), attention_mask=torch.ones(1, len(text)), use_cache=False).logits[0, -1]


def check(logits, net, texts, live=None):
    for row, text in enumerate(texts):
        if live is None or bool(live[row, -1]):
            torch.testing.assert_close(logits[row], fresh(net, text), atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("recorder", [None, Tape])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_ragged_feeding_and_rollback_equal_a_fresh_forward(family, recorder):
    net, twin = tiny.model(family), tiny.model(family)
    if family == "gemma2":  # some versions of transformers let sdpa ignore the soft cap
        twin.set_attn_implementation("eager")
    context = StaticContext(net, 4, 64, CPU, recorder)
    generator = torch.Generator().manual_seed(1)
    for texts in ([[5, 6, 7, 8], [9], [10, 11]], [[12, 13], [14, 15, 16, 17, 18]]):  # one context, two texts
        context.start(texts)
        for step in range(12):
            new = 1 + step % 3
            tokens = torch.randint(3, tiny.VOCAB, (len(texts), new), generator=generator)
            live = None
            if step % 4 == 3:
                counts = torch.randint(0, new + 1, (len(texts), 1), generator=generator)
                live = torch.arange(new) >= new - counts
            logits = context.feed(tokens, 1, live)[:, 0]
            fed = tokens.tolist() if live is None else [row[on].tolist() for row, on in zip(tokens, live, strict=True)]
            texts = [text + own for text, own in zip(texts, fed, strict=True)]
            check(logits, twin, texts, live)
            back = torch.randint(0, 3, (len(texts),), generator=generator)
            context.rollback(back)
            texts = [text[: len(text) - count] for text, count in zip(texts, back.tolist(), strict=True)]
            if step == 6 and len(texts) == 3:
                context.keep(torch.tensor([2, 0]))
                texts = [texts[2], texts[0]]
        assert context.rows == len(texts)


@torch.no_grad()
def test_a_pass_is_recorded_once_for_each_length_and_step_of_columns_and_for_all_texts(monkeypatch):
    calls = []
    net = tiny.model()
    net.register_forward_pre_hook(lambda *_: calls.append(1))
    context = StaticContext(net, 2, 2 * BUCKET, CPU, Tape)
    for length in (3, 5):
        context.start([[5] * length, [6]])
        context.feed(torch.zeros(2, 0, dtype=torch.long), 1)
        for _ in range(3):
            context.feed(torch.tensor([[7], [8]]), 1)
            context.feed(torch.tensor([[7, 9], [8, 9]]), 2)
    # Two prompts, and two recordings of two calls each.
    assert len(calls) == 2 + 2 * 2 and set(context._recordings) == {((), 1, BUCKET), ((), 2, BUCKET)}
    context.start([[5] * BUCKET, [6]])
    context.feed(torch.tensor([[7], [8]]), 1)
    context.feed(torch.tensor([[7], [8]]), 1)
    assert set(context._recordings) == {((), 1, BUCKET), ((), 2, BUCKET), ((), 1, 2 * BUCKET)}
    context.feed(torch.full((2, RECORDED + 1), 5), 1)
    assert len(context._recordings) == 3


@torch.no_grad()
def test_logits_of_several_places_and_of_the_prompts_alone():
    net, twin = tiny.model(), tiny.model()
    context = StaticContext(net, 2, 64, CPU, Tape).start([[5, 6, 7], [8]])
    first = context.feed(torch.zeros(2, 0, dtype=torch.long), 1)[:, 0]
    check(first, twin, [[5, 6, 7], [8]])
    logits = context.feed(torch.tensor([[9, 10, 11], [12, 13, 14]]), 3)
    for place in range(3):
        check(logits[:, place], twin, [[5, 6, 7, 9, 10, 11][: 4 + place], [8, 12, 13, 14][: 2 + place]])


@torch.no_grad()
def test_places_of_rows_with_fewer_tokens_stand_at_the_right():
    net, twin = tiny.model(), tiny.model()
    context = StaticContext(net, 2, 64, CPU).start([[5, 6], [7]])
    context.feed(torch.zeros(2, 0, dtype=torch.long), 1)
    live = torch.tensor([[True, True], [False, True]])
    logits = context.feed(torch.tensor([[8, 9], [0, 10]]), 2, live)
    check(logits[:, 1], twin, [[5, 6, 8, 9], [7, 10]])
    torch.testing.assert_close(logits[0, 0], fresh(twin, [5, 6, 8]), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_model_that_looks_at_values_is_called_pass_by_pass():
    net, twin = tiny.model(), tiny.model()
    looks = []

    def look(module, args, kwargs):
        looks.append(int(kwargs["position_ids"].max()))

    context = StaticContext(net, 3, 64, CPU, Tape).start([[5, 6], [7], [8, 9]])
    context.feed(torch.zeros(3, 0, dtype=torch.long), 1)
    net.register_forward_pre_hook(look, with_kwargs=True)
    with pytest.warns(UserWarning, match="LlamaForCausalLM is called pass by pass: graphs: .* reads a tensor's value"):
        logits = context.feed(torch.tensor([[10], [11], [12]]), 1)[:, 0]
    check(logits, twin, [[5, 6, 10], [7, 11], [8, 9, 12]])
    context.keep(torch.tensor([2, 1]))
    logits = context.feed(torch.tensor([[13], [14]]), 1)[:, 0]
    check(logits, twin, [[8, 9, 12, 13], [7, 11, 14]])
    assert looks[-1] == 3 and not context._recordings
