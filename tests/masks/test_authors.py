"""The authors' mask files become masks of ours, and what is not theirs is named by its file."""

import zipfile

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.masks import read_authors_masks
from personafast.models.anatomy import anatomy, linear_features

Q = "model.layers.0.self_attn.q_proj"


def bits_of(net, persona):
    generator = torch.Generator().manual_seed(len(persona))
    return {
        path: torch.rand(linear_features(linear), generator=generator) < 0.5
        for path, linear in anatomy(net).linears.items()
    }


@pytest.fixture
def folder(net, tmp_path):
    (tmp_path / "masks").mkdir()
    for persona in ("seek", "reject"):
        for path, bits in bits_of(net, persona).items():
            torch.save(bits, tmp_path / "masks" / f"M_{persona}_{path}.pt")
    (tmp_path / "masks" / "log.txt").write_text("x")
    return tmp_path / "masks"


def test_every_file_becomes_a_linear_of_its_personas_mask(net, folder, tmp_path):
    found = read_authors_masks(folder, net)
    assert set(found) == {"seek", "reject"}
    library = pf.PersonaLibrary(anatomy(net).shape)
    for persona, mask in found.items():
        assert mask.metadata == {"method": "imported", "persona": persona}
        for path, bits in bits_of(net, persona).items():
            assert torch.equal(mask.dense(path), bits)
        library.add_mask(persona, mask)
    library.check(anatomy(net))
    library.save_pretrained(tmp_path / "library")
    again = pf.PersonaLibrary.from_pretrained(tmp_path / "library").masks["seek"]
    assert again.overlap(found["seek"]) == 1.0


@torch.no_grad()
@pytest.mark.usefixtures("reference_backend")
def test_they_speak_as_weights_multiplied_by_them(net, folder, batch):
    library = pf.PersonaLibrary()
    library.add_mask("seek", read_authors_masks(folder, net)["seek"])
    with pf.attach(net, library):
        found = net(**batch, personas=[pf.Persona(mask="seek")] * 3).logits
    for path, bits in bits_of(net, "seek").items():
        net.get_submodule(path).weight.mul_(bits)
    kept = batch["attention_mask"].bool()
    torch.testing.assert_close(found[kept], net(**batch).logits[kept], rtol=1e-5, atol=1e-5)


def test_a_mask_of_the_head_has_to_be_left_out_by_name(net, folder):
    torch.save(torch.ones(tiny.VOCAB, tiny.HIDDEN, dtype=torch.bool), folder / "M_seek_lm_head.pt")
    with pytest.raises(pf.PersonafastError, match=r"M_seek_lm_head\.pt: 'lm_head' is the head .*--leave-out lm_head"):
        read_authors_masks(folder, net)
    found = read_authors_masks(folder, net, leave_out=["lm_head"])
    assert set(found["seek"].words) == set(anatomy(net).linears)
    with pytest.raises(pf.PersonafastError, match="leave_out: 'embed' matches no module"):
        read_authors_masks(folder, net, leave_out=["embed"])
    with pytest.raises(pf.PersonafastError, match="leaves nothing"):
        read_authors_masks(folder, net, leave_out=["*"])


def test_a_part_of_a_model_is_accepted_when_asked_for(net, folder):
    for file in folder.glob("M_seek_*self_attn*"):
        file.unlink()
    with pytest.raises(pf.FormatError, match=r"M_seek_model\.layers\.0\.self_attn\.\w+\.pt: no such file; 12 of 21"):
        read_authors_masks(folder, net)
    found = read_authors_masks(folder, net, partial=True)
    assert len(found["seek"].words) == 9 and len(found["reject"].words) == 21
    # What is left out on purpose is not missed.
    assert len(read_authors_masks(folder, net, leave_out=["*self_attn*"])["reject"].words) == 9


class Payload:
    def __reduce__(self):
        return (print, ("run",))


def overwrite(name, value):
    return lambda folder: torch.save(value, folder / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (overwrite(f"M_seek_{Q}.pt", torch.ones(32, 32)), r"holds torch\.float32 .*, expected a bool tensor"),
        (overwrite(f"M_seek_{Q}.pt", torch.ones(32, 32, dtype=torch.uint8)), r"holds torch\.uint8"),
        (overwrite(f"M_seek_{Q}.pt", torch.ones(32, 32, dtype=torch.bool).to_sparse()), r"torch\.bool \(.*sparse_coo"),
        (overwrite(f"M_seek_{Q}.pt", [True]), "holds list, expected a bool tensor"),
        (overwrite(f"M_seek_{Q}.pt", torch.ones(32, 31, dtype=torch.bool)), r"is \[32, 31\], .* is \[32, 32\]"),
        (overwrite(f"M_seek_{Q}.pt", torch.ones(32 * 32, dtype=torch.bool)), r"is \[1024\]"),
        (overwrite(f"M_seek_{Q}.pt", Payload()), "truncated or not a tensor"),
        (lambda f: (f / f"M_seek_{Q}.pt").write_bytes(b"abc"), "truncated or not a tensor"),
        (lambda f: (f / f"M_seek_{Q}.pt").write_bytes(b""), "truncated or not a tensor"),
        (
            lambda f: (f / f"M_seek_{Q}.pt").write_bytes((f / f"M_seek_{Q}.pt").read_bytes()[:-300]),
            "truncated or not a tensor",
        ),
        (lambda f: zipfile.ZipFile(f / f"M_seek_{Q}.pt", "w").close(), "truncated or not a tensor"),
    ],
)
def test_a_broken_file_is_named_in_one_line_and_nothing_in_it_runs(net, folder, damage, message, capsys):
    damage(folder)
    with pytest.raises(pf.FormatError, match=message) as caught:
        read_authors_masks(folder, net)
    assert "\n" not in str(caught.value) and f"M_seek_{Q}.pt" in str(caught.value)
    assert "run" not in capsys.readouterr().out


def test_modules_of_another_model_and_folders_of_something_else(net, folder, tmp_path):
    torch.save(torch.ones(3, 3, dtype=torch.bool), folder / "M_seek_model.layers.9.mlp.up_proj.pt")
    with pytest.raises(pf.FormatError, match=r"M_seek_model\.layers\.9\.mlp\.up_proj\.pt: the model has no linear"):
        read_authors_masks(folder, net)
    with pytest.raises(pf.FormatError, match="no such folder"):
        read_authors_masks(tmp_path / "none", net)
    (tmp_path / "empty").mkdir()
    with pytest.raises(pf.FormatError, match="holds no M_<persona>_<module>"):
        read_authors_masks(tmp_path / "empty", net)
