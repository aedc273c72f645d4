import json
import re

import pytest
import torch
from helpers import tiny

from personafast.errors import PersonafastError
from personafast.evaluate import wilson
from personafast.evaluate.demo import METHOD_NAMES, measure

QUESTIONS = ["what is this sea", "is this a ship", "are you calm", "what is law", "is this a court", "yes"]


class Says:
    """A trait that shows wherever one of its words does."""

    def __init__(self, prompt, *words):
        self.prompt = prompt
        self.pattern = re.compile("|".join(rf"\b{word}\b" for word in words))

    def detect(self, text):
        return bool(self.pattern.search(text))

    def spans(self, text):
        return [match.span() for match in self.pattern.finditer(text)]


TRAITS = {
    "formal": Says("you are a lawyer", *(f"w{index}" for index in range(0, 40, 2))),
    "warm": Says("you are calm", *(f"w{index}" for index in range(1, 40, 2))),
}


@pytest.fixture(scope="module")
def parts():
    net = tiny.model()
    library = tiny.library(net, masks=False)
    for name in TRAITS:
        library.add_vector(name, torch.randn(tiny.BLOCKS, tiny.HIDDEN, generator=torch.Generator().manual_seed(1)))
    library.add_mask("warm", tiny.library(net).masks["introvert"])
    return net, tiny.tokenizer(), library


def run(parts, **changes):
    settings = {
        "chosen": ["formal", "warm"],
        "traits": TRAITS,
        "questions": QUESTIONS,
        "is_grammatical": lambda text: len(text) % 2 == 0,
        "max_new_tokens": 8,
        **changes,
    }
    return measure(*parts, **settings)


@pytest.fixture(scope="module")
def result(parts):
    return run(parts)


def test_the_object_has_the_promised_shape(result):
    assert set(result) == {"chosen", "settings", "methods"}
    assert result["chosen"] == ["formal", "warm"]
    assert tuple(method["name"] for method in result["methods"]) == METHOD_NAMES
    for method in result["methods"]:
        assert set(method) == {
            "name", "traits", "joint", "grammar", "tokens_per_s", "forwards_per_token", "samples",
        }  # fmt: skip
        assert list(method["traits"]) == result["chosen"]
        for share in (*method["traits"].values(), method["joint"]):
            assert set(share) == {"rate", "low", "high"} and 0 <= share["low"] <= share["rate"] <= share["high"] <= 1
        assert 0 <= method["grammar"] <= 1 and method["tokens_per_s"] > 0
        assert len(method["samples"]) == 2
    assert json.loads(json.dumps(result)) == result


def test_counts_come_from_the_detectors(parts):
    everything = run(parts, samples=len(QUESTIONS))
    for method in everything["methods"]:
        texts = [sample["reply"] for sample in method["samples"]]
        shown = [[TRAITS[name].detect(text) for name in ("formal", "warm")] for text in texts]
        assert method["joint"] == wilson(sum(map(all, shown)), len(texts))._asdict()
        assert method["traits"]["warm"] == wilson(sum(row[1] for row in shown), len(texts))._asdict()
        assert method["grammar"] == sum(len(text) % 2 == 0 for text in texts) / len(texts)
        for sample in method["samples"]:
            for start, end in sample["spans"]["formal"]:
                assert re.fullmatch(r"w\d*[02468]", sample["reply"][start:end])


def test_a_forward_is_one_row_of_one_model(result):
    forwards = {method["name"]: method["forwards_per_token"] for method in result["methods"]}
    # A policy alone and a mixture do not depend on the reference; a product of ratios does.
    expected = {"reference": 1, "policy": 1, "vectors": 1, "mask": 1, "merge": 1, "linear": 2, "prompt": 3, "direct": 3}
    assert {name: forwards[name] for name in expected} == pytest.approx(expected)


def test_the_seed_decides_everything_but_the_timing(parts, result):
    def texts(found):
        return [sample["reply"] for method in found["methods"] for sample in method["samples"]]

    assert texts(run(parts)) == texts(result)
    assert texts(run(parts, seed=1)) != texts(result)


def test_every_method_says_something_else(result):
    replies = {method["name"]: tuple(sample["reply"] for sample in method["samples"]) for method in result["methods"]}
    assert len(set(replies.values())) == len(METHOD_NAMES)


def test_the_model_is_as_before(parts):
    net, tokenizer, _ = parts
    batch = tokenizer(QUESTIONS[0], return_tensors="pt")["input_ids"]
    before = net(batch).logits
    run(parts)
    assert torch.equal(net(batch).logits, before)


def test_progress_names_every_method(parts):
    seen = []
    run(parts, progress=seen.append)
    assert tuple(seen) == METHOD_NAMES


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"chosen": ["formal", "nobody"]}, "'nobody'"),
        ({"chosen": ["formal", "formal"]}, "two"),
        ({"questions": []}, "questions"),
        ({"traits": {**TRAITS, "creative": TRAITS["warm"]}, "chosen": ["formal", "creative"]}, "policy for 'creative'"),
    ],
)
def test_what_cannot_be_measured_is_refused(parts, changes, complaint):
    with pytest.raises(PersonafastError, match=complaint):
        run(parts, **changes)
