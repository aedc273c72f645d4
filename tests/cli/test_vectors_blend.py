"""`personafast vectors blend`: the report on a terminal and as JSON, and the blend as a vector of the library."""

import json

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.vectors import blend, orthogonalise

BOTH = ("--vector", "creative=1", "--vector", "futurist=-0.5")


@pytest.fixture
def ran(cli, personas):
    def run(*args):
        result = cli("vectors", "blend", "--library", personas, *args)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.fixture
def refused(cli, personas):
    def run(*args):
        before = {path: path.read_bytes() for path in personas.rglob("*") if path.is_file()}
        result = cli("vectors", "blend", *args)
        assert result.exit_code == 2 and result.stdout == "", result.output
        (line,) = result.stderr.splitlines()
        assert line.startswith("error: ")
        assert {path: path.read_bytes() for path in personas.rglob("*") if path.is_file()} == before
        return line

    return run


def test_json_is_the_report(ran, personas):
    vectors = pf.PersonaLibrary.from_pretrained(personas).vectors
    found = json.loads(ran(*BOTH, "--normalize", "match", "--block", 2, "--json"))
    expected = pf.vectors.blend_report(vectors, {"creative": 1.0, "futurist": -0.5}, blocks=(2,), normalize="match")
    assert found == {**expected.as_dict(), "orthogonalise": None, "saved": None}
    turned = json.loads(ran(*BOTH, "--orthogonalise", "symmetric", "--block", "all", "--json"))
    assert [block["block"] for block in turned["blocks"]] == list(range(tiny.BLOCKS))
    assert all(abs(block["cosines"]["creative"]["futurist"]) < 1e-6 for block in turned["blocks"])


def test_the_table_holds_the_reports_figures(ran):
    report = json.loads(ran(*BOTH, "--json"))
    text = ran(*BOTH)
    for block in report["blocks"]:
        assert f"Block {block['block']}: norm {block['norm']:.2f}" in text
        for name, norm in block["norms"].items():
            share = f"{100 * block['shares'][name]:.0f} %"
            survives = f"{100 * block['survives'][name]:.0f} %"
            cosine = f"{block['cosines']['creative'][name]:+.2f}"
            (row,) = [
                line.split() for line in text.splitlines() if line.startswith(name) and f"{norm:.2f}" in line.split()
            ]
            assert [*share.split(), *survives.split()] == row[3:7] and cosine in row
    assert all(f"! {warning}" in text for warning in report["warnings"])


def test_of_many_blocks_there_is_a_line_each_and_the_worst_in_full(cli, tmp_path):
    generator = torch.Generator().manual_seed(2)
    library = pf.PersonaLibrary()
    for name, blocks in (("a", range(1, 9)), ("b", range(2, 10))):
        library.add_vector(name, torch.randn(10, 6, generator=generator), blocks=tuple(blocks))
    library.save_pretrained(tmp_path / "deep")
    result = cli("vectors", "blend", "--library", tmp_path / "deep", "--vector", "a=1", "--vector", "b=1")
    report = pf.vectors.blend_report(library.vectors, {"a": 1.0, "b": 1.0})
    worst = max(report.blocks, key=lambda block: block.cancelled)
    assert result.stdout.count("Block ") == 1 and f"Block {worst.block}: norm {worst.norm:.2f}" in result.stdout
    overview = result.stdout.partition("Block ")[0].splitlines()
    rows = {line.split()[0]: line for line in overview if line[:1].isdigit()}
    assert list(rows) == [str(block) for block in range(1, 10)]
    assert f"{worst.norm:.2f}  " in rows[str(worst.block)] and rows["9"].split()[-3:] == ["-", "100", "%"]


def test_warnings_are_printed(ran):
    assert "! futurist rules the blend: 88 %" in ran("--vector", "creative=1", "--vector", "futurist=9")
    assert "Nothing to beware of" in ran("--vector", "creative=1", "--vector", "futurist=1")


def test_a_narrow_terminal_cuts_nothing(ran, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    text = ran(*BOTH)
    tables = text.partition("! ")[0]
    assert "\u2026" not in text and max(map(len, tables.splitlines())) <= 40
    assert "continued" in text and "cos futurist" in text


def test_a_saved_blend_speaks_as_its_parts_do(ran, personas):
    text = ran(*BOTH, "--normalize", "match", "--name", "new")
    assert "new saved" in text
    library = pf.PersonaLibrary.from_pretrained(personas)
    assert sorted(library.vectors) == ["creative", "futurist", "new"] and sorted(library.policies) == ["formal", "warm"]
    made = library.vectors["new"]
    coefficients = {"creative": 1.0, "futurist": -0.5}
    assert torch.equal(blend(library.vectors, {"new": 1.0}), blend(library.vectors, coefficients, normalize="match"))
    assert made.metadata == {"method": "blend", "coefficients": coefficients, "normalize": "match"}
    net = tiny.model()
    ids = torch.tensor([[5, 9, 30, 12]] * 2)
    with torch.no_grad(), pf.attach(net, library):
        logits = net(
            input_ids=ids, personas=[pf.Persona(vectors={"new": 2.0}), pf.Persona(vectors={"futurist": 1.0})]
        ).logits
    assert not torch.allclose(logits[0], logits[1])


def test_orthogonal_parts_are_saved_as_such(ran, personas):
    ran(*BOTH, "--orthogonalise", "gram_schmidt", "--name", "new")
    library = pf.PersonaLibrary.from_pretrained(personas)
    parts = orthogonalise(library.vectors, ["creative", "futurist"], method="gram_schmidt")
    expected = blend(parts, {"creative": 1.0, "futurist": -0.5})
    torch.testing.assert_close(library.vectors["new"].directions[[0, 1]], expected[[0, 1]])
    assert library.vectors["new"].metadata["orthogonalise"] == "gram_schmidt"


def test_replacing_takes_a_word(ran, refused, personas):
    ran(*BOTH, "--name", "new")
    assert "--name 'new': is in the library" in refused("--library", personas, *BOTH, "--name", "new")
    ran("--vector", "creative=3", "--name", "new", "--replace")
    assert pf.PersonaLibrary.from_pretrained(personas).vectors["new"].metadata["coefficients"] == {"creative": 3.0}


def test_the_zoos_library_needs_no_name(cli):
    result = cli("vectors", "blend", "--vector", "warm=1", "--vector", "formal=0.5")
    assert result.exit_code == 0 and "Block 2: norm" in result.stdout, result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--vector: none given"),
        (("--vector", "nobody=1"), "--vector 'nobody': no such vector in the library; there are: creative, futurist"),
        (("--vector", "creative=nan"), "finite"),
        (("--vector", "creative=1", "--normalize", "max"), "normalize: 'max' is not one of none, unit, match"),
        (("--vector", "creative=1", "--orthogonalise", "qr"), "method: 'qr'"),
        (("--vector", "creative=1", "--block", "3"), "--block '3': give a number in 0..2, or all"),
        (("--vector", "creative=1", "--block", "-1"), "--block '-1'"),
        (("--vector", "creative=1", "--name", "a/b"), "'a/b' is not a usable name"),
        (("--vector", "creative=0", "--name", "new"), "nothing acts"),
    ],
)
def test_refusals(refused, personas, arguments, message):
    assert message in refused("--library", personas, *arguments)


def test_the_package_is_not_written_to(refused):
    assert "--name 'new': the built-in library" in refused("--vector", "warm=1", "--name", "new")


def test_a_library_without_vectors(refused, personas, tmp_path):
    pf.PersonaLibrary().save_pretrained(tmp_path / "bare")
    assert "holds no vectors" in refused("--library", tmp_path / "bare", "--vector", "creative=1")
