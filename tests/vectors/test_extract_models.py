"""Texts read off models that are wrapped, away, or in training."""

import pytest
import torch
from helpers import tiny
from helpers.placing import HOW, placed

import personafast as pf
from personafast.models.anatomy import anatomy
from personafast.models.reading import forward, padded
from personafast.vectors import PersonaVector, Sampling, TextPairs, TraitPrompts, extract_vectors, project

pytestmark = pytest.mark.filterwarnings("ignore")
PAIRS = TextPairs(("you are a pirate", "sea ship is calm", "yes"), ("you are a lawyer", "court law", "no a court"))
PROMPTS = TraitPrompts((("you are a pirate", "you are a lawyer"), ("sea", "law")), ("what is this", "what is a ship"))
BLOCKS = tuple(range(tiny.BLOCKS))


def read(net):
    """Directions from texts and from responses, and projections, all that needs the model."""
    tok = tiny.tokenizer()
    sampling = Sampling(per_question=1, max_new_tokens=6)
    vectors = extract_vectors(net, tok, {"texts": PAIRS, "told": PROMPTS}, sampling=sampling)
    vectors["fixed"] = PersonaVector(torch.eye(tiny.BLOCKS, tiny.HIDDEN))
    values = project(net, tok, ["you are a pirate", "yes"], vectors, blocks=BLOCKS)
    return [vector.directions for vector in vectors.values()] + [each.values["fixed"] for each in values]


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", HOW)
def test_a_dispatched_model(net, how, tmp_path):
    same(read(placed(tiny.model(), how, tmp_path)), read(net))


def test_a_peft_model_is_read_with_its_adapter_and_gives_one_position_of_logits(net):
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(tiny.model(), peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=True))
    settings = wrapped.get_base_model().generation_config
    seen = []
    hook = wrapped.get_base_model().lm_head.register_forward_hook(lambda _, __, out: seen.append(out.shape[1]))
    same(read(wrapped), read(net))
    assert wrapped.get_base_model().generation_config is settings
    seen.clear()
    forward(wrapped, *padded([[3, 4, 5]], torch.device("cpu")))
    hook.remove()
    assert seen == [1]
    with torch.no_grad():
        wrapped.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight.fill_(0.5)
    assert not torch.allclose(read(wrapped)[0][0], read(net)[0][0], atol=1e-3)


def test_a_model_in_training_is_read_without_dropout_and_every_module_stays_as_it_was(net):
    expected = read(net)
    net.train()
    net.model.layers[1].eval()
    for layer in net.model.layers:
        layer.self_attn.attention_dropout = 0.9
    before = {name: module.training for name, module in net.named_modules()}
    same(read(net), expected)
    assert {name: module.training for name, module in net.named_modules()} == before


@pytest.mark.parametrize("kind", ["Mamba", "Lfm2"])
def test_a_recurrent_model_is_read_as_any_other(kind):
    """Only what rolls a state back is refused there; padding on the right is behind every token that counts."""
    import transformers

    own = {"layer_types": ["conv", "full_attention", "conv"], "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=tiny.VOCAB,
        hidden_size=tiny.HIDDEN,
        num_hidden_layers=tiny.BLOCKS,
        **({} if kind == "Mamba" else {"intermediate_size": 64, **own}),
    )
    torch.manual_seed(0)
    net, tok = transformers.AutoModelForCausalLM.from_config(config).eval(), tiny.tokenizer()
    vector = extract_vectors(net, tok, {"calm": PAIRS})["calm"]
    together = project(net, tok, ["you are a pirate", "yes"], {"calm": vector}, blocks=BLOCKS)
    for text, found in zip(["you are a pirate", "yes"], together, strict=True):
        (alone,) = project(net, tok, [text], {"calm": vector}, blocks=BLOCKS)
        torch.testing.assert_close(found.values["calm"], alone.values["calm"], rtol=1e-4, atol=1e-6)
        states = []
        hook = anatomy(net).blocks[1].register_forward_pre_hook(lambda _, args, into=states: into.append(args[0][0]))
        net(torch.tensor([tok(text)["input_ids"]]))
        hook.remove()
        unit = vector.directions[0] / vector.directions[0].norm()
        torch.testing.assert_close(alone.values["calm"][:, 0], states[0].detach() @ unit, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("message", "call"),
    [
        (
            "batch_size: 0 is not at least 1",
            lambda net, tok, one: project(net, tok, ["yes"], {"one": one}, batch_size=0),
        ),
        ("texts: one text alone", lambda net, tok, one: project(net, tok, "yes a", {"one": one})),
        ("traits: empty", lambda net, tok, one: extract_vectors(net, tok, {})),
        (r"blocks \[0.5\] are not", lambda net, tok, one: PersonaVector(one.directions, [0.5])),
    ],
)
def test_what_cannot_be_is_refused(net, message, call):
    with pytest.raises(pf.PersonafastError, match=message):
        call(net, tiny.tokenizer(), PersonaVector(torch.ones(tiny.BLOCKS, tiny.HIDDEN)))
