"""`personafast eval choice`: a row for every speaker, differences over the same items, one line for what is wrong."""

import json

import pytest

from personafast.cli.loading import load_model
from personafast.evaluate import choose, perplexity, read_items
from personafast.handle import attach
from personafast.library import PersonaLibrary
from personafast.masks import build_mask, calibrate
from personafast.models.reading import TokenizedText
from personafast.persona import Persona

ITEMS = """question,A,B,matching
what is this,a ship .,yes,A
are you calm,"yes , you are calm",a pirate,B
what is law,court,sea sea sea,A
is this a sea,yes,law,B
"""


@pytest.fixture
def items(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text(ITEMS, encoding="utf-8")
    return path


def test_every_speaker_is_measured_as_the_functions_do(cli, items, checkpoint, personas, tmp_path):
    held_out = tmp_path / "held.txt"
    held_out.write_text("you are a pirate , this is law . " * 6, encoding="utf-8")
    result = cli(
        "eval", "choice", "--items", items, "--model", checkpoint, "--library", personas, "--mask", "introvert",
        "--vector", "creative=3", "--vector", "futurist=1", "--system", "you are a lawyer", "--text", held_out,
        "--window", 16, "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    names = ["dense", "mask introvert", "vectors 3 creative + 1 futurist"]
    assert [(row["speaker"], row["system"]) for row in report["rows"]] == [(n, s) for n in names for s in (False, True)]
    assert report["count"] == 4 and report["normalise"] == "token"

    net, tokenizer, _ = load_model(str(checkpoint), "auto", "cpu")
    asked = read_items(items)
    who = [None, Persona(mask="introvert"), Persona(vectors={"creative": 3.0, "futurist": 1.0})]
    rows = iter(report["rows"])
    with attach(net, PersonaLibrary.from_pretrained(personas), tokenizer=tokenizer) as handle:
        for persona in who:
            with handle.using([persona]):
                for system in (None, "you are a lawyer"):
                    row, wanted = next(rows), choose(net, tokenizer, asked, system=system)
                    found = row["labels"]["matching"]
                    assert found["rate"] == wanted.share("matching").rate and found["items"] == 4
                    assert found["margin"] == pytest.approx(wanted.margin("matching"), rel=1e-4)
                    assert ("less_dense" in found) == (row is not report["rows"][0])
                    if system is None:
                        value = perplexity(net, tokenizer, held_out.read_text(), window=16)
                        assert row["perplexity"]["value"] == pytest.approx(value.value, rel=1e-4)
    margins = [row["labels"]["matching"]["margin"] for row in report["rows"]]
    assert len({round(margin, 6) for margin in margins}) == 6  # nobody speaks as somebody else


def test_the_table_shows_what_was_asked(cli, items, checkpoint):
    result = cli("eval", "choice", "--items", items, "--model", checkpoint, "--label", "not_matching")
    assert result.exit_code == 0, result.stderr
    assert "4 items of" in result.stdout and "not_matching" in result.stdout and "dense" in result.stdout


def test_several_masks_come_with_what_they_differ_in(cli, items, checkpoint, personas, net):
    library = PersonaLibrary.from_pretrained(personas)
    other = build_mask(net, calibrate(net, [TokenizedText(list(range(30, 60)), 20)]), sparsity=0.4)
    library.add_mask("thinker", other)
    library.save_pretrained(personas)
    options = [
        "--items",
        items,
        "--model",
        checkpoint,
        "--library",
        personas,
        "--mask",
        "introvert",
        "--mask",
        "thinker",
    ]
    report = json.loads(cli("eval", "choice", *options, "--json").stdout)
    (row,) = report["mask_differences"]
    first, second = library.masks["introvert"], library.masks["thinker"]
    bits = [first.dense(path) ^ second.dense(path) for path in first.words]
    wanted = sum(int(each.sum()) for each in bits) / sum(each.numel() for each in bits)
    assert (
        (row["first"], row["second"]) == ("introvert", "thinker") and row["all"] == pytest.approx(wanted) and wanted > 0
    )
    table = cli("eval", "choice", *options).stdout
    assert "Masks differ" in table and f"{100 * wanted:.3f}" in table


def test_poles_are_counted_each(cli, tmp_path, checkpoint):
    path = tmp_path / "items.json"
    entries = [("what is this\nA. a ship .\nB. yes", "E", "I"), ("what is law\nA. court\nB. sea", "N", "S")]
    path.write_text(json.dumps([{"question": q, "A": a, "B": b} for q, a, b in entries]), encoding="utf-8")
    report = json.loads(cli("eval", "choice", "--items", path, "--model", checkpoint, "--json").stdout)
    labels = report["rows"][0]["labels"]
    assert list(labels) == ["E", "I", "N", "S"] and all(value["items"] == 1 for value in labels.values())
    assert labels["E"]["rate"] + labels["I"]["rate"] == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--normalise", "words"], "--normalise 'words'"),
        (["--label", "E"], "--label 'E': no item of"),
        (["--mask", "nobody"], "nobody"),
        (["--mask", "introvert", "--mask", "introvert"], "--mask introvert: given twice"),
        (["--vector", "creative"], "--vector 'creative'"),
        (["--text", "nowhere.txt"], "--text nowhere.txt: no such file"),
        (["--items", "nowhere.csv"], "nowhere.csv: no such file"),
    ],
)
def test_what_is_wrong_is_one_line(cli, items, checkpoint, personas, options, complaint):
    base = {"--items": items, "--model": checkpoint, "--library": personas}
    base = {key: value for key, value in base.items() if key not in options}
    result = cli("eval", "choice", *[part for pair in base.items() for part in pair], *options)
    assert result.exit_code == 2 and complaint in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and not result.stdout
