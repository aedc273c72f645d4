"""Masks over fused projections, transposed weights and experts, against weights that are multiplied by hand."""

import copy

import pytest
import torch
import transformers as t
from helpers import gates, tiny
from torch import nn

import personafast as pf
from personafast.errors import PersonafastError, UnsupportedModelError
from personafast.masks import PersonaMask, build_mask, calibrate
from personafast.masks.targets import find_targets
from personafast.models.reading import TokenizedText

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
A, B = pf.Persona(mask="a"), pf.Persona(mask="b")
MIXED = pf.Persona(mask={"a": 0.25, "b": 0.75})
ROWS = [A, None, B, MIXED]
SHARES = [{"a": 1.0}, {}, {"b": 1.0}, {"a": 0.25, "b": 0.75}]


def make(family):
    torch.manual_seed(0)
    config = {
        "mixtral": lambda: t.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
        "qwen3_moe": lambda: t.Qwen3MoeConfig(
            **COMMON, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8
        ),
        "gpt_oss": lambda: t.GptOssConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
        "phi3": lambda: t.Phi3Config(**COMMON),
    }[family]()
    net = t.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
            else:
                parameter.add_(0.1)
    net.generation_config.eos_token_id = None
    return net


def masks_of(net):
    """A hard mask over everything, and a soft one that leaves two linears and one expert alone."""
    texts = [TokenizedText(list(range(3 + shift, 30 + shift)), 20) for shift in (0, 20)]
    a = build_mask(net, calibrate(net, texts[:1]), experts=True)
    b = build_mask(net, calibrate(net, texts[1:]), experts=True, sparsity=0.3, gamma=0.4)
    words = {path: own for path, own in b.words.items() if not path.endswith(("o_proj", "down_proj.1"))}
    return {"a": a, "b": PersonaMask(words, {path: b.in_features[path] for path in words}, b.metadata)}


def gated(net, masks, shares):
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for path, target in find_targets(twin).items():
            found = gates.gate(masks, shares, path)
            if found is not None:
                target.weight().mul_(found)
    return twin


def library_of(net, masks):
    library = pf.PersonaLibrary(tiny.anatomy(net).shape)
    for name, mask in masks.items():
        library.add_mask(name, mask)
    return library


@pytest.fixture
def ids():
    return torch.randint(3, 64, (4, 6), generator=torch.Generator().manual_seed(4))


@torch.no_grad()
@pytest.mark.parametrize("family", ["phi3", "mixtral", "qwen3_moe", "gpt_oss"])
def test_rows_have_experts_and_fused_projections_of_their_own(family, ids):
    net = make(family)
    masks = masks_of(net)
    expected = [
        (gated(net, masks, shares) if shares else net)(ids[row : row + 1]).logits[0]
        for row, shares in enumerate(SHARES)
    ]
    layout = {name: parameter.stride() for name, parameter in net.named_parameters()}
    values = {name: parameter.clone() for name, parameter in net.named_parameters()}
    with pf.attach(net, library_of(net, masks)):
        found = net(ids, personas=ROWS).logits
        again = net(ids[:1]).logits
    torch.testing.assert_close(found, torch.stack(expected), rtol=2e-4, atol=2e-4)
    torch.testing.assert_close(again, net(ids[:1]).logits, rtol=2e-4, atol=2e-4)
    assert {name: parameter.stride() for name, parameter in net.named_parameters()} == layout
    assert all(torch.equal(parameter, values[name]) for name, parameter in net.named_parameters())


@torch.no_grad()
@pytest.mark.usefixtures("reference_backend")
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_texts_of_masked_experts_are_those_of_the_models_multiplied_by_hand(family, ids):
    net = make(family)
    masks = masks_of(net)
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = [
        (gated(net, masks, shares) if shares else net).generate(ids[row : row + 1], **options)[0]
        for row, shares in enumerate(SHARES)
    ]
    with pf.attach(net, library_of(net, masks)) as handle:
        found = net.generate(ids, custom_generate=handle.generate, personas=ROWS, **options)
    assert torch.equal(found, torch.stack(expected))


class Expert(nn.Module):
    def __init__(self, up, down, act):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(*up.shape[::-1]), nn.Linear(*down.shape[::-1]), act
        self.up.weight.data.copy_(up)
        self.down.weight.data.copy_(down)

    def forward(self, x):
        gate, up = self.up(x).chunk(2, -1)
        return self.down(self.act(gate) * up)


class Listed(nn.Module):
    """A Mixtral MLP whose experts are modules of their own and see the tokens that the router picks."""

    def __init__(self, mlp):
        super().__init__()
        held = mlp.experts
        self.gate = mlp.gate
        self.experts = nn.ModuleList(
            Expert(held.gate_up_proj[index].detach(), held.down_proj[index].detach(), held.act_fn) for index in range(4)
        )

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, scores, index = self.gate(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            place, token = torch.where(index.t() == number)
            out.index_add_(0, token, expert(flat[token]) * scores[token, place, None])
        return out.view_as(hidden)


@pytest.fixture
def listed():
    net = make("mixtral")
    for layer in net.model.layers:
        layer.mlp = Listed(layer.mlp)
    return net


@torch.no_grad()
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "recorded"])
def test_experts_of_their_own_speak_through_one_mask_a_call(listed, ids, graphs):
    masks = {"a": gates.random_mask(listed, 1), "b": gates.random_mask(listed, 2, gamma=0.4)}
    options = {"max_new_tokens": 4, "do_sample": False}
    plain = copy.deepcopy(listed)
    pf.attach(listed, library_of(listed, masks), graphs=graphs)
    handle = listed.__dict__["_personafast_handle"]
    for persona, shares in ((A, SHARES[0]), (MIXED, SHARES[3])):
        twin = gated(plain, masks, shares)
        torch.testing.assert_close(listed(ids, personas=[persona] * 4).logits, twin(ids).logits, rtol=2e-4, atol=2e-4)
        with pf.ops.use_backend("reference"), pytest.warns() if graphs and persona is A else nothing():
            found = listed.generate(ids, custom_generate=handle.generate, personas=persona, **options)
        assert torch.equal(found, twin.generate(ids, **options))
    for personas in ([A, A, A, B], [A, A, A, None]):
        with pytest.raises(UnsupportedModelError, match=r"mlp.experts.0.up was called .*same mask.*leave this linear"):
            listed(ids, personas=personas)


def nothing():
    import contextlib

    return contextlib.nullcontext()


@torch.no_grad()
def test_an_expert_that_gets_as_many_tokens_as_the_batch_has_is_not_taken_for_the_batch(listed, ids):
    # Every token goes to expert 0 as its first or second choice: as many rows as the batch has, in another order.
    for layer in listed.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, args, out: (out[0], out[1], crossed(out[2])))
    masks = {"a": gates.random_mask(listed, 1), "b": gates.random_mask(listed, 2)}
    pf.attach(listed, library_of(listed, masks))
    with pytest.raises(UnsupportedModelError, match=r"experts.0.up was called with shape \[12, 32\], which does not"):
        listed(ids[:2], personas=[A, B])


def crossed(index):
    index = index.clone()
    index[0::2] = torch.tensor([0, 1])
    index[1::2] = torch.tensor([1, 0])
    return index


def test_fused_experts_cannot_be_compressed_and_say_so(ids):
    net = make("mixtral")
    library = library_of(net, {"a": masks_of(net)["a"]})
    with pytest.raises(UnsupportedModelError, match=r"keep_dense: .*experts.gate_up_proj.0 lies in one parameter"):
        pf.attach(net, library, keep_dense=False)
    wrong = PersonaMask(
        {"model.layers.0.mlp.experts.down_proj.9": torch.zeros(32, 2, dtype=torch.int32)},
        {"model.layers.0.mlp.experts.down_proj.9": 48},
    )
    with pytest.raises(PersonafastError, match=r"down_proj.9', which the model lacks"):
        pf.attach(net, library_of(net, {"wrong": wrong}))


@torch.no_grad()
def test_gpt2_is_masked_without_a_second_copy_of_its_weights(tmp_path, ids):
    net = tiny.model("gpt2")
    mask = gates.random_mask(net, 1)
    expected = gates.gated(net, {"a": mask}, {"a": 1.0})(ids).logits
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    identity = {name: id(parameter) for name, parameter in net.named_parameters()}
    handle = pf.attach(net, library_of(net, {"a": mask}))
    weight = net.transformer.h[0].attn.c_attn.weight
    assert weight.shape == (32, 96)
    assert weight.t().is_contiguous()
    assert weight.untyped_storage().nbytes() == 4 * 32 * 96
    assert {name: id(parameter) for name, parameter in net.named_parameters()} == identity
    net.save_pretrained(tmp_path / "saved")
    handle.detach()
    assert weight.is_contiguous()
    assert all(torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())
    again = t.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(parameter, before[name]) for name, parameter in again.named_parameters())
    pf.attach(net, library_of(net, {"a": mask}), keep_dense=False)
    torch.testing.assert_close(net(ids, personas=[A] * 4).logits, expected, rtol=2e-4, atol=2e-4)
    with pytest.warns(UserWarning, match="given up"):
        net.__dict__["_personafast_handle"].detach()
    torch.testing.assert_close(net(ids).logits, expected, rtol=2e-4, atol=2e-4)
    assert weight.shape == net.transformer.h[0].attn.c_attn.weight.shape
