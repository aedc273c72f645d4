"""Extraction against the formulas, written out in numpy over unpadded single texts."""

import json

import numpy as np
import pytest
import torch
from helpers import tiny
from scipy.optimize import minimize

import personafast as pf
from personafast.errors import UnsupportedModelError
from personafast.models.reading import POSITIONS, TokenizedText
from personafast.vectors import Contrast, Response, Responses, TextPairs, extract_vectors
from personafast.vectors.directions import METHODS, direction
from personafast.vectors.means import TextMeans, read_means
from personafast.vectors.reliability import reliability

QUESTIONS = ("what is this", "is this a ship", "what are you")
ANSWERS = (
    ("you are a calm lawyer .", "this is a pirate"),
    ("yes , calm", "yes"),
    ("this is law , court , law", "sea , ship , sea , pirate"),
    ("a court", "a sea w25 w26"),
    ("is this calm law w27", "is this a ship , a ship"),
    ("calm calm w28", "pirate w29 w30 w31"),
)


def chat(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def contrast():
    sides = [[chat(QUESTIONS[i % 3], pair[side]) for i, pair in enumerate(ANSWERS)] for side in (0, 1)]
    return Contrast(*sides)


def by_hand(net, texts, positions):
    """float64 [n, num_blocks - 1, hidden] from `hidden_states`, one text at a time; the last row is after the norm."""
    rows = []
    for text in texts:
        with torch.no_grad():
            states = net(torch.tensor([text.ids]), output_hidden_states=True).hidden_states[1:-1]
        prompt = len(text.ids) - text.response
        part = {
            "response_avg": slice(prompt, None),
            "prompt_avg": slice(0, prompt),
            "prompt_last": slice(prompt - 1, prompt),
            "response_last": slice(len(text.ids) - 1, None),
        }[positions]
        rows.append(torch.stack([state[0, part].double().mean(0) for state in states]))
    return torch.stack(rows).numpy()


def formula(method, x, y):
    """The direction of one block, and the same for a probe by a general minimiser."""
    if method == "mean_diff":
        return x.mean(0) - y.mean(0)
    if method == "logistic":
        rows, target = np.concatenate([x, y]), np.repeat([1.0, -1.0], [len(x), len(y)])
        z = (rows - rows.mean(0)) / rows.std(0)

        def loss(w):
            return 0.5 * w[:-1] @ w[:-1] + np.logaddexp(0, -target * (z @ w[:-1] + w[-1])).sum()

        return minimize(loss, np.zeros(z.shape[1] + 1), method="BFGS", options={"gtol": 1e-7}).x[:-1] / rows.std(0)
    centre = (x + y) / 2
    rows = x - y if method == "pca_diff" else np.concatenate([x - centre, y - centre])
    first = np.linalg.svd(rows - rows.mean(0))[2][0]
    return first if ((x - y) @ first > 0).mean() > 0.5 else -first


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@pytest.mark.parametrize("method", METHODS)
def test_directions_are_those_of_the_formulas(method):
    net, tok = tiny.model(), tiny.tokenizer()
    source = contrast()
    found = extract_vectors(net, tok, {"calm": source}, method=method, batch_size=4)["calm"].directions.double().numpy()
    x, y = (
        by_hand(net, [TokenizedText.from_chat(tok, one) for one in side], "response_avg")
        for side in (source.positive, source.negative)
    )
    for block in range(tiny.BLOCKS - 1):
        expected = formula(method, x[:, block], y[:, block])
        unit = expected / np.linalg.norm(expected)
        gap = abs(unit @ (x[:, block].mean(0) - y[:, block].mean(0)))
        np.testing.assert_allclose(found[block], unit * gap, atol=2e-5 * gap)


def test_unit_scale_keeps_the_direction():
    net, tok = tiny.model(), tiny.tokenizer()
    for method in METHODS:
        gap, unit = (
            extract_vectors(net, tok, {"calm": contrast()}, method=method, scale=scale)["calm"]
            for scale in ("gap", "unit")
        )
        torch.testing.assert_close(unit.norms, torch.ones(tiny.BLOCKS))
        torch.testing.assert_close(torch.nn.functional.normalize(gap.directions), unit.directions)


@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_every_position_is_right_whatever_the_padding(family, positions):
    net, tok = tiny.model(family), tiny.tokenizer()
    source = contrast()
    texts = [TokenizedText.from_chat(tok, one) for one in (*source.positive, *source.negative)]
    assert len({len(text.ids) for text in texts}) > 4
    expected = torch.from_numpy(by_hand(net, texts, positions)).float()
    for batch_size in (1, 5, 32):
        means = TextMeans(len(texts))
        read_means(net, texts, means, positions=positions, batch_size=batch_size)
        for block in range(tiny.BLOCKS - 1):
            torch.testing.assert_close(means.block(block), expected[:, block], atol=1e-4, rtol=1e-4)
    # What the tokenizer would pad with, and where, is its own affair.
    directions = []
    for tok.padding_side in ("left", "right"):
        directions.append(extract_vectors(net, tok, {"calm": source}, positions="response_last")["calm"].directions)
    assert torch.equal(*directions)


def test_the_mean_of_many_texts_is_summed_in_float64():
    means = TextMeans(20_000, keep=False)
    for start in range(0, 20_000, 1000):
        means.add(list(range(start, start + 1000)), torch.full((1, 1000, 1), 1.0001, dtype=torch.float64))
    assert abs(float(means.mean()) - 1.0001) < 1e-12
    assert means._means == []


def test_plain_pairs_are_read_as_they_are_written():
    net, tok = tiny.model(), tiny.tokenizer()
    source = TextPairs([a for a, _ in ANSWERS], [b for _, b in ANSWERS])
    found = extract_vectors(net, tok, {"calm": source}, positions="response_last")["calm"]
    x, y = (
        by_hand(net, [TokenizedText.from_text(tok, text) for text in side], "response_last")
        for side in (source.positive, source.negative)
    )
    expected = torch.from_numpy(x.mean(0) - y.mean(0)).float()
    torch.testing.assert_close(found.directions[:-1], expected, atol=1e-4, rtol=1e-4)


def collected(positive_scores, negative_scores, coherences=(90.0,) * 6):
    sides = []
    for side, scores in enumerate((positive_scores, negative_scores)):
        prompts = [f"<s> <user> {QUESTIONS[i % 3]} </s> <assistant> " for i in range(len(ANSWERS))]
        sides.append(
            [
                Response(prompts[i], pair[side], QUESTIONS[i % 3], scores[i], coherences[i])
                for i, pair in enumerate(ANSWERS)
            ]
        )
    return Responses(*sides)


def test_collected_responses_follow_the_rule_of_persona_vectors():
    net, tok = tiny.model(), tiny.tokenizer()
    nan = float("nan")
    # Kept: 0 and 3. Pair 1 lacks the trait, 2 has it on the wrong side, 4 is incoherent, 5 was not scored.
    source = collected((50, 49.9, 90, 80, 70, nan), (49.9, 0, 50, 10, 10, 10), (50, 90, 90, 90, 49.9, 90))
    found = extract_vectors(net, tok, {"calm": source})["calm"]
    sides = []
    for rows in (source.positive, source.negative):
        texts = []
        for row in (rows[0], rows[3]):
            prompt = tok(row.prompt, add_special_tokens=False)["input_ids"]
            whole = tok(row.prompt + row.answer, add_special_tokens=False)["input_ids"]
            texts.append(TokenizedText(whole, len(whole) - len(prompt)))
        sides.append(by_hand(net, texts, "response_avg"))
    expected = torch.from_numpy(sides[0].mean(0) - sides[1].mean(0)).float()
    torch.testing.assert_close(found.directions[:-1], expected, atol=1e-4, rtol=1e-4)
    facts = found.metadata["filter"]
    assert (facts["pairs"], facts["kept"], facts["filtered"]) == (6, 2, 4)
    assert (found.metadata["positive"], found.metadata["negative"]) == (2, 2)
    raised = {"threshold": 80.1, "coherence_threshold": 0}
    with pytest.raises(pf.PersonafastError, match="responses: none of 6 pairs passes the filter"):
        extract_vectors(net, tok, {"calm": collected((80,) * 6, (0,) * 6)}, **raised)


def test_a_judge_scores_what_comes_without_a_score():
    net, tok = tiny.model(), tiny.tokenizer()
    asked = []

    def judge(question, response, trait):
        asked.append((question, response, trait))
        return 100 if "calm" in response else 0

    source = collected((None,) * 6, (None,) * 6)
    found = extract_vectors(net, tok, {"calm": source}, judge=judge)["calm"]
    assert found.metadata["filter"]["kept"] == 4
    assert found.metadata["filter"]["judge"].endswith("judge")
    assert asked[:2] == [(QUESTIONS[0], ANSWERS[0][0], "calm"), (QUESTIONS[0], ANSWERS[0][1], "calm")]
    with pytest.raises(pf.PersonafastError, match=r"judge: traits\['calm'\] holds no responses"):
        extract_vectors(net, tok, {"calm": contrast()}, judge=judge)
    with pytest.raises(pf.PersonafastError, match="judge: returned 'high', which is no number"):
        extract_vectors(net, tok, {"calm": source}, judge=lambda *_: "high")


def test_metadata_says_where_a_vector_came_from():
    net, tok = tiny.model(), tiny.tokenizer()
    found = extract_vectors(net, tok, {"calm": contrast()}, method="pca_center")["calm"].metadata
    assert json.loads(json.dumps(found)) == found
    assert found["method"] == "pca_center" and found["positions"] == "response_avg" and found["scale"] == "gap"
    assert (found["model_type"], found["hidden_size"], found["num_blocks"]) == ("llama", tiny.HIDDEN, tiny.BLOCKS)
    assert len(found["split_half_cosine"]) == len(found["separation"]) == tiny.BLOCKS
    assert found["best_block"] == int(np.argmax(found["separation"]))
    bare = extract_vectors(net, tok, {"calm": contrast()}, statistics=False)["calm"].metadata
    assert "separation" not in bare


def test_reliability_tells_a_trait_from_noise():
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(40, 200, generator=generator) for _ in range(2))
    trait = torch.nn.functional.normalize(torch.randn(200, generator=generator), dim=0)
    cosine, effect = reliability("mean_diff", x + 8 * trait, y)
    assert cosine > 0.7 and effect > 4
    cosine, effect = reliability("mean_diff", x, y)
    assert abs(cosine) < 0.25 and abs(effect) < 0.7
    # On the texts it was made from, the same noise would seem to separate well.
    unit = torch.nn.functional.normalize(x.mean(0) - y.mean(0), dim=0)
    assert float(((x - y) @ unit).mean() / (x @ unit).std()) > 1.5
    assert reliability("pca_diff", x[:3], y[:3]) == (None, None)


def test_a_component_is_turned_to_the_side_most_pairs_are_on():
    generator = torch.Generator().manual_seed(0)
    axis = torch.zeros(16, dtype=torch.float64)
    axis[5] = 1
    y = torch.randn(9, 16, generator=generator)
    shifts = torch.tensor([5.0, 4, 6, 3, 5, 4, -9, 7, 2])
    for sign in (1, -1):
        found = direction("pca_center", y + sign * shifts[:, None] * axis, y)
        assert float(found @ axis) == pytest.approx(sign, abs=1e-6)


def test_the_probe_takes_fewer_and_more_texts_than_dimensions():
    generator = torch.Generator().manual_seed(1)
    for count in (4, 60):
        x, y = (torch.randn(count, 6, generator=generator).double() for _ in range(2))
        x[:, 2] += 2
        found = direction("logistic", x, y).numpy()
        assert cosine(found, formula("logistic", x.numpy(), y.numpy())) > 1 - 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "method: 'mean' is not one of mean_diff, pca_diff"),
        ({"positions": "last"}, "positions: 'last' is not one of response_avg"),
        ({"scale": "big"}, "scale: 'big' is not one of gap, unit"),
        ({"batch_size": 0}, "batch_size: 0 is not at least 1"),
        ({"method": "pca_diff", "statistics": False}, "statistics: pca_diff needs"),
        ({"threshold": 101}, "threshold: 101 is not in 0 to 100"),
        ({"positions": "prompt_avg"}, r"traits\['calm'\]: both sides are the same at prompt_avg"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(pf.PersonafastError, match=message):
        extract_vectors(tiny.model(), tiny.tokenizer(), {"calm": contrast()}, **options)


def test_sources_that_cannot_be_are_refused_by_name():
    net, tok = tiny.model(), tiny.tokenizer()
    both = contrast()
    for method in ("pca_diff", "pca_center"):
        with pytest.raises(pf.PersonafastError, match=rf"traits\['calm'\]: 6 positive and 5 .* {method} needs pairs"):
            extract_vectors(net, tok, {"calm": Contrast(both.positive, both.negative[1:])}, method=method)
    for method in ("pca_diff", "pca_center", "logistic"):
        with pytest.raises(pf.PersonafastError, match=rf"traits\['calm'\], block 0: method '{method}': one text"):
            extract_vectors(net, tok, {"calm": Contrast(both.positive[:1], both.negative[:1])}, method=method)
    empty = Contrast(both.positive, [chat("what is this", "yes")[:1]] * 6)
    with pytest.raises(pf.PersonafastError, match="last message must be the assistant"):
        extract_vectors(net, tok, {"calm": empty})
    with pytest.raises(pf.PersonafastError, match="pairs: 2 positive and 1 negative"):
        TextPairs(["a", "b"], ["c"])
    with pytest.raises(pf.PersonafastError, match="pairs: negative text 1 is empty"):
        TextPairs(["a", "b"], ["c", " "])
    with pytest.raises(pf.PersonafastError, match="responses: positive row 0 has an empty answer"):
        Responses([Response("a", "")], [Response("a", "b")])
    with pytest.raises(pf.PersonafastError, match=r"traits\['calm'\]: int is no source"):
        extract_vectors(net, tok, {"calm": 3})
    with pytest.raises(pf.PersonafastError, match=r"traits\['calm'\]: positive texts, text 0: .*prompt has no tokens"):
        extract_vectors(net, tok, {"calm": TextPairs(["a"], ["law"])}, positions="prompt_last")
    same = TextPairs(["a ship", "a court"], ["w30 ship", "w30 ship"])
    with pytest.raises(pf.PersonafastError, match=r"block 0: method 'pca_diff': the pairs' differences do not vary"):
        extract_vectors(net, tok, {"calm": TextPairs(["a ship"] * 2, ["a court"] * 2)}, method="pca_diff")
    assert extract_vectors(net, tok, {"calm": same})["calm"].norms.all()


def test_activations_that_are_not_finite_are_refused_by_text_and_block():
    net, tok = tiny.model(), tiny.tokenizer()
    with torch.no_grad():
        net.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(pf.PersonafastError, match=r"traits\['calm'\]: positive texts, text \d: NaN .* block 1"):
        extract_vectors(net, tok, {"calm": contrast()})
    assert not any(module._forward_hooks for module in net.modules())


def test_a_model_that_is_not_understood_is_refused_by_class():
    with pytest.raises(UnsupportedModelError, match="Linear has no `config`"):
        extract_vectors(torch.nn.Linear(2, 2), tiny.tokenizer(), {"calm": contrast()})


def test_dropout_is_off_meanwhile():
    net, tok = tiny.model("gpt2"), tiny.tokenizer()
    expected = extract_vectors(net, tok, {"calm": contrast()})["calm"].directions
    net.train()
    assert torch.equal(extract_vectors(net, tok, {"calm": contrast()})["calm"].directions, expected)
    assert net.training
