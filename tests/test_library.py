"""Libraries on disk: what is written is what is read, and what is broken is named."""

import json
import shutil

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast import _io
from personafast.density.lora import LoraPolicy
from personafast.models.anatomy import anatomy


@pytest.fixture
def folder(library, tmp_path):
    library.save_pretrained(tmp_path / "library")
    return tmp_path / "library"


def test_round_trip(library, folder, net):
    again = pf.PersonaLibrary.from_pretrained(folder)
    assert again.shape == library.shape
    for name, vector in library.vectors.items():
        assert torch.equal(again.vectors[name].directions, vector.directions)
        assert again.vectors[name].blocks == vector.blocks
    for name, mask in library.masks.items():
        assert again.masks[name].in_features == mask.in_features
        assert all(torch.equal(again.masks[name].words[path], words) for path, words in mask.words.items())
        assert again.masks[name].metadata == mask.metadata
    for name, policy in library.policies.items():
        assert again.policies[name].vocab_size == tiny.VOCAB
        for path, factors in policy.factors.items():
            found = again.policies[name].factors[path]
            assert torch.equal(found.a, factors.a) and torch.equal(found.b, factors.b)
            assert found.scale == pytest.approx(factors.scale)
    again.check(anatomy(net))


def test_the_same_library_gives_the_same_bytes(library, folder, tmp_path):
    pf.PersonaLibrary.from_pretrained(folder).save_pretrained(tmp_path / "again")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_saving_replaces_the_folder_whole_or_not_at_all(library, folder, monkeypatch):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(LoraPolicy, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        library.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in folder.parent.iterdir()] == ["library"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    _io.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        _io.write_json(path, {"a": object()})
    with pytest.raises(RuntimeError), _io.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_a_header_length_that_looks_like_a_pickle_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    for padding in range(0x280):
        _io.write_safetensors(path, {"a": torch.ones(1)}, {"p": "x" * padding})
        if path.read_bytes().startswith(b"\x80\x02"):
            break
    assert path.read_bytes().startswith(b"\x80\x02")
    assert torch.equal(_io.read_safetensors(path)[0]["a"], torch.ones(1))


def edit_index(folder, change):
    index = json.loads((folder / "library.json").read_text())
    change(index)
    (folder / "library.json").write_text(json.dumps(index))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-40])


def pickle(path):
    path.unlink()
    torch.save({"a": torch.ones(2)}, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "library.json").unlink(), r"library\.json: no such file"),
        (lambda f: (f / "library.json").write_text("{"), r"library\.json: not valid JSON"),
        (lambda f: edit_index(f, lambda i: i.update(format_version=9)), "format_version 1"),
        (lambda f: (f / "vectors.safetensors").unlink(), r"vectors\.safetensors: no such file"),
        (lambda f: truncate(f / "vectors.safetensors"), r"vectors\.safetensors: truncated"),
        (lambda f: pickle(f / "vectors.safetensors"), r"vectors\.safetensors: this is a pickle"),
        (lambda f: truncate(f / "masks.safetensors"), r"masks\.safetensors: truncated"),
        (lambda f: edit_index(f, lambda i: i["vectors"].update(ghost={})), "lacks the vector 'ghost'"),
        (lambda f: edit_index(f, lambda i: i["masks"].update(ghost={})), "lacks the mask 'ghost'"),
        (lambda f: (f / "policies/formal/adapter_config.json").unlink(), r"adapter_config\.json: no such file"),
        (lambda f: truncate(f / "policies/formal/adapter_model.safetensors"), r"adapter_model\.safetensors: truncated"),
        (lambda f: pickle(f / "policies/formal/adapter_model.safetensors"), "this is a pickle"),
        (lambda f: edit_index(f, lambda i: i["policies"]["formal"].update(vocab_size=7)), "vocabulary of 7"),
        (lambda f: edit_index(f, lambda i: i["model"].update(hidden_size=7)), "hidden size 32, the model has 7"),
    ],
)
def test_a_broken_folder_is_named_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(pf.PersonafastError, match=message) as caught:
        pf.PersonaLibrary.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_a_library_by_name_comes_from_the_hub(folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name: {"owner/personas": str(folder)}[name])
    assert "formal" in pf.PersonaLibrary.from_pretrained("owner/personas").policies
    with pytest.raises(pf.FormatError, match="owner/other: no such folder.*the Hub says"):
        pf.PersonaLibrary.from_pretrained("owner/other")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    for path in (folder / "x", "tests/x", "./x", "x"):
        with pytest.raises(pf.FormatError, match="no such folder") as caught:
            pf.PersonaLibrary.from_pretrained(path)
        assert "Hub" not in str(caught.value)


def test_push_to_hub_uploads_what_save_pretrained_writes(library, monkeypatch):
    import huggingface_hub

    seen = {}

    class Api:
        def create_repo(self, repo_id, **options):
            return f"address/{repo_id}"

        def upload_folder(self, *, repo_id, folder_path):
            seen[repo_id] = pf.PersonaLibrary.from_pretrained(folder_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert library.push_to_hub("owner/personas", private=True) == "address/owner/personas"
    assert set(seen["owner/personas"].policies) == set(library.policies)


def test_vectors_are_checked_when_they_are_added(library):
    bad = torch.ones(tiny.BLOCKS, tiny.HIDDEN)
    bad[1, 3] = torch.nan
    with pytest.raises(pf.PersonafastError, match=r"'x'.*NaN or infinity in the rows of blocks \[1\]"):
        library.add_vector("x", bad)
    with pytest.raises(pf.PersonafastError, match="hidden size 5, the model has 32"):
        library.add_vector("x", torch.ones(tiny.BLOCKS, 5))
    with pytest.raises(pf.PersonafastError, match="4 rows, the model has 3 blocks"):
        library.add_vector("x", torch.ones(tiny.BLOCKS + 1, tiny.HIDDEN))
    with pytest.raises(pf.PersonafastError, match="not a usable name"):
        library.add_vector("../x", torch.ones(tiny.BLOCKS, tiny.HIDDEN))
    assert "x" not in library.vectors


def test_policies_that_are_more_than_plain_lora_are_refused(folder):
    config = folder / "policies/formal/adapter_config.json"
    for option, value in (("use_dora", True), ("bias", "all"), ("modules_to_save", ["lm_head"]), ("peft_type", "IA3")):
        changed = {**json.loads(config.read_text()), option: value}
        other = folder.parent / option
        shutil.copytree(folder / "policies/formal", other)
        (other / "adapter_config.json").write_text(json.dumps(changed))
        with pytest.raises(pf.FormatError, match=option):
            LoraPolicy.from_pretrained(other)


def test_a_whole_checkpoint_is_not_taken_for_a_policy(net, tmp_path):
    net.save_pretrained(tmp_path / "checkpoint")
    with pytest.raises(pf.FormatError, match="a whole checkpoint, not a LoRA adapter"):
        pf.PersonaLibrary().add_policy("x", tmp_path / "checkpoint")


def test_a_policy_of_another_vocabulary_is_refused_by_its_tokenizer(library, folder, tmp_path):
    tok = tiny.tokenizer()
    tok.add_tokens(["brand", "new"])
    policy = tmp_path / "policy"
    shutil.copytree(folder / "policies/formal", policy)
    config, tensors = policy / "adapter_config.json", policy / "adapter_model.safetensors"
    loaded, _ = _io.read_safetensors(tensors)
    _io.write_safetensors(tensors, loaded, {"format": "pt"})
    tok.save_pretrained(policy)
    assert config.is_file()
    with pytest.raises(pf.PersonafastError, match="vocabulary of 66 tokens, the reference has 64"):
        library.add_policy("x", policy)


def test_peft_reads_what_we_write_and_we_read_what_peft_writes(net, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 2},
        alpha_pattern={"down_proj": 5},
        use_rslora=True,
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(net, config).eval()
    wrapped.save_pretrained(tmp_path / "theirs")
    policy = LoraPolicy.from_pretrained(tmp_path / "theirs")
    for path, factors in policy.factors.items():
        layer = wrapped.base_model.model.get_submodule(path)
        assert factors.scale == pytest.approx(layer.scaling["default"]), path
        assert torch.equal(factors.a, layer.lora_A["default"].weight)
    policy.save_pretrained(tmp_path / "ours")
    ids = torch.arange(3, 20)[None]
    expected = wrapped(ids).logits
    again = peft.PeftModel.from_pretrained(tiny.model(), tmp_path / "ours").eval()
    assert torch.equal(again(ids).logits, expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vectors": {"a": float("nan")}}, "finite"),
        ({"policies": {"a": float("inf")}}, "finite"),
        ({"policies": {"a": "much"}}, "not a number"),
        ({"prompts": {" ": 1.0}}, "empty"),
        ({"vectors": ["a"]}, "mapping"),
        ({"mask": ""}, "mask"),
        ({"aggregator": "median"}, "aggregator"),
        ({"policies": {"a": -1.0, "b": 2.0}, "aggregator": "harmonic"}, "no negative weight"),
        ({"policies": {"a": -1.0, "b": 1.0}, "aggregator": "linear"}, "sum to 0"),
        ({"policies": {"a": 0.0}, "aggregator": "min"}, "sum to 0"),
        ({"policies": {"a": 1.0}, "aggregator": "power", "p": float("inf")}, "p: inf is not"),
        ({"policies": {"a": 1.0}, "base": ""}, "base: expected the name"),
        ({"policies": {"a": 1.0}, "aggregator": "mean"}, "reverse_kl"),
    ],
)
def test_a_bad_persona_is_refused(given, message):
    with pytest.raises(pf.PersonafastError, match=message):
        pf.Persona(**given)


def test_a_folder_that_holds_something_else_is_left_alone(library, net, tmp_path):
    net.save_pretrained(tmp_path / "model")
    (tmp_path / "file").write_text("x")
    for target in ("model", "file"):
        with pytest.raises(pf.PersonafastError, match="something else than a library"):
            library.save_pretrained(tmp_path / target)
    assert (tmp_path / "model" / "model.safetensors").is_file() and (tmp_path / "file").read_text() == "x"
    (tmp_path / "empty").mkdir()
    library.save_pretrained(tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    library.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and pf.PersonaLibrary.from_pretrained(tmp_path / "link").policies


def test_the_old_library_comes_back_when_the_new_one_cannot_take_its_place(library, folder, monkeypatch):
    from pathlib import Path

    before = sorted(path.name for path in folder.iterdir())
    replace = Path.replace

    def fail(self, target):
        if Path(target) == folder and self.name != "previous":
            raise OSError("no")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no"):
        library.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in folder.parent.iterdir()] == ["library"]


def test_one_tensor_under_two_names_is_saved(library, tmp_path):
    vector = library.vectors["creative"]
    library.add_vector("same", vector)
    library.add_mask("same", library.masks["introvert"])
    library.save_pretrained(tmp_path / "aliased")
    assert torch.equal(
        pf.PersonaLibrary.from_pretrained(tmp_path / "aliased").vectors["same"].directions, vector.directions
    )
    given = torch.ones(tiny.BLOCKS, tiny.HIDDEN)
    library.add_vector("own", given)
    given.fill_(torch.nan)
    assert torch.isfinite(library.vectors["own"].directions).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda i: i.update(model={"hidden": 3}),
        lambda i: i.update(policies=["formal"]),
        lambda i: i.update(vectors=["creative"]),
        lambda i: i["masks"]["introvert"].update(in_features=[3]),
        lambda i: i["policies"].update(formal=None),
    ],
)
def test_an_index_of_another_layout_is_named(folder, change):
    edit_index(folder, change)
    with pytest.raises(pf.FormatError, match=r"library\.json|masks\.safetensors"):
        pf.PersonaLibrary.from_pretrained(folder)


@pytest.mark.parametrize("option", [{"init_lora_weights": "pissa_niter_4"}, {"alora_invocation_tokens": [1]}])
def test_adapters_that_change_more_than_the_product_are_refused(folder, option):
    config = folder / "policies/formal/adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **option}))
    with pytest.raises(pf.FormatError, match=next(iter(option))):
        LoraPolicy.from_pretrained(folder / "policies/formal")


def test_a_tokenizer_smaller_than_the_models_vocabulary_is_usual(folder, tmp_path):
    """Models round their vocabulary up, so fewer tokens than rows of the embedding are no sign of another model."""
    tok = tiny.tokenizer()
    policy = tmp_path / "policy"
    shutil.copytree(folder / "policies/formal", policy)
    loaded, _ = _io.read_safetensors(policy / "adapter_model.safetensors")
    _io.write_safetensors(policy / "adapter_model.safetensors", loaded, {"format": "pt"})
    tok.save_pretrained(policy)
    padded = pf.PersonaLibrary(pf.PersonaLibrary.from_pretrained(folder).shape.__class__("llama", 32, 3, 128))
    padded.add_policy("x", policy)


def test_a_vector_read_elsewhere_is_kept_but_not_attached(net, tmp_path):
    library = pf.PersonaLibrary()
    library.add_vector(
        "heads", pf.vectors.PersonaVector(torch.ones(tiny.BLOCKS, tiny.HIDDEN), hook_point="attention_output")
    )
    library.save_pretrained(tmp_path / "library")
    again = pf.PersonaLibrary.from_pretrained(tmp_path / "library")
    assert again.vectors["heads"].hook_point == "attention_output"
    assert "hook_point" not in again.vectors["heads"].metadata
    with pytest.raises(pf.PersonafastError, match=r"vectors\['heads'\]: read at 'attention_output'"):
        pf.attach(net, again)
