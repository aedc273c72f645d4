"""Tiny models of several families, a chat tokenizer for them, and a library that fits."""

from __future__ import annotations

from typing import Any

import torch

import personafast as pf
from personafast.density.lora import LoraFactors, LoraPolicy
from personafast.masks import build_mask, calibrate
from personafast.models.anatomy import anatomy, linear_features
from personafast.models.reading import TokenizedText

VOCAB, HIDDEN, BLOCKS = 64, 32, 3
WORDS = ["you", "are", "a", "pirate", "lawyer", "calm", "what", "is", "this", "sea", "law", "ship", "court", "yes"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<' + m['role'] + '> ' + m['content'] + ' </s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


def model(family: str = "llama", seed: int = 0) -> Any:
    """A random causal LM in fp32, with enough spread that its greedy texts differ from prompt to prompt."""
    import transformers as t

    common = {"vocab_size": VOCAB, "eos_token_id": 1, "pad_token_id": 0, "bos_token_id": 2}
    llama_like = {
        **common,
        "hidden_size": HIDDEN,
        "intermediate_size": 64,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    configs = {
        "llama": lambda: t.LlamaConfig(**llama_like),
        "qwen2": lambda: t.Qwen2Config(**llama_like),
        "qwen3": lambda: t.Qwen3Config(**llama_like),
        "gemma2": lambda: t.Gemma2Config(**llama_like, query_pre_attn_scalar=8),
        "gpt2": lambda: t.GPT2Config(**common, n_embd=HIDDEN, n_layer=BLOCKS, n_head=4, n_positions=64),
        "gpt_neo": lambda: t.GPTNeoConfig(
            **common,
            hidden_size=HIDDEN,
            intermediate_size=64,
            num_layers=BLOCKS,
            num_heads=4,
            attention_types=[[["global", "local", "local"], 1]],
            window_size=6,
            max_position_embeddings=64,
        ),
        "gpt_neox": lambda: t.GPTNeoXConfig(
            **common, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=BLOCKS, num_attention_heads=4
        ),
    }
    torch.manual_seed(seed)
    found = t.AutoModelForCausalLM.from_config(configs[family]()).eval()
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    # A row that never ends by itself makes comparisons as long as they can be.
    found.generation_config.eos_token_id = None
    return found


def tokenizer() -> Any:
    """A word-level chat tokenizer with the models' vocabulary size."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<s>", "<unk>", "<system>", "<user>", "<assistant>"]
    words = special + WORDS + [".", ","]
    words += [f"w{i}" for i in range(VOCAB - len(words))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    found = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        additional_special_tokens=special[4:],
    )
    found.chat_template = TEMPLATE
    return found


def policy(net: Any, seed: int, rank: int = 4, scale: float = 0.5, names: tuple[str, ...] = ()) -> LoraPolicy:
    """A random LoRA policy over every linear whose path ends in one of `names` (all of them by default)."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path, linear in anatomy(net).linears.items():
        if names and not path.endswith(names):
            continue
        out, width = linear_features(linear)
        factors[path] = LoraFactors(
            torch.randn(rank, width, generator=generator),
            torch.randn(out, rank, generator=generator) / width**0.5,
            scale,
        )
    targets = sorted({path.rsplit(".", 1)[-1] for path in factors})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank * scale,
        "target_modules": targets,
        "bias": "none",
    }
    return LoraPolicy(factors, config, VOCAB)


def library(net: Any, masks: bool = True) -> pf.PersonaLibrary:
    """Two vectors at two blocks, two policies of different ranks and targets, one mask."""
    generator = torch.Generator().manual_seed(5)
    found = pf.PersonaLibrary(anatomy(net).shape)
    for name in ("creative", "futurist"):
        found.add_vector(name, 0.4 * torch.randn(BLOCKS, HIDDEN, generator=generator), blocks=(0, 1))
    found.add_policy("formal", policy(net, 1))
    found.add_policy("warm", policy(net, 2, rank=3, names=("q_proj", "up_proj")))
    if masks:
        statistics = calibrate(net, [TokenizedText(list(range(3, 30)), 20)])
        found.add_mask("introvert", build_mask(net, statistics, sparsity=0.4))
    return found
