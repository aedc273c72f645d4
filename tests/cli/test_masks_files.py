"""`personafast masks import` and `apply`, and what a checkpoint made by them says."""

import json

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.models.anatomy import ModelShape, anatomy, linear_features


@pytest.fixture
def authors(tmp_path):
    folder = tmp_path / "authors"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for path, linear in anatomy(tiny.model()).linears.items():
        for persona in ("seek", "reject"):
            torch.save(
                torch.rand(linear_features(linear), generator=generator) < 0.5, folder / f"M_{persona}_{path}.pt"
            )
    return folder


@pytest.fixture
def library(cli, checkpoint, authors, tmp_path):
    result = cli(
        "masks", "import", authors, "--model", checkpoint, "--library", tmp_path / "library", "--name", "power"
    )
    assert result.exit_code == 0, result.output
    return tmp_path / "library"


def masks(folder):
    return pf.PersonaLibrary.from_pretrained(folder).masks


def test_import(cli, checkpoint, authors, library):
    assert set(masks(library)) == {"power-seek", "power-reject"}
    path = "model.layers.1.mlp.down_proj"
    assert torch.equal(
        masks(library)["power-seek"].dense(path), torch.load(authors / f"M_seek_{path}.pt", weights_only=True)
    )
    torch.save(torch.ones(64, 32, dtype=torch.bool), authors / "M_seek_lm_head.pt")
    common = ("masks", "import", authors, "--model", checkpoint, "--library", library)
    refused = cli(*common, "--name", "s")
    assert refused.exit_code == 2 and "M_seek_lm_head.pt: 'lm_head' is the head" in refused.stderr
    result = cli(*common, "--name", "s", "--persona", "seek", "--leave-out", "lm_head", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert set(masks(library)) == {"power-seek", "power-reject", "s"} == {*facts["masks"], "power-seek", "power-reject"}
    assert facts["masks"]["s"]["linears"] == 21 and facts["masks"]["s"]["kept"] == masks(library)["s"].kept
    (authors / f"M_seek_{path}.pt").unlink()
    assert cli(*common, "--name", "t", "--leave-out", "lm_head").exit_code == 2
    assert cli(*common, "--name", "t", "--leave-out", "lm_head", "--partial").exit_code == 0
    assert len(masks(library)["t-seek"].words) == 20


@pytest.mark.parametrize("kind", [(), ("--compressed",)])
def test_a_checkpoint_with_the_mask_applied_says_what_the_mask_says(cli, checkpoint, library, tmp_path, kind):
    out = tmp_path / "out"
    made = cli(
        "masks", "apply", "--model", checkpoint, "--library", library, "--mask", "power-seek", "--output", out, *kind,
        "--json",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    facts = json.loads(made.stdout)
    assert facts["kind"] == ("compressed" if kind else "masked") and facts["kept"] == masks(library)["power-seek"].kept
    assert facts["bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    say = ("generate", "--prompt", "what is this sea", "--greedy", "--max-new-tokens", 8, "--json")
    replies = [
        json.loads(cli(*say, *speaker).stdout)["reply"]
        for speaker in (("--model", out), ("--model", checkpoint, "--library", library, "--mask", "power-seek"))
    ]
    assert replies[0] == replies[1] and replies[0]
    assert replies[0] != json.loads(cli(*say, "--model", checkpoint).stdout)["reply"]
    cast = cli(*say, "--model", out, "--dtype", "bfloat16")
    assert cast.exit_code == 0 and json.loads(cast.stdout)["reply"]


def test_a_compressed_one_takes_vectors_but_no_mask(cli, checkpoint, library, tmp_path):
    out, vectors = tmp_path / "out", tmp_path / "vectors"
    apply = ("masks", "apply", "--model", checkpoint, "--library", library, "--mask", "power-seek", "--compressed")
    assert cli(*apply, "--output", out).exit_code == 0
    tiny.library(tiny.model(), masks=False).save_pretrained(vectors)
    say = ("generate", "--prompt", "what is this sea", "--greedy", "--max-new-tokens", 8, "--json", "--model", out)
    steered = cli(*say, "--library", vectors, "--vector", "creative=3")
    assert steered.exit_code == 0, steered.output
    assert json.loads(steered.stdout)["reply"] != json.loads(cli(*say).stdout)["reply"]
    masked = cli(*say, "--library", library, "--mask", "power-seek")
    assert masked.exit_code == 2 and "not in memory" in masked.stderr
    again = cli(
        "masks", "apply", "--model", out, "--library", library, "--mask", "power-seek", "--output", tmp_path / "b"
    )
    assert again.exit_code == 2 and "a compressed checkpoint, which lacks what its mask drops" in again.stderr


def test_what_can_be_mended_is_one_line(cli, checkpoint, library, tmp_path):
    out = tmp_path / "out"
    apply = ("masks", "apply", "--model", checkpoint, "--library", library, "--output", out, "--mask")
    soft = pf.PersonaLibrary.from_pretrained(library)
    soft.add_mask("soft", masks(library)["power-seek"].with_metadata(gamma=0.2))
    soft.add_mask("head", pf.masks.PersonaMask({"lm_head": torch.zeros(64, 1, dtype=torch.int32)}, {"lm_head": 32}))
    soft.save_pretrained(library)
    other = tmp_path / "other"
    pf.PersonaLibrary(ModelShape("gpt2", 8, 1, 9)).save_pretrained(other)
    for args, match in (
        ((*apply, "ghost"), "holds no mask 'ghost'; there are: head, power-reject, power-seek, soft"),
        ((*apply, "soft", "--compressed"), "gamma: 0.2"),
        ((*apply, "head"), "'lm_head' is the head or an embedding, which is never masked"),
        (("masks", "import", tmp_path / "no", "--model", checkpoint, "--library", library, "--name", "x"), "no such"),
        (
            ("masks", "import", tmp_path / "authors", "--model", checkpoint, "--library", library, "--name", "x",
             "--persona", "hide"),
            "--persona 'hide'",
        ),
        (
            ("masks", "import", tmp_path / "authors", "--model", checkpoint, "--library", other, "--name", "x"),
            "made for another model",
        ),
    ):  # fmt: skip
        result = cli(*args)
        assert result.exit_code == 2 and match in result.stderr, result.output
        assert len(result.stderr.splitlines()) == 1
    assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("x")
    refused = cli(*apply, "power-seek")
    assert refused.exit_code == 2 and "not empty" in refused.stderr and (out / "notes.txt").exists()
    assert cli(*apply, "power-seek", "--replace").exit_code == 0 and not (out / "notes.txt").exists()


def test_inspect_shows_what_a_persona_adds_on_disk(cli, library, tmp_path):
    found = pf.PersonaLibrary.from_pretrained(library)
    path, words = next(iter(found.masks["power-seek"].words.items()))
    near = {**found.masks["power-seek"].words, path: words ^ 1}
    found.add_mask("near", pf.masks.PersonaMask(near, found.masks["power-seek"].in_features))
    found.save_pretrained(library)
    facts = json.loads(cli("masks", "inspect", "--library", library, "--json").stdout)
    from personafast.masks.storage import stored_bytes

    by_mask, base = stored_bytes(library)
    assert {name: row["disk_bytes"] for name, row in facts.items()} == by_mask
    assert {row["base_bytes"] for row in facts.values()} == {base} and base == facts["near"]["bytes"]
    assert facts["near"]["disk_bytes"] < facts["near"]["bytes"] / 4
    shown = " ".join(cli("masks", "inspect", "--library", library).stdout.split())
    assert f"On disk: {base:,} bytes of the base" in shown
