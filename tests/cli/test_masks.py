"""`personafast masks`: a file of texts becomes masks, and masks are compared and looked at."""

import json

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.masks import CalibrationText, build_mask, build_opposing_masks, calibrate

TABLE = "question,matching,not_matching\nwhat is this,yes ship sea,calm law\nare you a pirate,pirate ship,court law .\n"
RECORDS = [CalibrationText("yes ship sea", "what is this"), CalibrationText("pirate ship", "are you a pirate")]


@pytest.fixture
def table(tmp_path):
    (tmp_path / "power.csv").write_text(TABLE)
    return tmp_path / "power.csv"


@pytest.fixture
def build(cli, checkpoint, table, tmp_path):
    def run(*args):
        return cli("masks", "build", "--model", checkpoint, "--library", tmp_path / "library", *args)

    return run


def masks(tmp_path):
    return pf.PersonaLibrary.from_pretrained(tmp_path / "library").masks


def test_a_mask_is_built_into_a_library(build, table, tmp_path):
    result = build("--csv", table, "--name", "seek", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    net = tiny.model()
    expected = build_mask(net, calibrate(net, tiny.tokenizer(), RECORDS))
    found = masks(tmp_path)["seek"]
    assert found.overlap(expected) == 1.0 and facts["masks"]["seek"]["kept"] == found.kept
    assert facts["texts"] == 2
    # Another one joins it; the first stays.
    (tmp_path / "calm.txt").write_text("calm sea\ncalm law\n")
    assert build("--texts", tmp_path / "calm.txt", "--name", "calm", "--gamma", "0.2").exit_code == 0
    assert set(masks(tmp_path)) == {"seek", "calm"} and masks(tmp_path)["calm"].gamma == 0.2


def test_opposing_masks(build, table, tmp_path):
    result = build(
        "--csv", table, "--against", table, "--name", "seek", "--opposite", "reject",
        "--sparsity", "attention=0.25,mlp=0.5",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "they differ in" in result.stdout
    net, tokenizer = tiny.model(), tiny.tokenizer()
    other = [CalibrationText("calm law", "what is this"), CalibrationText("court law .", "are you a pirate")]
    expected = build_opposing_masks(
        net,
        calibrate(net, tokenizer, RECORDS),
        calibrate(net, tokenizer, other),
        sparsity={"attention": 0.25, "mlp": 0.5},
    )
    for name, mask in zip(("seek", "reject"), expected, strict=True):
        found = masks(tmp_path)[name]
        assert found.overlap(mask) == 1.0 and found.metadata == mask.metadata
    assert found.metadata["method"] == "contrastive_wanda"


def test_statistics_are_kept_and_used_again(build, table, tmp_path):
    file = tmp_path / "power.safetensors"
    first = build("--csv", table, "--against", table, "--name", "a", "--statistics", file)
    assert first.exit_code == 0, first.output
    assert file.is_file() and (tmp_path / "power.opposite.safetensors").is_file()
    again = build("--csv", table, "--name", "b", "--statistics", file, "--score", "magnitude")
    assert again.exit_code == 0 and set(masks(tmp_path)) == {"a", "not-a", "b"}
    refused = build("--csv", table, "--name", "c", "--statistics", file, "--tokens", "all")
    assert refused.exit_code == 2 and "tokens 'response' instead of 'all'" in refused.stderr


@pytest.fixture
def compared(build, table):
    assert build("--csv", table, "--against", table, "--name", "seek", "--opposite", "reject").exit_code == 0


def test_diff(cli, compared, tmp_path):
    result = cli("masks", "diff", "seek", "reject", "--library", tmp_path / "library", "--json")
    facts = json.loads(result.stdout)
    one, two = masks(tmp_path)["seek"], masks(tmp_path)["reject"]
    bits = {path: (one.dense(path), two.dense(path)) for path in one.words}
    for row in facts["modules"]:
        a, b = bits[row["path"]]
        assert row["differ"] == int((a ^ b).sum()) / a.numel()
        assert row["jaccard"] == int((a & b).sum()) / int((a | b).sum())
    total = sum(int((a ^ b).sum()) for a, b in bits.values()) / sum(a.numel() for a, _ in bits.values())
    assert facts["total"]["all"]["differ"] == pytest.approx(total)
    assert set(facts["total"]) == {"attention", "mlp", "all"}
    table = cli("masks", "diff", "seek", "reject", "--library", tmp_path / "library").stdout
    assert f"{100 * total:.3f}" in table


def test_the_picture_of_a_difference(cli, compared, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    result = cli("masks", "diff", "seek", "reject", "--library", tmp_path / "library", "--plot", tmp_path / "d.png")
    assert result.exit_code == 0, result.output
    pixels = image.imread(tmp_path / "d.png")
    assert pixels.shape[0] > 300 and pixels.shape[1] > 300 and pixels[..., :3].std() > 0.05
    unwritable = cli("masks", "diff", "seek", "reject", "--library", tmp_path / "library", "--plot", table_of(tmp_path))
    assert unwritable.exit_code == 2


def table_of(tmp_path):
    return tmp_path / "power.csv" / "d.png"


def test_inspect(cli, compared, tmp_path):
    library = tmp_path / "library"
    facts = json.loads(cli("masks", "inspect", "--library", library, "--json").stdout)
    assert set(facts) == {"seek", "reject"} and "modules" not in facts["seek"]
    facts = json.loads(cli("masks", "inspect", "--library", library, "seek", "--json").stdout)["seek"]
    mask = masks(tmp_path)["seek"]
    assert facts["kept"] == mask.kept and facts["bytes"] == sum(4 * w.numel() for w in mask.words.values())
    for row in facts["modules"]:
        assert row["kept"] == int(mask.dense(row["path"]).sum()) / row["weights"]
    assert "What seek keeps" in cli("masks", "inspect", "--library", library, "seek").stdout
    assert "reject" in cli("masks", "inspect", "--library", library).stdout


def test_what_can_be_mended_is_one_line(cli, build, table, tmp_path, monkeypatch):
    calibrations = []
    monkeypatch.setattr("personafast.masks.calibrate", lambda *_, **__: calibrations.append(1))
    for args, match in (
        (("--name", "a"), "--texts, --csv: give the persona's texts by one of them"),
        (("--name", "a", "--csv", table, "--texts", table), "by one of them"),
        (("--name", "a", "--csv", tmp_path / "a.txt"), "not a .csv file"),
        (("--name", "a", "--csv", tmp_path / "none.csv"), "none.csv: no such file"),
        (("--name", "a", "--csv", table, "--sparsity", "1.0"), "sparsity: 1.0 is not in [0, 1)"),
        (("--name", "a", "--csv", table, "--sparsity", "lm_head=0.5"), "never masked"),
        (("--name", "a", "--csv", table, "--sparsity", "half"), "expected name=number"),
        (("--name", "a", "--csv", table, "--score", "best"), "score: 'best'"),
        (("--name", "a", "--csv", table, "--score", "contrastive_sparse"), "give --against"),
        (("--name", "a", "--csv", table, "--opposite", "b"), "--opposite: names the mask of --against"),
        (("--name", "a", "--csv", table, "--statistic", "max"), "statistic: 'max'"),
        (("--name", "a", "--csv", table, "--group", "column"), "group: 'column'"),
        (("--name", "a", "--csv", table, "--gamma", "2"), "gamma: 2.0 is not in [0, 1]"),
        (("--name", "a::b", "--csv", table), "a::b"),
        (("--name", "a", "--csv", table, "--against", table, "--opposite", "a"), "is the mask's own name"),
        (("--name", "a", "--csv", table, "--containing", "zebra"), "no text whose prompt holds 'zebra'"),
    ):
        result = build(*args)
        assert result.exit_code == 2 and match in result.stderr, result.output
        assert len(result.stderr.splitlines()) == 1
    # All of it before the calibration, which may take hours.
    assert not calibrations and not (tmp_path / "library").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "here")
    assert build("--csv", table, "--name", "a").exit_code == 0
    library = tmp_path / "library"
    result = cli("masks", "diff", "a", "b", "--library", library)
    assert result.exit_code == 2 and "holds no mask 'b'; there are: a" in result.stderr
    other = tmp_path / "other"
    pf.PersonaLibrary(pf.models.anatomy.ModelShape("gpt2", 8, 1, 9)).save_pretrained(other)
    result = cli("masks", "build", "--model", "zoo", "--library", other, "--csv", table, "--name", "a")
    assert result.exit_code == 2 and "made for another model" in result.stderr
    before = torch.cat([w.flatten() for w in masks(tmp_path)["a"].words.values()])
    (tmp_path / "one.csv").write_text("\n".join(TABLE.split("\n")[:2]))
    unequal = build("--csv", table, "--against", tmp_path / "one.csv", "--name", "a")
    assert unequal.exit_code == 2 and "one.csv: 1 texts against 2" in unequal.stderr
    assert torch.equal(before, torch.cat([w.flatten() for w in masks(tmp_path)["a"].words.values()]))
