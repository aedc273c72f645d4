import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.errors import UnsupportedModelError
from personafast.models.anatomy import anatomy, linear_features


@pytest.mark.parametrize(
    ("family", "linears"), [("llama", 7), ("qwen3", 7), ("gemma2", 7), ("gpt2", 4), ("gpt_neox", 4)]
)
def test_blocks_and_linears_are_found_by_structure(family, linears):
    net = tiny.model(family)
    parts = anatomy(net)
    assert len(parts.blocks) == tiny.BLOCKS and parts.shape.hidden_size == tiny.HIDDEN
    assert len(parts.linears) == linears * tiny.BLOCKS
    state = net.state_dict()
    for path, linear in parts.linears.items():
        weight = state[f"{path}.weight"]
        assert tuple(weight.shape) in (linear_features(linear), linear_features(linear)[::-1])


def test_experts_are_not_taken_for_blocks():
    from transformers import MixtralConfig, MixtralForCausalLM

    net = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )
    assert len(anatomy(net).blocks) == 2


def test_a_peft_model_has_the_paths_of_its_base():
    peft = pytest.importorskip("peft")
    net = tiny.model()
    paths = set(anatomy(net).linears)
    wrapped = peft.get_peft_model(net, peft.LoraConfig(target_modules=["q_proj"]))
    assert set(anatomy(wrapped).linears) == paths


def test_what_is_not_a_decoder_is_refused_by_name():
    from transformers import T5Config, T5ForConditionalGeneration

    net = T5ForConditionalGeneration(T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2))
    with pytest.raises(pf.UnsupportedModelError, match="T5ForConditionalGeneration is an encoder-decoder"):
        anatomy(net)
    with pytest.raises(pf.UnsupportedModelError, match="Sequential"):
        anatomy(torch.nn.Sequential())


def test_a_hybrid_that_does_not_call_itself_stateful_is_known_as_one():
    import transformers as t

    kinds = ["conv", "full_attention", "conv"]
    config = t.Lfm2Config(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=kinds,
    )
    parts = anatomy(t.Lfm2ForCausalLM(config))
    assert parts.recurrent == "Lfm2ForCausalLM" and len(parts.blocks) == 3
    with pytest.raises(UnsupportedModelError, match="masks: Lfm2ForCausalLM keeps a recurrent state"):
        parts.check_attention_only("masks")
    assert anatomy(tiny.model()).recurrent is None
