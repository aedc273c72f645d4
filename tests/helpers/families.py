"""Tiny random models of the decoder families of transformers, by model type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

BLOCKS = 2
# Sizes under every name that a configuration may know them by.
_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "word_embed_proj_dim": 32,
    "lru_width": 32,
    "num_hidden_layers": BLOCKS,
    "num_layers": BLOCKS,
    "n_layers": BLOCKS,
    "n_layer": BLOCKS,
    "num_attention_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "n_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rotary_dim": 4,
    "intermediate_size": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "d_ff": 48,
    "expansion_ratio": 2,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "max_seq_len": 64,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_LATENT = {"num_key_value_heads": 4}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
_THREE_AXES = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}


@dataclass(frozen=True)
class Family:
    """A model type and what its tiny configuration needs beyond the usual sizes.

    Attributes:
        name: `model_type` of the configuration.
        kind: what sets its blocks apart.
        own: settings of its own.
        text: for a model around a text decoder, the model type of that; `own` is then the text's.
        vision: settings of its vision tower, with as many blocks as the text has.
        common: tested by default; the others when slow tests run.
        rows_mix: the plain model lets a row see the others, whatever they carry.
    """

    name: str
    kind: str
    own: Mapping[str, Any] = field(default_factory=dict)
    text: str | None = None
    vision: Mapping[str, Any] = field(default_factory=dict)
    common: bool = True
    rows_mix: bool = False


def _each(kind: str, names: str, common: bool = True, **own: Any) -> list[Family]:
    return [Family(name, kind, own, common=common) for name in names.split()]


_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": BLOCKS,
    "depth": BLOCKS,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "embed_dim": 16,
}

FAMILIES = [
    *_each(
        "pre-norm",
        "llama mistral qwen2 qwen3 gemma gemma3_text olmo3 granite smollm3 nemotron starcoder2 helium ernie4_5 "
        "minimax_m2 seed_oss hunyuan_v1_dense exaone4 diffllama bitnet",
    ),
    *_each("pre-norm, fused projections", "phi3 mpt gpt_bigcode"),
    *_each("sandwich norm", "gemma2 glm4"),
    *_each("pre-norm", "glm stablelm persimmon internlm3 apertus arcee"),
    *_each("norm after the sublayer", "olmo2"),
    *_each("norm without weights", "olmo"),
    *_each("parallel attention", "gptj gpt_neox falcon phi codegen cohere cohere2"),
    *_each("absolute positions", "gpt2 opt biogpt xglm ctrl"),
    Family("gpt_neo", "absolute positions, local attention", {"attention_types": [[["global", "local"], 1]]}),
    *_each("ALiBi", "bloom"),
    *_each("norm after the sum", "openai-gpt"),
    *_each(
        "mixture of experts",
        "mixtral qwen2_moe qwen3_moe olmoe granitemoe phimoe gpt_oss ernie4_5_moe llama4_text glm4_moe hunyuan_v1_moe",
    ),
    *_each("latent attention, mixture of experts", "deepseek_v2 deepseek_v3", **_LATENT),
    *_each("latent attention", "minicpm3 youtu", **_LATENT),
    Family("longcat_flash", "two attentions a block, mixture of experts", {**_LATENT, "num_hidden_layers": 4}),
    Family("mamba", "recurrent"),
    Family("mamba2", "recurrent", {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}, common=False),
    Family("rwkv", "recurrent", rows_mix=True),
    Family("jamba", "recurrent and attention, mixture of experts", {"attn_layer_period": 2, "attn_layer_offset": 1}),
    Family("bamba", "recurrent and attention", {**_MAMBA, "attn_layer_indices": [1]}, common=False),
    Family(
        "granitemoehybrid",
        "recurrent and attention, mixture of experts",
        {**_MAMBA, "layer_types": ["mamba", "attention"]},
    ),
    Family("lfm2", "recurrent and attention", {"layer_types": ["conv", "full_attention"]}),
    Family("recurrent_gemma", "recurrent and attention", {"num_hidden_layers": 3}),
    Family("qwen3_next", "recurrent and attention, mixture of experts", _LINEAR),
    Family("gemma3", "text and images", text="gemma3_text", vision=_VISION),
    Family("llava", "text and images", text="llama", vision=_VISION),
    Family("qwen2_vl", "text and images", _THREE_AXES, text="qwen2_vl_text", vision=_VISION),
    Family("qwen2_5_vl", "text and images", _THREE_AXES, text="qwen2_5_vl_text", vision=_VISION),
    Family("mistral3", "text and images", text="mistral", vision=_VISION),
    # The rest of what was tried.
    *_each(
        "pre-norm",
        "beam cwm flint gpt-sw3 gpt_neox_japanese granite_swa hyperclovax iquestcoder jais2 ministral ministral3 "
        "modernbert-decoder moshi nanochat vaultgemma gemma4_unified_text trocr doge",
        common=False,
    ),
    *_each(
        "mixture of experts",
        "afmoe aria_text cohere2_moe exaone_moe flex_olmo granitemoe_swa granitemoeshared hy_v3 jetmoe kolibri1 laguna "
        "mellum mimo_v2_flash minimax_m3_vl_text solar_open",
        common=False,
    ),
    *_each(
        "latent attention, mixture of experts",
        "axk1 axk2 deepseek_v32 dots3_note_text glm4_moe_lite glm_moe_dsa",
        common=False,
        **_LATENT,
    ),
    *_each("recurrent", "falcon_mamba", common=False),
    *_each("recurrent and attention", "inkling_text inkling2_text minimax", common=False),
    Family("qwen3_5_text", "recurrent and attention", _LINEAR, common=False),
    Family(
        "zamba",
        "recurrent and attention",
        {"layer_types": ["mamba", "hybrid"] * 2, "num_hidden_layers": 4},
        common=False,
    ),
    Family(
        "nemotron_h",
        "recurrent and attention",
        {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8},
        common=False,
    ),
]
BY_NAME = {family.name: family for family in FAMILIES}


def names(common: bool | None = None) -> list[str]:
    """Model types, all of them or those tested by default (or not)."""
    return [family.name for family in FAMILIES if common is None or family.common == common]


def build(name: str, **more: Any) -> Any:
    """A random model in fp32 on the CPU; skips the test where this transformers lacks the family."""
    import transformers as t
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    family = BY_NAME[name]
    if any(needed not in CONFIG_MAPPING for needed in (name, family.text) if needed):
        pytest.skip(f"transformers {t.__version__} has no {name}")
    if family.text is None:
        config = configuration(name, {**family.own, **more})
        auto = t.AutoModelForCausalLM
    else:
        config = around(name, configuration(family.text, {**family.own, **more}), family.vision)
        auto = t.AutoModelForImageTextToText
    torch.manual_seed(0)
    net = auto.from_config(config).eval()
    net.generation_config.eos_token_id = None
    return net


def configuration(name: str, own: Mapping[str, Any]) -> Any:
    """The configuration of a model type with the usual small sizes, and settings of its own."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    plain = kind()
    other_names = plain.attribute_map or {}
    known = set(plain.to_dict()) | set(other_names)
    given = {key: value for key, value in _SIZES.items() if key in known}
    # Of two names for one setting, the configuration's own counts.
    given = {key: value for key, value in given.items() if other_names.get(key) not in given}
    return kind(**{**given, **own})


def around(name: str, text: Any, vision: Mapping[str, Any]) -> Any:
    """The configuration of a model around a text decoder, with a vision tower of small sizes."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name]
    tower = kind().vision_config
    known = set(tower.to_dict())
    sizes = {key: value for key, value in vision.items() if key in known}
    if "embed_dim" in known:  # Qwen2-VL: the tower's own width, while hidden_size is the text's
        sizes["hidden_size"] = text.hidden_size
    if "out_hidden_size" in known:
        sizes["out_hidden_size"] = text.hidden_size
    return kind(text_config=text.to_dict(), vision_config={**tower.to_dict(), **sizes})


def table() -> str:
    """The families by kind as a table in Markdown, with the marks that the page's test looks for."""
    kinds: dict[str, list[str]] = {}
    for family in FAMILIES:
        kinds.setdefault(family.kind, []).append(family.name)
    rows = [f"| {kind} | {', '.join(f'`{name}`' for name in sorted(found))} |" for kind, found in sorted(kinds.items())]
    return "\n".join(["<!-- families -->", "| Blocks | `model_type` |", "| --- | --- |", *rows, "<!-- /families -->"])
