"""Vectors and policies on quantised linears: a stand-in for their many forms, and the real packages where installed."""

import pytest
import torch
import torch.nn.functional as F
from helpers import families, tiny
from torch import nn

import personafast as pf
from personafast.masks import PersonaMask
from personafast.models.anatomy import anatomy, is_linear, linear_features
from personafast.models.reading import TokenizedText
from personafast.models.rows import RowSlots
from personafast.vectors.extract import mean_activations
from personafast.vectors.state import model_settings

pytestmark = [pytest.mark.usefixtures("reference_backend"), pytest.mark.filterwarnings("ignore")]
IDS = torch.tensor([[5, 9, 3, 7], [8, 4, 6, 10]])


class QuantLinear(nn.Module):
    """int8 weights and a scale a row, under names of its own, and no floating-point parameter before them."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.qweight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scales", scale)

    def forward(self, x):
        return F.linear(x, (self.qweight * self.scales).to(x.dtype))


class PackedLinear(nn.Linear):
    """A subclass of nn.Linear whose weight is uint8 of another shape."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta")
        low, high = float(linear.weight.min()), float(linear.weight.max())
        self.range = (low, (high - low) / 255)
        packed = ((linear.weight.detach() - low) / self.range[1]).round().to(torch.uint8)
        self.weight = nn.Parameter(packed.reshape(-1, 1), requires_grad=False)

    def forward(self, x):
        weight = self.weight.reshape(self.out_features, self.in_features) * self.range[1] + self.range[0]
        return F.linear(x, weight.to(x.dtype))


def quantised(kind, net):
    """The model with every linear of its blocks replaced: the first parameter of a block is then the quantiser's."""
    for path, linear in anatomy(net).linears.items():
        parent, _, name = path.rpartition(".")
        setattr(net.get_submodule(parent), name, kind(linear))
    return net


def bitsandbytes(bits):
    def make(folder):
        pytest.importorskip("bitsandbytes")
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        families.build("llama", hidden_size=64, head_dim=16, intermediate_size=64).save_pretrained(folder)
        config = BitsAndBytesConfig(
            load_in_8bit=bits == 8, load_in_4bit=bits == 4, bnb_4bit_compute_dtype=torch.float32
        )
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
        )

    return make


def torchao(folder):
    ao = pytest.importorskip("torchao.quantization")
    net = families.build("llama")
    ao.quantize_(net.model, ao.Int8WeightOnlyConfig())
    return net


def compressed_tensors(bits):
    def make(folder):
        ct = pytest.importorskip("compressed_tensors.quantization")
        from compressed_tensors.compressors import ModelCompressor

        net = families.build("llama", intermediate_size=64)
        weights = ct.QuantizationArgs(num_bits=bits, symmetric=True, strategy="group", group_size=32)
        scheme = ct.QuantizationScheme(targets=["Linear"], weights=weights)
        config = ct.QuantizationConfig(
            config_groups={"all": scheme}, ignore=["lm_head"], quantization_status="compressed", format="pack-quantized"
        )
        ct.apply_quantization_config(net, config)
        for linear in anatomy(net).linears.values():
            width = linear.weight.shape[1] // 32
            scale = linear.weight.detach().reshape(-1, width, 32).abs().amax(-1) / (2 ** (bits - 1) - 1)
            linear.weight_scale.data.copy_(scale)
        ModelCompressor.from_pretrained_model(net).compress_model(net)
        return net

    return make


MODELS = {
    "own class": lambda _: quantised(QuantLinear, families.build("llama")),
    "subclass": lambda _: quantised(PackedLinear, families.build("llama")),
    "bitsandbytes 8 bit": bitsandbytes(8),
    "bitsandbytes 4 bit": bitsandbytes(4),
    "torchao int8": torchao,
    "compressed-tensors 4 bit": compressed_tensors(4),
    "compressed-tensors 8 bit": compressed_tensors(8),
}


@pytest.fixture(params=MODELS, ids=[name.replace(" ", "-") for name in MODELS])
def net(request, tmp_path):
    return MODELS[request.param](tmp_path).eval()


@torch.no_grad()
def logits(net, ids=IDS):
    first = net(input_ids=ids, use_cache=True)
    step = net(input_ids=ids[:, :1], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits, step.logits], dim=1)


def library_of(net):
    parts = anatomy(net)
    found = pf.PersonaLibrary(parts.shape)
    directions = torch.randn(len(parts.blocks), parts.shape.hidden_size, generator=torch.Generator().manual_seed(2))
    found.add_vector("creative", directions, blocks=range(len(parts.blocks)))
    return found, directions


def test_vectors_act_at_the_blocks_of_a_quantised_model(net):
    plain = logits(net)
    library, directions = library_of(net)
    hooks = [
        block.register_forward_hook(lambda _, __, output, row=row: output + row)
        for block, row in zip(anatomy(net).blocks, directions, strict=True)
    ]
    hand = logits(net)
    for hook in hooks:
        hook.remove()
    with pf.attach(net, library) as personas:
        nobody = logits(net)
        with personas.using([pf.Persona(vectors={"creative": 1.0})] * 2):
            steered = logits(net)
    assert torch.equal(steered, hand) and not torch.equal(hand, plain)
    assert torch.equal(nobody, plain) and torch.equal(logits(net), plain)


def test_all_linears_of_a_quantised_model_are_found(net):
    usual = anatomy(families.build("llama", hidden_size=64, head_dim=16, intermediate_size=64)).linears
    found = anatomy(net).linears
    assert set(found) == set(usual)
    hidden = anatomy(net).shape.hidden_size
    assert linear_features(found["model.layers.0.self_attn.q_proj"])[1] == hidden
    assert linear_features(found["model.layers.1.mlp.down_proj"])[0] == hidden


def test_policies_act_on_quantised_linears(net):
    library, _ = library_of(net)
    library.add_policy("formal", tiny.policy(net, 1, scale=0.3))
    factors = library.policies["formal"].factors
    hooks = []
    for path, linear in anatomy(net).linears.items():

        def add(_, args, output, f=factors[path]):
            return output + f.scale * (args[0] @ f.a.T @ f.b.T)

        hooks.append(linear.register_forward_hook(add))
    hand = logits(net)
    for hook in hooks:
        hook.remove()
    plain = logits(net)
    with pf.attach(net, library) as personas:
        personas.cast.refresh()
        with personas.cast.patch.rows(RowSlots.of([(), ()], [-1, -1], [0, -1])):
            ours = logits(net)
    torch.testing.assert_close(ours[0], hand[0], rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(ours[1], plain[1], rtol=2e-4, atol=2e-4)
    assert not torch.allclose(hand[0], plain[0], atol=1e-2)


def test_a_policy_speaks_through_generate_on_a_quantised_model(net):
    library, _ = library_of(net)
    library.add_policy("formal", tiny.policy(net, 1, scale=0.3))
    options = {"max_new_tokens": 3, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    plain = net.generate(IDS, **options)
    with pf.attach(net, library) as personas:
        own = net.generate(IDS, **options, custom_generate=personas.generate, personas=[None, None])
        policy = pf.Persona(policies={"formal": 1.0}, vectors={"creative": 1.0})
        other = net.generate(IDS, **options, custom_generate=personas.generate, personas=[policy, None])
    assert torch.equal(own, plain) and torch.equal(other[1], plain[1])
    assert not torch.equal(other[0], plain[0])


def test_masks_refuse_quantised_linears_by_name(net):
    parts = anatomy(net)
    library = pf.PersonaLibrary(parts.shape)
    path = "model.layers.0.mlp.up_proj"
    outputs, inputs = linear_features(parts.linears[path])
    words = torch.zeros(outputs, -(-inputs // 32), dtype=torch.int32)
    library.add_mask("introvert", PersonaMask({path: words}, {path: inputs}, {}))
    plain = logits(net)
    for keep_dense in (True, False):
        with pytest.raises(pf.UnsupportedModelError, match=f"masks: .*{path}.*masks need"):
            pf.attach(net, library, keep_dense=keep_dense)
    assert torch.equal(logits(net), plain)


def test_a_wrapper_of_a_linear_is_none():
    peft = pytest.importorskip("peft")
    net = quantised(QuantLinear, families.build("llama"))
    linear = net.model.layers[0].mlp.up_proj
    wrapper = nn.Module()
    wrapper.in_features, wrapper.out_features, wrapper.base_layer = 4, 4, linear
    assert is_linear(linear) and not is_linear(wrapper)
    plain = peft.get_peft_model(families.build("llama"), peft.LoraConfig(target_modules=["q_proj"]))
    assert set(anatomy(plain).linears) == set(anatomy(net).linears)


def test_texts_are_read_off_a_quantised_model(net):
    rows = [[5, 9, 3, 7], [8, 4, 6]]
    found = mean_activations(net, [TokenizedText(ids, len(ids) - 1) for ids in rows])
    with torch.no_grad():
        states = [net(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in rows]
    for block in range(len(anatomy(net).blocks) - 1):
        hand = torch.stack([each[block + 1][0, 1:].double().mean(dim=0) for each in states]).mean(dim=0)
        torch.testing.assert_close(found[block], hand, rtol=1e-4, atol=1e-5)
    # A state folder tells it from another model.
    assert model_settings(net) == model_settings(net) != model_settings(families.build("llama"))
