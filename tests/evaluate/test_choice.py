"""Choices are those of the length-normalised log-probabilities, and shares are counted by label."""

import math

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.evaluate import ChoiceItem, Choices, choose, paired_difference, perplexity
from personafast.models.reading import chat_ids

ITEMS = [
    ChoiceItem("what is this", ("a ship .", "yes"), ("E", "I")),
    ChoiceItem("are you calm", ("yes , you are calm", "a pirate , a lawyer"), ("I", "E")),
    ChoiceItem("what is law", ("court", "sea sea sea"), ("S", "N")),
]


def by_hand(net, tok, item, answer, system=None):
    head = [] if system is None else [{"role": "system", "content": system}]
    prompt = chat_ids(tok, [*head, {"role": "user", "content": item.question}])
    reply = tok(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logp = net(torch.tensor([prompt + reply])).logits[0].double().log_softmax(-1)
    return [float(logp[len(prompt) - 1 + place, token]) for place, token in enumerate(reply)]


@pytest.mark.parametrize("system", [None, "you are a pirate"])
@pytest.mark.parametrize("normalise", ["token", "character", "none"])
def test_scores_are_the_formula(normalise, system):
    net, tok = tiny.model(), tiny.tokenizer()
    done = []
    found = choose(
        net, tok, ITEMS, system=system, normalise=normalise, batch_size=4, on_items=lambda count: done.append(count)
    )
    assert done == [2, 3]
    for item, scores in zip(ITEMS, found.scores.tolist(), strict=True):
        for answer, score in zip(item.answers, scores, strict=True):
            values = by_hand(net, tok, item, answer, system)
            size = {"token": len(values), "character": len(answer), "none": 1}[normalise]
            assert score == pytest.approx(sum(values) / size, rel=1e-4)


def test_length_matters_only_without_the_normalisation():
    net, tok = tiny.model(), tiny.tokenizer()
    item = ChoiceItem("what is this", ("sea", "sea sea sea sea sea sea"), ("short", "long"))
    plain, per_token = (choose(net, tok, [item], normalise=name) for name in ("none", "token"))
    assert plain.chosen == ["short"]
    assert per_token.scores[0, 1] > 2 * plain.scores[0, 1] / 6 - 1


def test_without_a_template_a_question_is_put_as_text():
    net, tok = tiny.model(), tiny.tokenizer()
    tok.chat_template = None
    found = choose(net, tok, ITEMS[:1])
    prompt, reply = tok("Question: what is this\nAnswer:")["input_ids"], tok(" yes")["input_ids"]
    with torch.no_grad():
        logp = net(torch.tensor([prompt + reply])).logits[0].double().log_softmax(-1)
    assert float(found.scores[0, 1]) == pytest.approx(float(logp[-2, reply[-1]]), rel=1e-4)
    with pytest.raises(pf.PersonafastError, match="system: this tokenizer has no chat template"):
        choose(net, tok, ITEMS, system="you are calm")


def test_shares_margins_and_paired_differences():
    labels = (("E", "I"), ("I", "E"), ("E", "I"), ("S", "N"))
    first = Choices(torch.tensor([[0.0, -1.0], [0.0, -1.0], [-2.0, -1.0], [0.0, -1.0]]).double(), labels)
    second = Choices(torch.tensor([[0.0, -1.0], [-1.0, 0.0], [0.0, 0.0], [0.0, -1.0]]).double(), labels)
    assert first.chosen == ["E", "I", "I", "S"] and second.chosen == ["E", "E", None, "S"]
    assert first.share("I").rate == pytest.approx(2 / 3) and first.share("N").rate == 0
    assert first.margin("I") == pytest.approx((-1 + 1 + 1) / 3)
    assert second.less(first, "E") == paired_difference(1, 0, 3)
    # A tie is nobody's.
    assert second.hits("I") == [False, False, False]
    with pytest.raises(pf.PersonafastError, match="no item has 'X'; there are E, I, N, S"):
        first.share("X")


def test_bad_calls_are_refused():
    net, tok = tiny.model(), tiny.tokenizer()
    with pytest.raises(pf.PersonafastError, match="normalise: 'length' is not one of"):
        choose(net, tok, ITEMS, normalise="length")
    with pytest.raises(pf.PersonafastError, match="has no tokens"):
        choose(net, tok, [ChoiceItem("what is this", ("yes", " "), ("E", "I"))])


def test_perplexity_is_that_of_windows_scored_alone():
    net, tok = tiny.model(), tiny.tokenizer()
    words = " ".join(["you are a pirate , this is law .", "what is a ship"] * 3)
    found = perplexity(net, tok, [words, "yes , calm"], window=8, batch_size=2)
    total, count = 0.0, 0
    for text in (words, "yes , calm"):
        ids = tok(text)["input_ids"]
        for start in range(0, len(ids), 8):
            part = ids[start : start + 8]
            with torch.no_grad():
                logp = net(torch.tensor([part])).logits[0].double().log_softmax(-1)
            total += sum(float(logp[place - 1, part[place]]) for place in range(1, len(part)))
            count += len(part) - 1
    assert found.tokens == count and found.value == pytest.approx(math.exp(-total / count), rel=1e-4)
    assert found.low < found.value < found.high
    assert perplexity(net, tok, "yes , calm") == pytest.approx((perplexity(net, tok, "yes , calm").value,) * 3 + (2,))
    for bad in ("", "yes"):
        with pytest.raises(pf.PersonafastError, match="fewer than two tokens"):
            perplexity(net, tok, bad)
    with pytest.raises(pf.PersonafastError, match="window: 1"):
        perplexity(net, tok, words, window=1)
