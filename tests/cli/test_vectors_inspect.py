"""`personafast vectors inspect`: figures, tables and the PNG."""

import importlib.util
import json
import sys

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.cli.vectors import inspect_figure
from personafast.cli.vectors.inspect import _runs
from personafast.vectors import PersonaVector


@pytest.fixture
def ran(cli):
    def run(*args):
        result = cli("vectors", "inspect", *args)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.fixture
def wide(tmp_path):
    """A library of twelve vectors of twenty blocks, one of them flat at block 0."""
    generator = torch.Generator().manual_seed(1)
    library = pf.PersonaLibrary()
    for index in range(12):
        rows = torch.randn(20, 8, generator=generator) * torch.linspace(1, 9, 20)[:, None]
        rows[0] *= index > 0
        library.add_vector(f"persona-{index}", PersonaVector(rows, (7, 8, 9) if index else (12,)))
    library.save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def test_json_holds_norms_and_every_cosine(ran, personas):
    vectors = pf.PersonaLibrary.from_pretrained(personas).vectors
    found = json.loads(ran("--library", personas, "--json"))
    assert found["block"] == 0 and list(found["vectors"]) == ["creative", "futurist"]
    for name, vector in vectors.items():
        facts = found["vectors"][name]
        assert facts["blocks"] == [0, 1] and facts["hook_point"] == "block_output"
        assert facts["norms"] == pytest.approx(vector.norms.tolist(), rel=1e-5)
    for block in range(tiny.BLOCKS):
        expected = torch.cosine_similarity(*(vectors[name].directions[block] for name in vectors), dim=0)
        (one, between), (again, other) = found["cosines"][block]
        assert one == other == 1.0 and between == again == pytest.approx(float(expected), abs=1e-5)


def test_tables_of_the_zoo(ran):
    text = ran("warm", "formal")
    facts = json.loads(ran("warm", "formal", "--json"))
    warm, formal = facts["vectors"]["warm"]["norms"], facts["vectors"]["formal"]["norms"]
    assert f"{warm[2]:.2f}*" in text and f"{formal[2]:.2f}*" in text and f"{warm[3]:.2f} " in text
    assert "Cosines at block 2" in text and f"{facts['cosines'][2][0][1]:+.2f}" in text
    assert "casual" not in text and "mean_diff" in text
    assert text.index("warm") < text.index("formal")
    assert "Cosines at block 0" in ran("warm", "formal", "--block", 0)


@pytest.mark.parametrize("columns", ["40", "80"])
def test_many_vectors_in_a_narrow_terminal(ran, wide, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    text = ran("--library", wide)
    assert "\u2026" not in text and max(map(len, text.splitlines())) <= int(columns)
    assert "Cosines at block 7" in text and "7-9" in text
    flat = ran("--library", wide, "--block", 0)
    row = next(line for line in flat.split("Cosines at block 0")[1].splitlines() if line.startswith("persona-0 "))
    assert set(row.split()[1:]) == {"-"}


def test_runs_of_blocks():
    assert _runs([5, 0, 1, 2, 2]) == "0-2, 5" and _runs([3]) == "3"


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_figure_is_drawn(ran, wide, tmp_path):
    from matplotlib.image import imread

    for arguments in (["--library", wide, "--block", 0], ["warm"]):
        path = tmp_path / "vectors.png"
        assert f"figure: {path}" in ran(*arguments, "--plot", path)
        image = imread(path)
        assert image.std() > 0.05 and image.shape[1] > image.shape[0] / 2
        path.unlink()


def test_labels_at_the_ends_of_lines_keep_apart_and_near():
    places = [0.0, 0.1, 0.2, 5.0, 5.1, 9.0]
    found = inspect_figure._spread(places, 1.0)
    assert all(after - before >= 1.0 - 1e-9 for before, after in zip(found, found[1:], strict=False))
    assert (
        found[:3] == pytest.approx([-0.9, 0.1, 1.1]) and found[3:5] == pytest.approx([4.55, 5.55]) and found[5] == 9.0
    )
    assert inspect_figure._spread([0.0, 2.0, 4.0], 1.0) == [0.0, 2.0, 4.0]


@pytest.fixture
def refused(cli, tmp_path):
    def run(*args):
        result = cli("vectors", "inspect", *args)
        assert result.exit_code == 2 and result.stdout == "", result.output
        assert not list(tmp_path.rglob("*.png"))
        (line,) = result.stderr.splitlines()
        return line

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nobody",), "NAME 'nobody': no such vector in the library"),
        (("warm", "warm"), "is given twice"),
        (("--block", "4"), "--block '4': give a number in 0..3"),
        (("--block", "all"), "--block all: directions are compared at one block"),
        (("--plot", "x.jpg"), "ends in .png"),
        (("--plot", "nowhere/x.png"), "the folder nowhere does not exist"),
        (("--library", "nowhere"), "no such folder"),
    ],
)
def test_refusals(refused, arguments, message):
    assert message in refused(*arguments)


def test_without_matplotlib_it_says_what_to_install(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "matplotlib" else find(name, *more)
    )
    assert "personafast[eval]" in refused("--plot", "x.png")


def test_vectors_of_two_models_in_one_library(refused, tmp_path):
    library = pf.PersonaLibrary()
    library.add_vector("a", torch.ones(3, 4))
    library.add_vector("b", torch.ones(3, 5))
    library.save_pretrained(tmp_path / "mixed")
    assert "vectors['b']: shape [3, 5] does not fit [3, 4] of 'a'" in refused("--library", tmp_path / "mixed")
