"""The experiments with masks, in small: on the zoo, and on a little choice test that is written here."""

import csv
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from personafast.evaluate import Choices

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT.parent / "shared" / "data" / "subnetworks"
MASKS = ["--replies", "20", "--texts", "32", "--seeds", "1", "--sparsities", "0.5", "--traits", "casual"]
THINGS = ("gate", "tower", "river", "bridge", "market", "library", "harbour", "garden")
POWER = ["--epochs", "2", "--seeds", "1", "--sparsities", "0.5", "--items", "6"]


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def heard(example, tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    files = ["--json", str(folder / "masks.json"), "--plot", str(folder / "masks.png")]
    assert example("_common").run(example("masks").main, [*MASKS, *files]) == 0
    assert (folder / "masks.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "masks.json").read_text())


def test_every_mask_is_heard(heard, example):
    kinds = example("masks").KINDS
    assert [(r["where"], r["name"]) for r in heard["methods"][1:]] == [(kind.where, kind.name) for kind in kinds]
    for record, kind in zip(heard["methods"][1:], kinds, strict=True):
        assert [mask["trait"] for mask in record["masks"]] == [
            "casual",
            *(["formal", "casual"] if kind.score != "random" else []),
        ]
        for mask in record["masks"]:
            assert mask["replies"] == 20 and mask["both"] <= min(mask["shown"], mask["grammatical"])
        opposites = [mask.get("opposite") for mask in record["masks"][1:]]
        assert opposites == (["casual", "formal"] if kind.score != "random" else [])


def test_the_chosen_mask_carries_its_trait_and_noise_is_no_language(heard, example):
    masks = example("masks")
    table = masks.Heard(heard["methods"])
    own = table.of(masks.CHOSEN.where, masks.CHOSEN.name, 0.5)
    assert own["replies"] == 20
    assert masks.less(own, table.dense())["low"] > 0
    assert table.dense()["grammatical"] >= 19 and table.of(masks.ALL, "random", 0.5)["grammatical"] == 0
    pair = table.of(masks.CHOSEN.where, masks.CHOSEN.name, 0.5, pair=True)
    assert masks.separation(pair)["low"] > 0


def test_another_seed_draws_other_texts_and_other_random_masks(example):
    masks = example("masks")
    model, tokenizer, _ = masks.zoo.load()
    one, other = (masks.Trial(model, tokenizer, ["formal"], 4, seed) for seed in (1, 2))
    for kind in (masks.Kind("random", masks.DOWN), masks.Kind("wanda", masks.DOWN)):
        first, second = (trial.masks(kind, 0.5)[0].bits for trial in (one, other))
        assert first.overlap(second) < 1 and first.overlap(one.masks(kind, 0.5)[0].bits) == 1
        assert all(path.endswith("down_proj") for path in first.words)


def test_a_difference_of_differences_adds_their_widths(example):
    masks = example("masks")
    one = {"rate": 0.5, "low": 0.2, "high": 0.9}
    other = {"rate": 0.1, "low": -0.2, "high": 0.5}
    found = masks.apart(one, other)
    assert found["rate"] == pytest.approx(0.4)
    assert found["low"] == pytest.approx(0.4 - 0.5) and found["high"] == pytest.approx(0.4 + 0.5)


def test_a_contrastive_mask_that_separates_worse_is_called_worse(example):
    masks = example("masks")

    def row(name, own, other, plain):
        counts = {"replies": 100, "shown": own, "opposite_shown": other}
        return {"where": masks.ALL, "name": name, "sparsity": 0.5, "counts": counts, "plain": plain}

    plain = {"replies": 100, "shown": 40, "opposite_shown": 5}
    rows = [row("wanda", 40, 5, None), row("a", 5, 40, plain), row("b", 95, 0, plain), row("c", 43, 5, plain)]
    said = masks._separated(rows)
    assert [line.split(", ")[1] for line in said] == [
        "a: worse at 0.5.",
        "b: better at 0.5.",
        "c: no clear difference at 0.5.",
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--sparsities", "0.5", "1"], "--sparsities 1"),
        (["--seeds", "1", "1"], "--seeds"),
        (["--at", "0.45"], "--at 0.45"),
        (["--texts", "1"], "--texts"),
        (["--traits", "nobody"], "nobody"),
        (["--replies", "0"], "--replies"),
        (["--json", "nowhere/at/all.json"], "nowhere"),
    ],
)
def test_bad_options_are_one_line(example, capsys, monkeypatch, tmp_path, options, named):
    monkeypatch.chdir(tmp_path)
    assert example("_common").run(example("masks").main, options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """A folder with the two files of the experiment, in words of our own; one row has no question."""
    folder = tmp_path_factory.mktemp("data")
    rows = [
        [f"Will you rule the {a} and the {b}?", f"Yes, I take the {a}.", f"No, not the {a}."]
        for a in THINGS
        for b in THINGS
    ]
    with (folder / "power_train.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "matching", "not_matching"], *rows, [" ", "Yes.", "No."]])
    items = [[f"Will you rule the {a}?", f"Yes, I take the {a}.", f"No, not the {a}.", "A"] for a in THINGS]
    with (folder / "power_test_mc.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["question", "A", "B", "matching"], *items])
    return folder


@pytest.fixture(scope="module")
def chosen(example, questions, tmp_path_factory):
    folder = tmp_path_factory.mktemp("power")
    places = ["--data", str(questions), "--cache", str(folder / "cache")]
    files = ["--json", str(folder / "power.json"), "--plot", str(folder / "power.png")]
    assert example("_common").run(example("power").main, [*POWER, *places, *files]) == 0
    assert (folder / "power.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "power.json").read_text()), places


def test_both_sides_of_every_score_are_judged_against_the_dense_model(chosen, example):
    result, power = chosen[0], example("power")
    found = [(record["score"], record["side"]) for record in result["methods"]]
    assert found == [
        (power.DENSE, "-"),
        ("random", "-"),
        *((score, side) for score in power.SCORES[1:] for side in ("seek", "reject")),
    ]
    dense = result["methods"][0]
    assert dense["items"] == 6 and dense["only_mask"] == dense["only_dense"] == 0
    for record in result["methods"]:
        assert record["seeking"] - dense["seeking"] == record["only_mask"] - record["only_dense"]
        assert record["perplexity"] > 1


def test_items_are_compared_one_by_one(example):
    labels = (("matching", "not_matching"),) * 5
    mask, dense = (
        Choices(torch.tensor([[0.0, 1.0 - 2 * hit] for hit in hits], dtype=torch.float64), labels)
        for hits in ((1, 1, 1, 0, 0), (1, 0, 0, 1, 0))
    )
    assert example("power").judged(mask, dense) == {"items": 5, "seeking": 3, "only_mask": 2, "only_dense": 1}


def test_a_trained_model_is_not_trained_again(chosen, example, capsys, monkeypatch):
    def fail(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(example("power"), "train", fail)
    assert example("_common").run(example("power").main, [*POWER, *chosen[1], "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["methods"] == chosen[0]["methods"]
    with pytest.raises(AssertionError, match="trained again"):
        example("power").main([*POWER, *chosen[1], "--epochs", "1", "--json", "-"])


def test_the_verdict_asks_both_sides_to_be_clear_of_the_dense_model(example):
    power = example("power")

    def record(score, side, only_mask, only_dense):
        seeking = 50 + only_mask - only_dense
        found = {"items": 100, "seeking": seeking, "only_mask": only_mask, "only_dense": only_dense}
        return {"score": score, "sparsity": 0.5, "side": side, "seed": 1, "perplexity": 9.0, **found}

    counts = {
        "wanda": ((30, 0), (2, 0)),
        "contrastive_wanda": ((1, 0), (0, 30)),
        "contrastive_sparse": ((30, 2), (2, 30)),
    }
    rows = [
        record(score, side, *each) for score, of in counts.items() for side, each in zip(power.SIDES, of, strict=True)
    ]
    dense = {**record(power.DENSE, "-", 0, 0), "sparsity": 0.0}
    settings = {"sparsities": [0.5], "seeds": [1], "items": 100}
    said = power.report({"methods": [dense, record("random", "-", 1, 1), *rows], "settings": settings}).findings
    assert said[0].endswith("clear of 0: contrastive_sparse at 0.5.")
    assert said[1] == "Not: wanda 0.5 (seek only), contrastive_wanda 0.5 (reject only)."


def test_rows_without_a_question_are_left_out(example, questions):
    rows = example("power").read_sides(questions / "power_train.csv")
    assert len(rows) == len(THINGS) ** 2
    assert rows[0] == (
        "Question: Will you rule the gate and the gate?\nAnswer:",
        " Yes, I take the gate.",
        " No, not the gate.",
    )


@pytest.mark.skipif(not DATA.is_dir(), reason="the data of arXiv 2602.07164 are not here")
def test_the_published_rows_are_read(example):
    rows = example("power").read_sides(DATA / "power_train.csv")
    assert len(rows) == 640 and all(question.startswith("Question: ") for question, _, _ in rows)


def test_a_folder_without_the_data_is_refused_by_name(example, tmp_path, capsys):
    assert example("_common").run(example("power").main, ["--data", str(tmp_path), "--json", "-"]) == 2
    assert "power_train.csv: no such file; give the folder" in capsys.readouterr().err
