"""Every experiment, in small, in this process."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from personafast import Persona

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "tone": ["--replies", "3"],
    "chunk_size": ["--replies", "3", "--texts", "400"],
    "reference_swap": ["--replies", "2"],
}
STEERING = ["--replies", "16", "--coefficients", "0", "3", "6", "--at", "3"]
FIGURES = {
    "name",
    "how",
    "traits",
    "joint",
    "joint_count",
    "shown",
    "grammar",
    "tokens",
    "forwards_per_token",
    "tokens_per_round",
    "acceptance",
    "clipped_mass",
    "sample",
    "timing",
}


@pytest.fixture(scope="module")
def example():
    """Imports a file of examples/, whose folder is on the path as it is for a script there."""
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def results(example, tmp_path_factory):
    """What each experiment writes, by its name, and the folder it is in."""
    folder = tmp_path_factory.mktemp("results")
    for name, options in {**SMALL, "steering": STEERING}.items():
        files = ["--json", str(folder / f"{name}.json"), "--plot", str(folder / f"{name}.png")]
        assert example("_common").run(example(name).main, [*options, "--repeats", "1", *files]) == 0
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in (*SMALL, "steering")}, folder


def without_clock(value):
    if isinstance(value, dict):
        return {key: without_clock(each) for key, each in value.items() if key not in ("timing", "machine")}
    return [without_clock(each) for each in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", SMALL)
def test_the_json_holds_every_method_and_the_plot_is_drawn(results, example, name):
    result, folder = results[0][name], results[1]
    assert result["experiment"] == name
    traits = result["settings"]["traits"]
    assert [record["name"] for record in result["methods"]] == [m.name for m in example(name).methods(traits)]
    for record in result["methods"]:
        assert set(record) == FIGURES and list(record["traits"]) == traits
        assert 0 <= record["joint"]["low"] <= record["joint"]["rate"] <= record["joint"]["high"] <= 1
        assert record["tokens"] > 0 and record["sample"] and record["timing"]["tokens_per_s"] > 0
        assert (record["clipped_mass"] is None) == ("scr" not in record["name"])
    direct = next(record for record in result["methods"] if record["name"] == "direct")
    assert direct["timing"]["relative_to_direct"] == pytest.approx(1)
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_measured_makes_sense(results):
    of = {name: {record["name"]: record for record in result["methods"]} for name, result in results[0].items()}
    assert of["tone"]["reference"]["forwards_per_token"] == pytest.approx(1, abs=0.3)
    assert of["tone"]["direct"]["forwards_per_token"] == pytest.approx(3, abs=0.5)
    assert of["tone"]["only formal"]["traits"]["formal"]["rate"] == 1
    assert of["chunk_size"]["block k=8"]["tokens_per_round"] > of["chunk_size"]["block k=1"]["tokens_per_round"]
    assert of["reference_swap"]["block: formal"]["tokens_per_round"] > 2
    toy = {(row["rule"], row["k"]): row for row in results[0]["chunk_size"]["toy"]}
    assert len(toy) == 8
    for rule in ("linear", "geometric"):
        assert toy[rule, 1]["target_from_token_level"] == pytest.approx(0, abs=1e-9)
        assert toy[rule, 8]["target_from_token_level"] > toy[rule, 2]["target_from_token_level"]
        assert all(toy[rule, k]["block"] < 2 * toy[rule, k]["noise"] for k in (1, 2, 4, 8))


def test_steering_turns_a_trait_up_until_the_text_collapses(results, example):
    result, folder = results[0]["steering"], results[1]
    assert (folder / "steering.png").read_bytes().startswith(b"\x89PNG")
    curves = {side: [r for r in result["methods"] if r["side"] == side] for side in ("curious", "cautious", "blend")}
    assert all([record["coefficient"] for record in curve] == [0, 3, 6] for curve in curves.values())
    assert all(set(record) == FIGURES - {"timing"} | {"side", "coefficient"} for record in result["methods"])
    # Nothing is added at 0, whatever it is called.
    assert len({curve[0]["sample"] for curve in curves.values()}) == 1
    for trait in ("curious", "cautious"):
        shown = [record["shown"][trait] for record in curves[trait]]
        assert shown == sorted(shown) and shown[0] < shown[2]
        assert curves["blend"][1]["shown"][trait] > curves[trait][1]["shown"][trait]
    assert curves["blend"][0]["grammar"]["rate"] == 1 and curves["blend"][2]["grammar"]["rate"] < 0.2
    steering = example("steering")
    assert len(steering.before_collapse(curves["blend"])) < 3
    first = example("_common").conditions(result)
    assert "speed" not in first and "16 replies" in first


def test_a_step_down_of_a_curve_is_named_unless_it_may_be_chance(example):
    steering = example("steering")
    steps = [{"coefficient": c, "shown": {"vivid": n}} for c, n in ((1, 50), (2, 48), (3, 20), (4, 90))]
    assert steering.falls(steps, "vivid", 100) == ["vivid from 2 to 3"]


def test_the_coefficient_of_the_comparison_has_to_be_measured(example, capsys):
    common = example("_common")
    assert common.run(example("steering").main, ["--coefficients", "1", "2", "--at", "3"]) == 2
    assert "--at 3: not one of --coefficients" in capsys.readouterr().err


def test_the_same_seed_gives_the_same_json_but_for_the_clock(results, example, capsys):
    args = [*SMALL["reference_swap"], "--repeats", "1", "--json", "-"]
    assert example("_common").run(example("reference_swap").main, args) == 0
    assert without_clock(json.loads(capsys.readouterr().out)) == without_clock(results[0]["reference_swap"])


def test_another_seed_gives_other_replies(example):
    common, persona = example("_common"), Persona(policies={"warm": 1.0})
    samples = set()
    for seed in (0, 1, 2):
        method = common.Method("direct", "", persona)
        samples.add(common.Stage(["warm"], 1, seed).measure([method], 1, lambda what: None)[0]["sample"])
    assert len(samples) == 3


def test_an_exact_sampler_that_writes_something_else_is_not_timed(example):
    common = example("_common")
    rows = [
        common.Method("direct", "", Persona(policies={"warm": 1.0})),
        common.Method("block", "", Persona(policies={"formal": 1.0}), "block", exact=True),
    ]
    stage = common.Stage(["formal", "warm"], 1, 0)
    found = stage._reply
    # A sampler that speaks as somebody else.
    stage._reply = lambda handle, method, batch, sampling=True: found(
        handle, rows[0] if method.name == "block" and not sampling else method, batch, sampling
    )
    with pytest.raises(RuntimeError, match="block: without sampling"):
        stage.measure(rows, 1, lambda what: None)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--replies", "0"], "--replies"),
        (["--repeats", "0"], "--repeats"),
        (["--seed", "-1"], "--seed"),
        (["--traits", "formal", "nobody"], "nobody"),
        (["--traits", "formal", "casual"], "casual"),
        (["--traits", "formal", "formal"], "different"),
        (["--traits", "formal", "warm", "vivid"], "exactly 2"),
        (["--json", "nowhere/at/all.json"], "nowhere"),
        (["--plot", "nowhere/at/all.png"], "nowhere"),
    ],
)
def test_bad_options_are_one_line(example, capsys, monkeypatch, tmp_path, options, named):
    monkeypatch.chdir(tmp_path)
    assert example("_common").run(example("tone").main, options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and named in error
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_a_plot_that_was_asked_for_is_refused(example, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a))
    assert example("_common").run(example("tone").main, ["--plot", "plot.png"]) == 2
    assert "personafast[eval]" in capsys.readouterr().err


def test_the_page_is_filled_between_its_marks(results, example, tmp_path, capsys, monkeypatch):
    page = tmp_path / "page.md"
    marks = [f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->" for name in (*SMALL, "steering")]
    page.write_text("\n\nkept\n\n".join(marks), encoding="utf-8")
    report, run = example("report"), example("_common").run
    monkeypatch.setattr(report, "EXPERIMENTS", {name: example(name) for name in (*SMALL, "steering")})
    assert run(report.main, [str(results[1]), str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "old" not in text and text.count("kept") == 3 and "| scr linear |" in text and "| block k=8 |" in text
    assert len(list(tmp_path.glob("page-*.png"))) == 4

    page.write_text("no marks", encoding="utf-8")
    assert run(report.main, [str(results[1]), str(page)]) == 2
    assert "lacks the lines" in capsys.readouterr().err and page.read_text() == "no marks"
