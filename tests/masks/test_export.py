"""A mask applied for good: checkpoints that speak as the attached mask does, plain and compressed."""

import copy
import json

import pytest
import torch
from helpers import tiny
from torch.utils._python_dispatch import TorchDispatchMode

import personafast as pf
from personafast.masks import PersonaMask, export_compressed, export_masked, load_compressed
from personafast.masks.checkpoint import is_compressed
from personafast.models.anatomy import anatomy, is_conv1d, linear_features

MASKED = pf.Persona(mask="introvert")
LINEARS = ("llama", "qwen2", "qwen3", "gemma2", "gpt_neo", "gpt_neox")


def random_mask(net, seed=0, share=0.5, names=("",), **metadata):
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        path: linear_features(linear) for path, linear in anatomy(net).linears.items() if path.endswith(tuple(names))
    }
    words = {path: pf.ops.pack_mask(torch.rand(shape, generator=generator) < share) for path, shape in shapes.items()}
    return PersonaMask(words, {path: shape[1] for path, shape in shapes.items()}, metadata)


def library_of(net, mask):
    found = tiny.library(net, masks=False)
    found.add_mask("introvert", mask)
    return found


@pytest.fixture
def ids():
    return torch.randint(3, tiny.VOCAB, (2, 6), generator=torch.Generator().manual_seed(4))


def tokens(net, ids, **options):
    return net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, **options)


def stock(folder):
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(folder).eval()
    found.generation_config.eos_token_id = None
    return found


def compressed(folder):
    found = load_compressed(folder)
    found.generation_config.eos_token_id = None
    return found


@torch.no_grad()
@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize(("export", "load"), [(export_masked, stock), (export_compressed, compressed)])
@pytest.mark.parametrize("family", LINEARS)
def test_a_checkpoint_speaks_as_the_attached_mask(family, export, load, ids, tmp_path):
    net = tiny.model(family)
    mask = random_mask(net)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    export(net, mask, tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    with pf.attach(net, library_of(net, mask)) as personas:
        expected = net(ids, personas=[MASKED] * 2).logits
        said = tokens(net, ids, custom_generate=personas.generate, personas=MASKED)
    assert not torch.allclose(net(ids).logits, expected, atol=0.1)
    again = load(tmp_path / "out")
    # The same products in fp32, summed in another order.
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokens(again, ids), said)


@torch.no_grad()
@pytest.mark.parametrize("gamma", [0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_weights_are_gated_and_everything_else_is_as_it_was(family, dtype, gamma, tmp_path):
    net = tiny.model(family).to(dtype)
    mask = random_mask(net, gamma=gamma)
    export_masked(net, mask, tmp_path / "out")
    again = stock(tmp_path / "out")
    assert again.dtype == dtype
    linears = anatomy(net).linears
    masked = {f"{path}.weight" for path in linears}
    for name, value in again.state_dict().items():
        expected = net.state_dict()[name]
        if name in masked:
            path = name.removesuffix(".weight")
            gate = mask.gate(path, dtype)
            expected = expected * (gate.t() if is_conv1d(linears[path]) else gate)
        assert torch.equal(value, expected), name
    if family == "gemma2":
        assert again.lm_head.weight is again.model.embed_tokens.weight


@torch.no_grad()
def test_experts_are_masked_too(tmp_path):
    import transformers as t

    torch.manual_seed(0)
    config = t.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3,
    )  # fmt: skip
    net = t.AutoModelForCausalLM.from_config(config).eval()
    path = "model.layers.1.mlp.experts.down_proj.2"
    bits = torch.rand(32, 48, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = PersonaMask({path: pf.ops.pack_mask(bits)}, {path: 48})
    export_masked(net, mask, tmp_path / "out")
    expected = net.model.layers[1].mlp.experts.down_proj.clone()
    expected[2] *= bits
    again = stock(tmp_path / "out")
    assert torch.equal(again.model.layers[1].mlp.experts.down_proj, expected)
    assert torch.equal(again.model.layers[0].mlp.experts.down_proj, net.model.layers[0].mlp.experts.down_proj)
    with pytest.raises(pf.UnsupportedModelError, match=r"down_proj\.2 is part of a MixtralExperts, and only nn.Linear"):
        export_compressed(net, mask, tmp_path / "compressed")


SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
NARROW = {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": 0}


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ("MixtralConfig", {**NARROW, "num_local_experts": 3}),
        ("Phi3Config", NARROW),
        ("Gemma3TextConfig", {**NARROW, "head_dim": 8}),
        ("OPTConfig", {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32}),
        ("BloomConfig", {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("GPTJConfig", {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 32}),
    ],
)
def test_what_a_model_computes_for_itself_is_there_after_loading(config, options, ids, tmp_path):
    """Rotary frequencies, slopes, sinusoids, embedding scales, experts: in no file, or in one parameter."""
    import transformers as t

    torch.manual_seed(0)
    net = t.AutoModelForCausalLM.from_config(getattr(t, config)(**options)).eval()
    for parameter in net.parameters():
        if parameter.dim() > 1:
            parameter.mul_(6)
    mask = random_mask(net)
    export_masked(net, mask, tmp_path / "plain")
    export_compressed(net, mask, tmp_path / "compressed")
    expected = stock(tmp_path / "plain")(ids).logits
    torch.testing.assert_close(compressed(tmp_path / "compressed")(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert (net(ids).logits - expected).abs().max() > 0.5


@torch.no_grad()
def test_in_place_needs_no_second_copy(net, ids, tmp_path):
    mask = random_mask(net)
    export_masked(net, mask, tmp_path / "out", in_place=True)
    assert torch.equal(net(ids).logits, stock(tmp_path / "out")(ids).logits)


@torch.no_grad()
def test_large_models_are_split_into_files(net, ids, tmp_path):
    mask = random_mask(net)
    export_masked(net, mask, tmp_path / "one")
    export_masked(net, mask, tmp_path / "many", max_shard_size="20KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    assert torch.equal(stock(tmp_path / "one")(ids).logits, stock(tmp_path / "many")(ids).logits)
    export_compressed(net, mask, tmp_path / "compressed", max_shard_bytes=20_000)
    assert len(list((tmp_path / "compressed").glob("compressed-*.safetensors"))) > 3
    export_compressed(net, mask, tmp_path / "whole")
    assert torch.equal(compressed(tmp_path / "compressed")(ids).logits, compressed(tmp_path / "whole")(ids).logits)


class Allocated(TorchDispatchMode):
    """Shapes of the floating tensors with memory that operators return."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device.type != "meta" and out.is_floating_point():
            self.shapes.add(tuple(out.shape))
        return out


def test_dense_weights_of_masked_linears_are_never_in_memory(net, tmp_path):
    mask = random_mask(net)
    export_compressed(net, mask, tmp_path / "out")
    with Allocated() as seen:
        again = load_compressed(tmp_path / "out")
    dense = {linear_features(linear) for linear in anatomy(net).linears.values()}
    dense.remove(tuple(net.lm_head.weight.shape))
    assert not dense & seen.shapes
    with Allocated() as seen:
        tiny.model()
    assert dense <= seen.shapes
    for path in mask.words:
        assert again.get_submodule(path).weight.is_meta
    assert [name for name, _ in again.named_parameters()] == [name for name, _ in net.named_parameters()]


def test_bytes_on_disk(tmp_path):
    """At 16 bit and 50 %, 9 bits a weight of the masked part, besides where rows begin."""
    net = tiny.model().to(torch.bfloat16)
    bits = torch.arange(64) % 2 == 0
    mask = PersonaMask(
        {
            path: pf.ops.pack_mask(bits[: linear_features(linear)[1]].expand(linear_features(linear)).contiguous())
            for path, linear in anatomy(net).linears.items()
        },
        {path: linear_features(linear)[1] for path, linear in anatomy(net).linears.items()},
    )
    export_masked(net, mask, tmp_path / "dense")
    export_compressed(net, mask, tmp_path / "compressed")
    weights = sum(mask.size_of(path) for path in mask.words)
    rows = sum(words.shape[0] + 1 for words in mask.words.values())
    saved = tensor_bytes(tmp_path / "dense") - tensor_bytes(tmp_path / "compressed")
    assert saved == 2 * weights - 2 * weights * 9 // 16 - 8 * rows


def tensor_bytes(folder):
    """Of all files, without their headers."""
    heads = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in folder.glob("*.safetensors"))
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) - heads


@torch.no_grad()
@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize(
    "persona",
    [
        {},
        {"vectors": {"creative": 1.5}},
        {"policies": {"formal": 0.7, "warm": 0.5}},
    ],
    ids=["alone", "vector", "policies"],
)
def test_it_takes_vectors_and_policies_as_the_model_it_was_made_from_does(net, persona, ids, tmp_path):
    mask = random_mask(net)
    export_compressed(net, mask, tmp_path / "out", tokenizer=tiny.tokenizer())
    handle = pf.attach(net, library_of(net, mask), keep_dense=False, tokenizer=tiny.tokenizer())
    expected = tokens(net, ids, custom_generate=handle.generate, personas=pf.Persona(mask="introvert", **persona))
    again = compressed(tmp_path / "out")
    with pf.attach(again, tiny.library(tiny.model(), masks=False)) as personas:
        own = pf.Persona(**persona) if persona else None
        assert torch.equal(tokens(again, ids, custom_generate=personas.generate, personas=own), expected)
    assert torch.equal(tokens(again, ids), tokens(net, ids))


@torch.no_grad()
def test_a_loaded_one_can_be_copied_saved_dense_and_cast(net, ids, tmp_path):
    mask = random_mask(net)
    export_compressed(net, mask, tmp_path / "out")
    again = load_compressed(tmp_path / "out")
    expected = again(ids).logits
    other = copy.deepcopy(again)
    for module in other.modules():
        if "_personafast_compressed" in module.__dict__:
            module.__dict__["_personafast_compressed"].values.zero_()
    assert torch.equal(again(ids).logits, expected) and not torch.allclose(other(ids).logits, expected)
    again.save_pretrained(tmp_path / "dense")
    torch.testing.assert_close(stock(tmp_path / "dense")(ids).logits, expected, rtol=1e-5, atol=1e-5)
    half = load_compressed(tmp_path / "out", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half(ids).logits.float(), expected, rtol=0.1, atol=0.1)
    with pytest.raises(pf.UnsupportedModelError, match=r"q_proj is not in memory \(meta"):
        export_masked(again, mask, tmp_path / "third")
    with pytest.raises(pf.UnsupportedModelError, match="not in memory"):
        pf.attach(again, library_of(net, mask))


def test_only_some_linears(net, tmp_path):
    net.generation_config.max_new_tokens = 7
    mask = random_mask(net, names=("mlp.up_proj", "0.self_attn.q_proj"))
    export_compressed(net, mask, tmp_path / "out")
    again = load_compressed(tmp_path / "out")
    assert again.generation_config.max_new_tokens == 7
    assert sum(p.is_meta for p in again.parameters()) == tiny.BLOCKS + 1
    for name, value in net.named_parameters():
        if name.removesuffix(".weight") not in mask.words:
            assert torch.equal(again.get_parameter(name), value)


def test_a_folder_that_holds_something_stays_unless_it_may_be_replaced(net, tmp_path, monkeypatch):
    mask = random_mask(net)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    (tmp_path / "file").write_text("x")
    for export in (export_masked, export_compressed):
        with pytest.raises(pf.PersonafastError, match=r"out: not empty; .*--replace"):
            export(net, mask, tmp_path / "out")
        with pytest.raises(pf.PersonafastError, match="file: a file; give a folder"):
            export(net, mask, tmp_path / "file", replace=True)
    monkeypatch.setattr(type(net.config), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("full")))
    for export in (export_masked, export_compressed):
        with pytest.raises(OSError, match="full"):
            export(net, mask, tmp_path / "out", replace=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "out", "thesis.txt"]
    monkeypatch.undo()
    export_masked(net, mask, tmp_path / "out", replace=True)
    assert not (tmp_path / "out" / "thesis.txt").exists()
    with pytest.raises(pf.PersonafastError, match="out: the model's own folder"):
        export_masked(stock(tmp_path / "out"), mask, tmp_path / "out", replace=True)


def test_what_does_not_fit_is_refused_and_nothing_is_written(net, tmp_path):
    path = "model.layers.0.self_attn.q_proj"
    good = random_mask(net)
    head = PersonaMask({"lm_head": torch.zeros(64, 1, dtype=torch.int32)}, {"lm_head": 32})
    narrow = PersonaMask({path: torch.zeros(32, 1, dtype=torch.int32)}, {path: 31})
    tall = PersonaMask({path: torch.zeros(33, 1, dtype=torch.int32)}, {path: 32})
    foreign = PersonaMask({"transformer.h.0.mlp": torch.zeros(4, 1, dtype=torch.int32)}, {"transformer.h.0.mlp": 32})
    cases = [
        (head, "'lm_head' is the head or an embedding, which is never masked"),
        (narrow, rf"{path} is \[32, 31\] there and \[32, 32\] in the model"),
        (tall, rf"{path} is \[33, 32\] there and \[32, 32\] in the model"),
        (foreign, r"covers 'transformer\.h\.0\.mlp', which the model lacks"),
        (PersonaMask({}, {}), "covers no linear"),
    ]
    for export in (export_masked, export_compressed):
        for mask, message in cases:
            with pytest.raises(pf.PersonafastError, match=message):
                export(net, mask, tmp_path / "out")
    with pytest.raises(pf.PersonafastError, match=r"gamma: 0\.5 .*export it dense"):
        export_compressed(net, good.with_metadata(gamma=0.5), tmp_path / "out")
    with pytest.raises(pf.UnsupportedModelError, match="part of a Conv1D, and only nn.Linear"):
        gpt2 = tiny.model("gpt2")
        export_compressed(gpt2, random_mask(gpt2), tmp_path / "out")
    net.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(pf.UnsupportedModelError, match="model: quantised"):
        export_masked(net, good, tmp_path / "out")
    del net.config.quantization_config
    integers = copy.deepcopy(net)
    linear = integers.get_submodule(path)
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(pf.UnsupportedModelError, match=rf"{path} is a Parameter of torch.int8 \(quantised"):
        export_masked(integers, good, tmp_path / "out")
    net.model.layers[0].mlp.up_proj.weight = net.model.layers[1].mlp.up_proj.weight
    with pytest.raises(pf.UnsupportedModelError, match="shares its weight with another module"):
        export_masked(net, good, tmp_path / "out")
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny.model(), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(pf.UnsupportedModelError, match="wrapped by PEFT; merge"):
        export_masked(wrapped, good, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def edit_record(folder, change):
    file = folder / "personafast.json"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


def edit_tensors(folder, change):
    from personafast._io import read_safetensors, write_safetensors

    file = folder / "compressed-00001.safetensors"
    tensors, metadata = read_safetensors(file)
    change(tensors)
    write_safetensors(file, tensors, metadata)


Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "personafast.json").unlink(), r"personafast\.json: no such file"),
        (lambda f: edit_record(f, lambda r: r.update(kind="masked")), "not a compressed checkpoint"),
        (lambda f: edit_record(f, lambda r: r.update(format_version=9)), "format_version 1"),
        (lambda f: edit_record(f, lambda r: r.update(files=["../x"])), "lacks its files or linears"),
        (lambda f: edit_record(f, lambda r: r["linears"].update(ghost=[3, 4])), r"ghost \[3, 4\] is not a linear"),
        (lambda f: (f / "config.json").unlink(), r"config\.json: cannot be read"),
        (lambda f: (f / "compressed-00001.safetensors").unlink(), r"compressed-00001\.safetensors: no such file"),
        (lambda f: edit_tensors(f, lambda t: t.pop(f"{Q}::bitmap")), "lacks the compressed weight of .*q_proj"),
        (lambda f: edit_tensors(f, lambda t: t.update({f"{Q}::values": t[f"{Q}::values"][:-1]})), "does not fit"),
        (lambda f: edit_tensors(f, lambda t: t[f"{Q}::row_offsets"].add_(-1)), "does not fit"),
        (lambda f: edit_tensors(f, lambda t: t.pop("lm_head.weight")), r"lacks the weight lm_head\.weight"),
        (lambda f: edit_tensors(f, lambda t: t.pop("model.norm.weight")), r"lacks the weight model\.norm\.weight"),
        (lambda f: edit_tensors(f, lambda t: t.pop(f"{Q[:-6]}bias")), r"lacks the weight .*q_proj\.bias"),
        (lambda f: edit_tensors(f, lambda t: t.update(ghost=torch.ones(1))), "holds 'ghost'"),
    ],
)
def test_a_damaged_checkpoint_is_named_in_one_line(tmp_path, damage, message):
    net = tiny.model("qwen2")
    export_compressed(net, random_mask(net), tmp_path / "out")
    assert is_compressed(tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(pf.FormatError, match=message) as caught:
        load_compressed(tmp_path / "out")
    assert "\n" not in str(caught.value)
