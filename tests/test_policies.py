"""`PolicySet`: what it takes out of live models is what they compute, and what does not belong together is named."""

import copy
import json
import math
import socket

import pytest
import torch
from helpers import tiny
from torch import nn

import personafast as pf
from personafast import ops
from personafast.density.lora import LoraPolicy
from personafast.models.anatomy import anatomy
from personafast.policies import Policy

pytestmark = pytest.mark.filterwarnings("ignore")

IDS = torch.randint(3, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(4))
ADAPTERS = {
    "plain": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj"]},
    "rslora": {"r": 9, "lora_alpha": 5, "use_rslora": True, "target_modules": "all-linear"},
    "patterns": {
        "r": 3,
        "lora_alpha": 7,
        "target_modules": ["k_proj", "down_proj", "o_proj"],
        "rank_pattern": {"down_proj": 5, "layers.1.self_attn.k_proj": 2},
        "alpha_pattern": {"k_proj": 1, "layers.2.mlp.down_proj": 20},
    },
    "one block": {"r": 2, "target_modules": ["v_proj"], "layers_to_transform": [1], "lora_dropout": 0.5},
}


def randomise(net, seed=0):
    """New adapters have B = 0 and would all be the reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for path, parameter in net.named_parameters():
            if ".lora_" in path:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def wrap(net, adapters, **more):
    peft = pytest.importorskip("peft")
    configs = {name: peft.LoraConfig(**options, **more) for name, options in adapters.items()}
    names = list(configs)
    wrapped = peft.get_peft_model(net, configs[names[0]], adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, configs[name])
    randomise(wrapped)
    return wrapped.eval()


@torch.no_grad()
def logits(net):
    return net(IDS, use_cache=False).logits


@torch.no_grad()
def with_factors(plain, policy):
    """Logits of a model without adapters, with a policy's factors added by hand."""
    linears = anatomy(plain).linears

    def update(factors):
        return lambda _, args, out: out + factors.scale * (args[0] @ factors.a.T @ factors.b.T)

    hooks = [linears[path].register_forward_hook(update(found)) for path, found in policy.factors.items()]
    out = logits(plain)
    for hook in hooks:
        hook.remove()
    return out


def check_against_peft(plain, wrapped, policies, names):
    assert list(policies) == names
    seen = []
    for name in names:
        wrapped.set_adapter(name)
        expected = logits(wrapped)
        member = policies[name]
        assert (member.name, member.kind, member.model, member.prompt) == (name, "adapter", None, None)
        torch.testing.assert_close(with_factors(plain, member.lora), expected, rtol=1e-5, atol=1e-5)
        seen.append(expected)
    for i, one in enumerate([logits(plain), *seen]):
        assert not any(torch.allclose(one, other, atol=1e-2) for other in seen[i:])


def test_adapters_compute_what_peft_computes(net):
    plain = copy.deepcopy(net)
    wrapped = wrap(net, ADAPTERS)
    policies = pf.PolicySet.from_adapters(wrapped)
    check_against_peft(plain, wrapped, policies, list(ADAPTERS))
    assert policies.model is wrapped and policies.reference is net and policies.models == ()
    ranks = {path.split("layers.")[1]: f.a.shape[0] for path, f in policies["patterns"].lora.factors.items()}
    assert ranks["1.self_attn.k_proj"] == 2 and ranks["0.self_attn.k_proj"] == 3 and ranks["0.mlp.down_proj"] == 5
    assert {path.split("layers.")[1] for path in policies["one block"].lora.factors} == {"1.self_attn.v_proj"}


def test_adapters_of_a_model_with_transposed_linears():
    net = tiny.model("gpt2")
    plain = copy.deepcopy(net)
    adapters = {"a": {"r": 3, "target_modules": ["c_attn"]}, "b": {"r": 2, "target_modules": ["c_proj", "c_fc"]}}
    wrapped = wrap(net, adapters, fan_in_fan_out=True)
    check_against_peft(plain, wrapped, pf.PolicySet.from_adapters(wrapped), ["a", "b"])


def test_adapters_that_transformers_itself_holds(net):
    peft = pytest.importorskip("peft")
    plain = copy.deepcopy(net)
    for name, options in ADAPTERS.items():
        net.add_adapter(peft.LoraConfig(**options), name)
    randomise(net)
    net.eval()
    policies = pf.PolicySet.from_adapters(net, names=["patterns", "plain"])
    check_against_peft(plain, net, policies, ["patterns", "plain"])
    assert policies.model is net and policies.reference is net
    with policies.bypass():
        assert torch.equal(logits(net), logits(plain))


def test_factors_are_copies(net):
    wrapped = wrap(net, {"a": ADAPTERS["plain"]})
    policy = pf.PolicySet.from_adapters(wrapped)["a"].lora
    before = {path: (f.a.clone(), f.b.clone()) for path, f in policy.factors.items()}
    randomise(wrapped, seed=1)
    for path, (a, b) in before.items():
        assert torch.equal(policy.factors[path].a, a) and torch.equal(policy.factors[path].b, b)
        assert not policy.factors[path].a.requires_grad


@pytest.mark.parametrize("name", ["rslora", "patterns", "plain"])
def test_an_adapter_survives_a_library_on_disk(net, tmp_path, name):
    wrapped = wrap(net, ADAPTERS)
    # A scale set after training is in no configuration.
    next(m for m in wrapped.modules() if name in getattr(m, "lora_A", ())).scaling[name] = 0.375
    policy = pf.PolicySet.from_adapters(wrapped, [name])[name].lora
    library = pf.PersonaLibrary(anatomy(net).shape)
    library.add_policy("taken", policy)
    library.save_pretrained(tmp_path / "library")
    again = pf.PersonaLibrary.from_pretrained(tmp_path / "library").policies["taken"]
    assert again.factors.keys() == policy.factors.keys() and policy.vocab_size == tiny.VOCAB
    assert 0.375 in [factors.scale for factors in policy.factors.values()]
    for path, factors in policy.factors.items():
        assert again.factors[path].scale == pytest.approx(factors.scale, rel=1e-12)
        assert torch.equal(again.factors[path].a, factors.a) and torch.equal(again.factors[path].b, factors.b)
    json.dumps(dict(policy.config))


def refused(model, message, **call):
    with pytest.raises(pf.PersonafastError, match=message) as caught:
        pf.PolicySet.from_adapters(model, **call)
    assert "\n" not in str(caught.value)


def test_unknown_adapters_and_models_without_any(net):
    refused(net, "holds no adapters; load them with PEFT, or use PolicySet.from_models")
    wrapped = wrap(net, {"formal": ADAPTERS["plain"], "calm": ADAPTERS["rslora"]})
    refused(wrapped, "names: no adapter 'warm' in the model; there are: calm, formal", names=["formal", "warm"])
    refused(wrapped, "names: empty", names=[])
    assert list(pf.PolicySet.from_adapters(wrapped, "formal")) == ["formal"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "use_dora=True is more than plain LoRA"),
        ({"lora_bias": True}, "lora_bias=True is more than plain LoRA"),
        ({"bias": "lora_only"}, "bias='lora_only' is more than plain LoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* is more than plain LoRA"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices=.* is more than plain LoRA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changed the base weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changed the base weights"),
        ({"target_modules": ["embed_tokens"]}, "adapts 'model.embed_tokens', which is no linear of the decoder's bl"),
        ({"target_modules": ["lm_head"]}, "adapts 'lm_head', which is no linear of the decoder's blocks"),
    ],
)
def test_more_than_plain_lora_is_refused_by_name(net, options, message):
    wrapped = wrap(net, {"odd": {"r": 2, "target_modules": ["q_proj"], **options}})
    refused(wrapped, rf"adapters\['odd'\]: {message}")


def test_a_variant_that_only_the_layer_knows_is_refused(net):
    wrapped = wrap(net, {"odd": {"r": 2, "target_modules": ["q_proj"], "use_dora": True}})
    wrapped.peft_config["odd"].use_dora = False
    refused(wrapped, r"adapters\['odd'\]: .*q_proj computes DoraLinearVariant")


def test_an_adapter_that_spoils_the_reference_is_refused_even_unasked(net):
    plain = {"r": 2, "target_modules": ["q_proj"]}
    wrapped = wrap(net, {"good": plain, "odd": {**plain, "init_lora_weights": "pissa"}})
    refused(wrapped, r"adapters\['odd'\]: init_lora_weights", names=["good"])


def test_one_that_is_only_more_than_plain_does_not_spoil_the_others(net):
    plain = copy.deepcopy(net)
    options = {"r": 2, "target_modules": ["q_proj"]}
    wrapped = wrap(net, {"good": options, "dora": {**options, "use_dora": True}, "saved": options})
    policies = pf.PolicySet.from_adapters(wrapped, ["good"])
    wrapped.set_adapter("dora")
    with policies.bypass():
        assert torch.equal(logits(wrapped), logits(plain))


def test_other_kinds_of_adapters_are_refused(net):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(net, peft.LoHaConfig(r=2, target_modules=["q_proj"]), adapter_name="loha")
    refused(wrapped, r"adapters\['loha'\]: peft_type 'LOHA' is not supported; train with LORA")


def test_a_merged_adapter_is_refused_until_it_is_unmerged(net):
    wrapped = wrap(net, {"a": ADAPTERS["plain"], "b": ADAPTERS["rslora"]})
    policies = pf.PolicySet.from_adapters(wrapped)
    wrapped.merge_adapter(["a"])
    refused(wrapped, r"adapter 'a' is merged into .*; call unmerge_adapter\(\)", names=["b"])
    with pytest.raises(pf.PersonafastError, match="adapter 'a' is merged into"), policies.bypass():
        pass
    assert not any("forward" in module.__dict__ for module in wrapped.modules())
    wrapped.unmerge_adapter()
    assert list(pf.PolicySet.from_adapters(wrapped)) == ["a", "b"]


def test_factors_that_are_no_numbers_or_not_there_are_refused(net):
    wrapped = wrap(net, {"a": ADAPTERS["plain"]})
    layer = anatomy(net).blocks[1].self_attn.q_proj
    kept = layer.lora_A["a"].weight
    layer.lora_A["a"].weight = nn.Parameter(torch.full_like(kept, math.nan))
    refused(wrapped, r"adapters\['a'\]: .*layers.1.self_attn.q_proj holds NaN or infinity")
    layer.lora_A["a"].weight = nn.Parameter(torch.empty_like(kept, device="meta"))
    refused(wrapped, r"adapters\['a'\]: .*layers.1.self_attn.q_proj is not in memory")
    layer.lora_A["a"].weight = kept
    for wrapper in wrapped.modules():
        if "a" in getattr(wrapper, "lora_A", ()):
            del wrapper.lora_A["a"]
    refused(wrapped, r"adapters\['a'\]: adapts no layer of this model")


@pytest.mark.parametrize("active", ["plain", ["plain", "rslora"]])
def test_bypass_is_disable_adapter_bit_for_bit(net, active):
    plain = copy.deepcopy(net)
    wrapped = wrap(net, ADAPTERS)
    wrapped.base_model.set_adapter(active)
    spoken = logits(wrapped)
    policies = pf.PolicySet.from_adapters(wrapped, ["rslora"])
    with wrapped.disable_adapter():
        expected = logits(wrapped)
    with policies.bypass():
        found = logits(wrapped)
        with policies.bypass():
            nested = logits(wrapped)
        after_nested = logits(wrapped)
    assert torch.equal(expected, logits(plain)) and not torch.allclose(expected, spoken, atol=1e-2)
    for one in (found, nested, after_nested):
        assert torch.equal(one, expected)
    assert torch.equal(logits(wrapped), spoken)


def test_bypass_covers_modules_that_are_saved_whole(net):
    plain = copy.deepcopy(net)
    options = {"r": 2, "target_modules": ["q_proj"]}
    wrapped = wrap(net, {"good": options, "whole": {**options, "modules_to_save": ["lm_head"]}})
    wrapped.set_adapter("whole")
    with torch.no_grad():
        net.lm_head.modules_to_save["whole"].weight.mul_(2)
    with pf.PolicySet.from_adapters(wrapped, ["good"]).bypass():
        assert torch.equal(logits(wrapped), logits(plain))
    assert not torch.allclose(logits(wrapped), logits(plain), atol=1e-2)


def test_bypass_goes_through_the_forward_that_the_layer_has_by_then(net):
    wrapped = wrap(net, {"a": ADAPTERS["plain"]})
    policies = pf.PolicySet.from_adapters(wrapped)
    layer = anatomy(net).linears["model.layers.0.self_attn.q_proj"]
    calls = []
    with policies.bypass():
        layer.forward = lambda x: calls.append(x.shape) or type(layer).forward(layer, x)
        hook = layer.register_forward_hook(lambda *_: calls.append("hook"))
        logits(wrapped)
    assert calls == [torch.Size([2, 9, tiny.HIDDEN]), "hook"]
    hook.remove()


def test_bypass_under_attach_leaves_the_adapters_of_the_library_to_act(net, batch):
    plain = copy.deepcopy(net)
    wrapped = wrap(net, {"a": ADAPTERS["plain"], "b": ADAPTERS["rslora"]})
    policies = pf.PolicySet.from_adapters(wrapped)
    library = pf.PersonaLibrary(anatomy(net).shape)
    library.add_policy("b", policies["b"].lora)
    wrapped.set_adapter("b")
    options = {"max_new_tokens": 8, "do_sample": False}
    row = {"input_ids": batch["input_ids"][:1]}
    expected = wrapped.generate(**row, **options)
    wrapped.set_adapter("a")
    with ops.use_backend("reference"), pf.attach(wrapped, library) as handle, policies.bypass():
        assert torch.equal(logits(wrapped), logits(plain))
        call = {"custom_generate": handle.generate, "personas": pf.Persona(policies={"b": 1.0})}
        assert torch.equal(wrapped.generate(**row, **options, **call), expected)
    assert not torch.equal(plain.generate(**row, **options), expected)


def test_bypass_restores_after_an_exception_and_forwards_of_others(net):
    wrapped = wrap(net, {"a": ADAPTERS["plain"]})
    policies = pf.PolicySet.from_adapters(wrapped)
    spoken = logits(wrapped)
    wrapper = anatomy(net).blocks[0].self_attn.q_proj
    foreign = wrapper.forward
    wrapper.forward = foreign
    names = [path for path, _ in wrapped.named_modules()]
    for depth in (1, 2):
        with pytest.raises(RuntimeError, match="stop"), policies.bypass():
            if depth == 2:
                with policies.bypass():
                    raise RuntimeError("stop")
            raise RuntimeError("stop")
        assert wrapper.__dict__["forward"] is foreign
        assert [m for m in wrapped.modules() if "forward" in m.__dict__] == [wrapper]
    assert [path for path, _ in wrapped.named_modules()] == names
    assert torch.equal(logits(wrapped), spoken)


def test_a_set_without_adapters_leaves_the_model_as_it_speaks(net):
    wrapped = wrap(net, {"a": ADAPTERS["plain"]})
    spoken = logits(wrapped)
    prompts = pf.PolicySet.from_prompts(wrapped, {"pirate": "you are a pirate"})
    with prompts.bypass():
        assert torch.equal(logits(wrapped), spoken)
    with (pf.PolicySet.from_adapters(wrapped) | prompts).bypass():
        assert not torch.allclose(logits(wrapped), spoken, atol=1e-2)


def checkpoints(count=2):
    """A reference and models near it."""
    reference = tiny.model()
    models = []
    for seed in range(count):
        model = copy.deepcopy(reference)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if "embed" not in path:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        models.append(model)
    return reference, models


def test_separate_models(net):
    reference, (a, b) = checkpoints()
    policies = pf.PolicySet.from_models(reference, {"judge": a, "critic": b, "also judge": a})
    assert list(policies) == ["judge", "critic", "also judge"] and len(policies) == 3
    assert policies["judge"].model is a and policies["judge"].kind == "model" and policies["judge"].lora is None
    assert policies.models == (a, b) and policies.reference is reference and policies.model is reference
    assert "judge" in policies and "nobody" not in policies
    again = pf.PolicySet.from_models(reference, [a, b], names=["x", "y"])
    assert again["y"].model is b


def refused_models(message, reference, models, kind=pf.PersonafastError, **call):
    with pytest.raises(kind, match=message) as caught:
        pf.PolicySet.from_models(reference, models, **call)
    assert "\n" not in str(caught.value)


def test_models_that_do_not_belong_to_the_reference(net):
    import transformers as t

    wide = tiny.model()
    wide.resize_token_embeddings(tiny.VOCAB + 8)
    refused_models(r"models\['w'\]: a vocabulary of 72 tokens, the reference has 64", net, {"w": wide})
    head = tiny.model()
    head.set_output_embeddings(nn.Linear(tiny.HIDDEN, tiny.VOCAB + 1, bias=False))
    refused_models(r"models\['w'\]: logits over 65 tokens, the reference has 64", net, {"w": head})
    encoder = t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=64, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=4)
    )
    refused_models(r"models\['t5'\]: .*encoder-decoder", net, {"t5": encoder}, pf.UnsupportedModelError)
    refused_models(r"models\['l'\]: Linear has no `config`", net, {"l": nn.Linear(2, 2)}, pf.UnsupportedModelError)
    refused_models(r"models\['n'\]: expected a model or a local folder, got int", net, {"n": 3})
    away = copy.deepcopy(net).to("meta")
    refused_models(r"models\['m'\]: .* is not in memory \(meta", net, {"m": away}, pf.UnsupportedModelError)
    refused_models("model: Linear has no `config`", nn.Linear(2, 2), {"n": net}, pf.UnsupportedModelError)


def test_models_on_another_device(net, monkeypatch):
    from personafast import policies

    other = copy.deepcopy(net)
    places = {net: torch.device("cpu"), other: torch.device("cuda", 1)}
    monkeypatch.setattr(policies, "_device", lambda _, model: places[model])
    refused_models(r"models\['o'\]: on cuda:1, the reference on cpu; move it with \.to\('cpu'\)", net, {"o": other})


def test_the_reference_as_a_policy_warns_and_a_wrapper_around_it_is_refused(net):
    with pytest.warns(UserWarning, match=r"models\['same'\]: this is the reference itself"):
        policies = pf.PolicySet.from_models(net, {"same": net})
    assert policies.models == (net,)
    wrapped = wrap(net, {"a": ADAPTERS["plain"]})
    refused_models(
        r"models\['a'\]: shares its layers with the reference; use PolicySet.from_adapters", net, {"a": wrapped}
    )


def test_names_of_models(net):
    other = copy.deepcopy(net)
    refused_models(r"names: models\[0\] has no name; give names=", net, [other])
    refused_models("names: 1 given for 2 models", net, [other, other], names=["a"])
    refused_models("names: a, a are not all different", net, [other, other], names=["a", "a"])
    refused_models("names: models has names already", net, {"a": other}, names=["a"])
    refused_models("models: '' is not a usable name", net, {"": other})
    refused_models("models: empty", net, {})
    refused_models("models: expected a mapping by name or a sequence, got LlamaForCausalLM", net, other)
    refused_models("models: expected a mapping by name or a sequence, got str", net, "folder")


def other_tokenizer():
    """The same number of tokens, two of them exchanged."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    text = json.loads(tiny.tokenizer().backend_tokenizer.to_str())
    vocab = text["model"]["vocab"]
    vocab["pirate"], vocab["lawyer"] = vocab["lawyer"], vocab["pirate"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(text)))


DIFFERENT = r"models\['b'\]: its tokenizer is not the reference's: token 'lawyer' is 10 there and 11 in the reference"


def test_tokenizers_that_are_given_are_compared(net):
    models = {"a": copy.deepcopy(net), "b": copy.deepcopy(net)}
    same, other = tiny.tokenizer(), other_tokenizer()
    call = {"reference_tokenizer": tiny.tokenizer()}
    assert len(pf.PolicySet.from_models(net, models, tokenizers={"a": same}, **call)) == 2
    assert len(pf.PolicySet.from_models(net, models, tokenizers=[same, same], **call)) == 2
    assert len(pf.PolicySet.from_models(net, models, tokenizers=[same, other])) == 2  # nothing to compare with
    refused_models(DIFFERENT, net, models, tokenizers=[same, other], **call)
    refused_models(DIFFERENT, net, models, tokenizers={"b": other}, **call)
    refused_models("tokenizers: no model 'c'; there are: a, b", net, models, tokenizers={"c": same}, **call)
    refused_models("tokenizers: 1 given for 2 models", net, models, tokenizers=[same], **call)


@pytest.fixture
def offline(monkeypatch):
    """Any try to reach another machine fails the test."""
    tried = []

    def refuse(*args, **_):
        tried.append(args)
        raise OSError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    yield
    assert not tried


def test_folders_are_loaded_and_their_tokenizers_compared_without_the_network(tmp_path, offline):
    reference, (a, b) = checkpoints()
    tiny.tokenizer().save_pretrained(tmp_path / "reference")
    tiny.tokenizer().save_pretrained(tmp_path / "a")
    other_tokenizer().save_pretrained(tmp_path / "b")
    a.to(torch.bfloat16).save_pretrained(tmp_path / "a")
    b.save_pretrained(tmp_path / "b")
    found = pf.PolicySet.from_models(reference, [tmp_path / "a", str(tmp_path / "b")])
    assert list(found) == ["a", "b"] and found["a"].model.dtype == torch.float32 and not found["a"].model.training
    for mine, theirs in zip(found["a"].model.parameters(), a.parameters(), strict=True):
        assert torch.equal(mine, theirs.float())
    torch.testing.assert_close(logits(found["b"].model), logits(b))

    reference.save_pretrained(tmp_path / "reference")
    from transformers import AutoModelForCausalLM

    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "reference")
    refused_models(DIFFERENT, saved, {"a": tmp_path / "a", "b": tmp_path / "b"})
    refused_models(DIFFERENT, saved, {"b": found["b"].model})
    # What is given goes before what lies in the folder.
    assert "b" in pf.PolicySet.from_models(saved, {"b": tmp_path / "b"}, tokenizers={"b": tiny.tokenizer()})
    saved.config._name_or_path = "someone/elsewhere"
    assert "b" in pf.PolicySet.from_models(saved, {"b": tmp_path / "b"})


def test_folders_that_hold_no_checkpoint(net, tmp_path, offline):
    def broken(message, folder):
        refused_models(message, net, {"x": folder}, pf.FormatError)

    broken(r"models\['x'\]: .*nowhere: no such folder", tmp_path / "nowhere")
    broken(r"models\['x'\]: someone/model: no such folder", "someone/model")
    (tmp_path / "empty").mkdir()
    broken(r"models\['x'\]: .*config.json: no such file", tmp_path / "empty")
    wrap(copy.deepcopy(net), {"default": ADAPTERS["plain"]}).save_pretrained(tmp_path / "adapter")
    broken(r"models\['x'\]: .* is a LoRA adapter, not a whole checkpoint", tmp_path / "adapter")
    net.save_pretrained(tmp_path / "cut")
    state = {name: tensor for name, tensor in net.state_dict().items() if "layers.1.mlp.up_proj" not in name}
    from safetensors.torch import save_file

    save_file(state, tmp_path / "cut" / "model.safetensors", {"format": "pt"})
    broken(r"models\['x'\]: .* lacks the weight 'model.layers.1.mlp.up_proj.weight'", tmp_path / "cut")
    torch.save(net.state_dict(), tmp_path / "cut" / "pytorch_model.bin")
    (tmp_path / "cut" / "model.safetensors").unlink()
    broken(r"models\['x'\]: .* cannot be loaded \(", tmp_path / "cut")


def test_prompts(net):
    policies = pf.PolicySet.from_prompts(net, {"pirate": "you are a pirate", "calm": "you are calm"})
    pirate = policies["pirate"]
    assert (pirate.name, pirate.kind, pirate.prompt) == ("pirate", "prompt", "you are a pirate")
    assert pirate.lora is None and pirate.model is None and policies.models == ()
    for wrong, message in (
        ({"pirate": " "}, r"prompts\['pirate'\]: the system text is empty"),
        ({" ": "you"}, "prompts: ' ' is not a usable name"),
        ({}, "prompts: empty"),
        (["you are a pirate"], "prompts: expected a mapping of name to system text, got list"),
    ):
        with pytest.raises(pf.PersonafastError, match=message):
            pf.PolicySet.from_prompts(net, wrong)
        with pytest.raises(pf.PersonafastError, match=message):
            policies.with_prompts(wrong)
    with pytest.raises(pf.UnsupportedModelError):
        pf.PolicySet.from_prompts(nn.Linear(2, 2), {"pirate": "you are a pirate"})


def test_members_with_a_text_of_their_own(net):
    judge = pf.PolicySet.from_models(net, {"judge": copy.deepcopy(net), "critic": copy.deepcopy(net)})
    both = judge.with_prompts({"judge": "you are a lawyer"})
    assert both["judge"].prompt == "you are a lawyer" and both["judge"].model is judge["judge"].model
    assert both["judge"].kind == "model" and both["critic"] is judge["critic"] and judge["judge"].prompt is None
    with pytest.raises(pf.PersonafastError, match="prompts: no policy 'nobody' in the set; there are: critic, judge"):
        judge.with_prompts({"nobody": "you are a lawyer"})


def test_sets_are_joined_over_one_reference(net):
    wrapped = wrap(net, {"formal": ADAPTERS["plain"], "warm": ADAPTERS["rslora"]})
    adapters = pf.PolicySet.from_adapters(wrapped)
    prompts = pf.PolicySet.from_prompts(net, {"pirate": "you are a pirate"})
    judge = pf.PolicySet.from_models(wrapped, {"judge": tiny.model()})
    every = prompts | adapters | judge
    assert list(every) == ["pirate", "formal", "warm", "judge"]
    assert every.model is wrapped and every.reference is net
    assert repr(every.with_prompts({"judge": "you are calm"})) == (
        "PolicySet(adapters: formal, warm; models: judge (with a system text); prompts: pirate; "
        "reference: LlamaForCausalLM)"
    )
    with pytest.raises(pf.PersonafastError, match="both sets have a policy 'pirate'"):
        every | prompts
    foreign = pf.PolicySet.from_prompts(tiny.model(), {"calm": "you are calm"})
    with pytest.raises(pf.PersonafastError, match="the two sets have different references"):
        prompts | foreign
    with pytest.raises(TypeError):
        prompts | {"calm": "you are calm"}
    with pytest.raises(pf.PersonafastError, match="policies: no policy 'nobody' in the set; there are: formal"):
        every["nobody"]
    with pytest.raises(TypeError):
        every.members["x"] = Policy("x", "prompt", prompt="y")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_is_the_sum_by_hand(dtype):
    reference, models = checkpoints(3)
    reference.to(dtype)
    models[0].to(dtype)
    policies = pf.PolicySet.from_models(reference, models, names=["a", "b", "c"])
    weights = {"a": 0.7, "b": -0.4, "c": 0.0}
    before = {path: parameter.clone() for path, parameter in reference.named_parameters()}
    merged = policies.merged(weights)
    assert type(merged) is type(reference) and not merged.training
    own, a, b = (dict(m.named_parameters()) for m in (reference, models[0], models[1]))
    found = dict(merged.named_parameters())
    assert found.keys() == own.keys()
    for path, parameter in found.items():
        base = own[path].float()
        expected = (base + 0.7 * (a[path].float() - base) + -0.4 * (b[path].float() - base)).to(dtype)
        torch.testing.assert_close(parameter, expected, rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
        changed = not torch.equal(own[path].float(), a[path].float())
        changed |= not torch.equal(own[path].float(), b[path].float())
        assert (parameter is own[path]) == (not changed)
        assert torch.equal(own[path], before[path])
    assert any(found[path] is own[path] for path in own) == (dtype == torch.float32)  # the embedding
    assert torch.isfinite(logits(merged)).all()
    assert not torch.allclose(logits(merged).float(), logits(reference).float(), atol=1e-2)


def test_merged_with_one_whole_weight_is_that_model():
    reference, (a, b) = checkpoints()
    policies = pf.PolicySet.from_models(reference, {"a": a, "b": b})
    torch.testing.assert_close(logits(policies.merged({"a": 1.0})), logits(a), rtol=1e-4, atol=1e-3)
    nothing = policies.merged({"a": 0.0})
    assert nothing is not reference and torch.equal(logits(nothing), logits(reference))


def test_merged_shares_nothing_that_is_written_to():
    reference, (a, b) = checkpoints()
    merged = pf.PolicySet.from_models(reference, {"a": a, "b": b}).merged({"a": 0.5, "b": 0.5})
    assert merged.config is not reference.config and merged.generation_config is not reference.generation_config
    mine = {id(module) for module in merged.modules()}
    for other in (reference, a, b):
        assert not mine & {id(module) for module in other.modules()}
        theirs = {buffer.data_ptr() for buffer in other.buffers()}
        assert not theirs & {buffer.data_ptr() for buffer in merged.buffers()}


def test_merged_keeps_ties():
    import transformers as t

    config = copy.deepcopy(tiny.model().config)
    config.tie_word_embeddings = True
    torch.manual_seed(0)
    reference, a = (t.AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    merged = pf.PolicySet.from_models(reference, {"a": a}).merged({"a": 0.25})
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.lm_head.weight is not reference.lm_head.weight
    expected = 0.75 * reference.lm_head.weight + 0.25 * a.lm_head.weight
    torch.testing.assert_close(merged.lm_head.weight, expected)
    untied = tiny.model()
    with pytest.raises(pf.PersonafastError, match=r"merged: policies\['u'\] has a parameter 'lm_head.weight' that the"):
        pf.PolicySet.from_models(reference, {"u": untied}).merged({"u": 1.0})
    with pytest.raises(pf.PersonafastError, match="merged: the reference has a parameter 'lm_head.weight' that 'a'"):
        pf.PolicySet.from_models(untied, {"a": a}).merged({"a": 1.0})


def test_the_last_two_weightings_are_kept_until_a_parameter_changes():
    reference, (a, b) = checkpoints()
    policies = pf.PolicySet.from_models(reference, {"a": a, "b": b})
    first = policies.merged({"a": 1.0, "b": 0.5})
    second = policies.merged({"a": 1.0})
    assert policies.merged({"b": 0.5, "a": 1.0}) is first
    third = policies.merged({"b": 1.0})
    assert policies.merged({"b": 1.0}) is third and policies.merged({"a": 1.0, "b": 0.5}) is first
    assert policies.merged({"a": 1.0}) is not second
    with torch.no_grad():
        b.lm_head.weight.mul_(2)
    anew = policies.merged({"a": 1.0, "b": 0.5})
    assert anew is not first and not torch.equal(anew.lm_head.weight, first.lm_head.weight)


def test_merged_in_inference_mode_can_be_used_outside():
    reference, (a, b) = checkpoints()
    policies = pf.PolicySet.from_models(reference, {"a": a, "b": b})
    with torch.inference_mode():
        merged = policies.merged({"a": 0.5, "b": 0.5})
    merged(IDS, labels=IDS).loss.requires_grad_().backward()
    assert not any(p.is_inference() for p in merged.parameters())
    assert policies.merged({"a": 0.5, "b": 0.5}) is merged


def state_of(module):
    return {key: id(value) for key, value in module.__dict__.items()}


def test_merged_has_none_of_the_personas_attached_to_the_reference(batch):
    reference, (a, b) = checkpoints()
    policies = pf.PolicySet.from_models(reference, {"a": a, "b": b})
    expected = policies.merged({"a": 0.5, "b": 0.5})
    foreign = anatomy(reference).blocks[0].register_forward_hook(lambda _, __, out: out)
    again = pf.PolicySet.from_models(reference, {"a": a, "b": b})
    with pf.attach(reference, tiny.library(reference)) as handle:
        persona = pf.Persona(vectors={"creative": 1.0})
        call = {"max_new_tokens": 4, "do_sample": False, "custom_generate": handle.generate, "personas": persona}
        before = reference.generate(**batch, **call)
        patched = [state_of(module) for module in reference.modules()]
        with handle.using([persona] * 2):
            merged = again.merged({"a": 0.5, "b": 0.5})
            out = logits(merged)
        assert [state_of(module) for module in reference.modules()] == patched
        assert torch.equal(reference.generate(**batch, **call), before)
    assert not any("personafast" in key for module in merged.modules() for key in module.__dict__)
    assert not any("forward" in module.__dict__ for module in merged.modules())
    assert [len(module._forward_hooks) for module in anatomy(merged).blocks] == [1, 0, 0]
    assert not any(module._forward_pre_hooks for module in merged.modules())
    assert torch.equal(out, logits(expected))
    foreign.remove()
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in reference.modules())


def test_what_cannot_be_merged(net):
    reference, (a, _) = checkpoints()

    def broken(policies, weights, message):
        with pytest.raises(pf.PersonafastError, match=message):
            policies.merged(weights)

    models = pf.PolicySet.from_models(reference, {"a": a})
    broken(models, {"nobody": 1.0}, "weights: no policy 'nobody' in the set; there are: a")
    broken(models, {"a": math.inf}, r"weights\['a'\]: inf is not a finite number")
    prompts = pf.PolicySet.from_prompts(reference, {"pirate": "you are a pirate"})
    mixed = models | prompts
    broken(mixed, {"a": 1.0, "pirate": 0.5}, "merged: 'pirate' is a prompt, and only separate models add up")
    assert isinstance(mixed.merged({"a": 1.0, "pirate": 0.0}), nn.Module)
    broken(pf.PolicySet.from_models(reference, {"q": tiny.model("qwen2")}), {"q": 1.0}, "needs models of one archit")
    small = copy.deepcopy(a)
    small.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(60, tiny.HIDDEN))
    broken(
        pf.PolicySet.from_models(reference, {"s": small}),
        {"s": 1.0},
        r"up_proj.weight is \[60, 32\] in policies\['s'\] and \[64, 32\] in the reference",
    )
    rope = copy.deepcopy(a)
    rope.model.rotary_emb.inv_freq.mul_(2)
    broken(pf.PolicySet.from_models(reference, {"r": rope}), {"r": 1.0}, r"buffer .*inv_freq of policies\['r'\]")
    whole = copy.deepcopy(a)
    whole.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(64, 32, dtype=torch.int8), requires_grad=False)
    broken(pf.PolicySet.from_models(reference, {"w": whole}), {"w": 1.0}, "up_proj.weight is of torch.int8")
    wrapped = wrap(net, {"a": ADAPTERS["plain"]})
    broken(pf.PolicySet.from_adapters(wrapped), {"a": 1.0}, "merged: 'a' is an adapter, and only separate models")
    broken(pf.PolicySet.from_models(wrapped, {"m": a}), {"m": 1.0}, "merged: the reference holds PEFT adapters")


def test_members_are_readable_and_compare_by_identity(net):
    policies = pf.PolicySet.from_adapters(wrap(net, {"a": ADAPTERS["plain"]}))
    assert isinstance(policies["a"].lora, LoraPolicy)
    assert policies["a"] == policies["a"] and policies["a"] != Policy("a", "adapter", lora=policies["a"].lora)
    assert len({policies["a"], policies["a"]}) == 1
