"""Mixtures of experts, fused projections, transposed weights: an expert sees its own tokens, padding sees none."""

import pytest
import torch
import transformers as t
from torch import nn

import personafast as pf
from personafast.masks import build_mask, calibrate
from personafast.masks.targets import Target, block_of, find_targets, module_kind, short_name
from personafast.models.reading import TokenizedText

TEXTS = [TokenizedText([3, 4, 5, 6, 7], 2), TokenizedText([8, 9, 10], 3), TokenizedText([11, 12, 13, 14, 15, 16], 4)]
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


def make(family, chosen=2):
    torch.manual_seed(0)
    config = {
        "mixtral": lambda: t.MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=chosen),
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
                parameter.mul_(6)
    return net


class Experts(nn.Module):
    """A Mixtral MLP whose experts are modules of their own, as in checkpoints' own code, with the fused weights."""

    def __init__(self, fused):
        super().__init__()
        self.gate, self.act = fused.gate, fused.experts.act_fn
        self.experts = nn.ModuleList(self.expert(fused.experts, index) for index in range(4))

    @staticmethod
    def expert(experts, index):
        gate_up, down = experts.gate_up_proj[index], experts.down_proj[index]
        part = nn.Module()
        for name, weight in (("gate_up", gate_up), ("down", down)):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data.copy_(weight)
            setattr(part, name, linear)
        return part

    def forward(self, hidden):
        flat = hidden.reshape(-1, hidden.shape[-1])
        _, scores, index = self.gate(flat)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, place = (part.flip(0) for part in (index == number).nonzero(as_tuple=True))
            if len(token):
                gate, up = expert.gate_up(flat[token]).chunk(2, -1)
                out.index_add_(0, token, expert.down(self.act(gate) * up) * scores[token, place, None])
        return out.view_as(hidden)


def with_listed_experts(net):
    for layer in net.model.layers:
        layer.mlp = Experts(layer.mlp)
    return net


def routed(net, tokens):
    """(block, expert) -> the counted inputs of its up projection, from the routers; the texts run alone."""
    seen = {}
    blocks = [layer.mlp for layer in net.model.layers]
    with torch.no_grad():
        for text in TEXTS:
            inputs = {}
            hooks = [
                mlp.register_forward_pre_hook(lambda _, args, b=b, at=inputs: at.__setitem__(b, args[0][0]))
                for b, mlp in enumerate(blocks)
            ]
            net(torch.tensor([text.ids]), use_cache=False)
            for hook in hooks:
                hook.remove()
            for b, x in inputs.items():
                router = blocks[b].router if hasattr(blocks[b], "router") else blocks[b].gate
                index = router(x)[-1]
                count = text.response if tokens == "response" else len(text.ids)
                x, index = x[-count:].double(), index[-count:]
                for expert in range(4):
                    mine = x[(index == expert).any(1)]
                    if len(mine):
                        seen.setdefault((b, expert), []).append(mine)
    return seen


def check(found, path, parts):
    rows = torch.cat(parts)
    sums = found.sums[path]
    assert (sums.tokens, sums.samples) == (len(rows), len(parts))
    for name, expected in (
        ("mean_abs", rows.abs().mean(0)),
        ("l2", rows.norm(dim=0)),
        ("sample_l2", torch.stack([part.norm(dim=0) for part in parts]).mean(0)),
    ):
        torch.testing.assert_close(found.of(name)[path], expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("tokens", ["response", "all"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_fused_expert_counts_its_own_tokens(family, tokens, side):
    net = make(family)
    found = calibrate(net, TEXTS, tokens=tokens, padding_side=side)
    expected = routed(net, tokens)
    for b in range(2):
        for expert in range(4):
            path = f"model.layers.{b}.mlp.experts.gate_up_proj.{expert}"
            if (b, expert) in expected:
                check(found, path, expected[b, expert])
            else:
                assert found.sums[path].tokens == 0
            down = path.replace("gate_up_proj", "down_proj")
            assert found.sums[down].tokens == found.sums[path].tokens


# Where all four experts are chosen, each sees as many rows as the batch has, in an order of its own.
@pytest.mark.parametrize("chosen", [2, 4])
@pytest.mark.parametrize("tokens", ["response", "all"])
def test_experts_in_a_list_see_what_fused_ones_see(tokens, chosen):
    fused = make("mixtral", chosen)
    expected = calibrate(fused, TEXTS, tokens=tokens)
    listed = with_listed_experts(make("mixtral", chosen))
    found = calibrate(listed, TEXTS, tokens=tokens)
    for b in range(2):
        for expert in range(4):
            for ours, theirs in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
                path = f"model.layers.{b}.mlp.experts.{expert}.{ours}"
                same = expected.sums[f"model.layers.{b}.mlp.experts.{theirs}.{expert}"]
                if same.tokens == 0:
                    assert found.sums[path].tokens == 0
                    continue
                assert (found.sums[path].tokens, found.sums[path].samples) == (same.tokens, same.samples)
                for name in ("mean_abs", "l2", "sample_l2"):
                    torch.testing.assert_close(found.of(name)[path], same.of(name), atol=2e-4, rtol=2e-4)
    for path in ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj"):
        torch.testing.assert_close(found[path], expected[path], atol=2e-4, rtol=2e-4)
        assert found.sums[path].tokens == expected.sums[path].tokens


def test_what_the_down_projections_read_is_what_the_model_computes():
    net = make("gpt_oss")  # a gate of its own, biases, weights as [in, out]
    experts = net.model.layers[0].mlp.experts
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1))
    from personafast.masks.targets import expert_inputs

    with torch.no_grad():
        down = expert_inputs(experts, 2, x)["down_proj"]
        ours = down @ experts.down_proj[2] + experts.down_proj_bias[2]
        index, one = torch.full((5, 1), 2), torch.ones(5, 1)
        torch.testing.assert_close(ours, experts(x, index, one), atol=1e-4, rtol=1e-4)


def test_masks_of_experts_are_left_out_by_name_or_made_one_by_one():
    net = make("qwen3_moe")
    found = calibrate(net, TEXTS)
    attention = build_mask(net, found)
    assert all("self_attn" in path for path in attention.words)
    names = [f"model.layers.{b}.mlp.experts.{name}" for b in range(2) for name in ("down_proj", "gate_up_proj")]
    assert attention.metadata["left_out"] == names
    whole = build_mask(net, found, experts=True, sparsity=0.25)
    assert "left_out" not in whole.metadata and len(whole.words) == 2 * (4 + 4 * 2)
    unseen = [path for path, sums in found.sums.items() if sums.tokens == 0]
    assert whole.metadata.get("unseen", []) == unseen
    experts = net.model.layers[1].mlp.experts
    for expert in range(4):
        path = f"model.layers.1.mlp.experts.gate_up_proj.{expert}"
        score = experts.gate_up_proj[expert].detach().abs().double()
        if path not in unseen:
            score = score * found[path]
        order = score.argsort(dim=1, descending=True, stable=True)[:, :24]
        assert torch.equal(whole.dense(path), torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True))


def test_experts_that_no_token_reached_are_masked_by_magnitude():
    net = make("mixtral")
    found = calibrate(net, [TokenizedText([5], 1)])
    mask = build_mask(net, found, experts=True)
    assert len(mask.metadata["unseen"]) == 2 * 2 * 2  # two of four experts a block, two projections each
    path = mask.metadata["unseen"][0]
    score = find_targets(net)[path].weight().abs().double()
    order = score.argsort(dim=1, descending=True, stable=True)[:, : score.shape[1] // 2]
    assert torch.equal(mask.dense(path), torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True))


def test_experts_of_an_unknown_layout_are_left_out_by_name():
    net = make("mixtral")
    net.model.layers[1].mlp.experts.register_parameter("third_proj", nn.Parameter(torch.zeros(4, 8, 32)))
    mask = build_mask(net, calibrate(net, TEXTS), experts=True)
    left = [f"model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj", "third_proj")]
    assert mask.metadata["left_out"] == left
    assert not any(path.startswith("model.layers.1.mlp") for path in mask.words)


def test_fused_projections_are_one_linear():
    net = make("phi3")
    mask = build_mask(net, calibrate(net, TEXTS))
    assert {short_name(path) for path in mask.words} == {
        "self_attn.qkv_proj",
        "self_attn.o_proj",
        "mlp.gate_up_proj",
        "mlp.down_proj",
    }
    assert mask.words["model.layers.0.self_attn.qkv_proj"].shape == (32 + 2 * 16, 1)


def test_a_target_is_a_view_of_the_weight():
    for net in (make("gpt_oss"), t.AutoModelForCausalLM.from_config(t.GPT2Config(**GPT2))):
        for path, target in find_targets(net).items():
            assert target.weight().shape == target.features
            target.weight().zero_()
            whole = dict(net.named_parameters())
            name = path.rpartition(".")[0] if target.expert is not None else f"{path}.weight"
            part = whole[name] if target.expert is None else whole[name][target.expert]
            assert not bool(part.any())


GPT2 = {"vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}


def test_names():
    assert (block_of("model.layers.12.mlp.experts.down_proj.3"), block_of("x")) == (12, 0)
    assert short_name("model.layers.12.mlp.experts.down_proj.3") == "mlp.experts.down_proj"
    assert short_name("transformer.h.0.attn.c_attn") == "attn.c_attn"
    assert module_kind("gpt_neox.layers.0.attention.dense") == "attention"
    assert module_kind("transformer.h.0.mlp.c_fc") == "mlp"
    assert Target("model.layers.0.mlp.up_proj", nn.Linear(2, 3), "weight", (3, 2)).kind == "mlp"


def test_rows_of_other_tokens_than_the_batchs_are_refused():
    net = make("mixtral")
    mlp = net.model.layers[0].mlp
    inner = mlp.experts.forward
    mlp.experts.register_forward_pre_hook(lambda _, args: tuple(part[:-1] for part in args), prepend=True)
    mlp.experts.forward = lambda x, *rest: nn.functional.pad(inner(x, *rest), (0, 0, 0, 1))
    with pytest.raises(pf.PersonafastError, match=r"model\.layers\.0\.mlp\.experts was called with other tokens"):
        calibrate(net, TEXTS)
