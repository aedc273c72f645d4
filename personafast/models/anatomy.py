"""The parts of a decoder, found by structure: nothing here knows a model family by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from personafast.errors import UnsupportedModelError
from personafast.models.experts import FusedExperts


@dataclass(frozen=True)
class ModelShape:
    """What a persona must fit: recorded with every library and compared on `attach`."""

    model_type: str
    hidden_size: int
    num_blocks: int
    vocab_size: int


@dataclass(frozen=True)
class Anatomy:
    """The parts of one model.

    Attributes:
        blocks: the decoder blocks, in order; the output of block b is the residual stream after it.
        linears: dotted path -> linear layer inside the blocks, named as in the state dict of the model without any
            PEFT wrapping.
        head: what turns the last hidden state into logits, if it is a linear.
        shape: sizes that vectors, masks and policies are checked against.
        experts: dotted path -> experts that share one parameter, where their module says how it lies. Of its projection
            ``down_proj`` a mask covers expert 3 under ``<path>.down_proj.3``.
    """

    blocks: tuple[nn.Module, ...]
    linears: Mapping[str, nn.Module]
    head: nn.Module | None
    shape: ModelShape
    experts: Mapping[str, FusedExperts] = field(default_factory=dict)

    def mask_features(self, path: str) -> tuple[int, int] | None:
        """(out, in) of what a mask covers under this path, or None where there is nothing."""
        if path in self.linears:
            return linear_features(self.linears[path])
        found = self.expert(path)
        return None if found is None else found[1].features(found[2])

    def expert(self, path: str) -> tuple[str, FusedExperts, str, int] | None:
        """(path of the experts, the experts, projection, expert) of a path in a mask, or None."""
        parts = path.rsplit(".", 2)
        if len(parts) != 3 or not parts[2].isdigit():
            return None
        where, name, index = parts[0], parts[1], int(parts[2])
        found = self.experts.get(where)
        if found is None or name not in found.parameters or index >= found.count:
            return None
        return where, found, name, index


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, a linear that stores its weight as [in, out]."""
    return (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b with a plain weight of its own."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linear_features(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear."""
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    rows, columns = weight.shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def is_routed(path: str) -> bool:
    """Whether a linear is one of a list inside its block: an expert, which sees the tokens that a router picks."""
    return sum(part.isdigit() for part in path.split(".")) > 1


def plain_path(path: str) -> str:
    """The path a module has before PEFT wraps it."""
    return path.removeprefix("base_model.model.").replace(".base_layer", "")


def _text_config(model: nn.Module) -> object:
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(f"model: {type(model).__name__} has no `config`; pass a transformers causal LM")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"model: {type(model).__name__} is an encoder-decoder; only decoders are supported")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _find_blocks(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    candidates = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == count
        and len({type(block) for block in module}) == 1
        and any(is_linear(part) for part in module[0].modules())
    ]
    # Experts and heads are ModuleLists too, but they lie deeper than the blocks that hold them.
    candidates.sort(key=lambda item: item[0].count("."))
    if not candidates:
        raise UnsupportedModelError(
            f"model: no list of {count} decoder blocks found in {type(model).__name__}; nothing was patched"
        )
    if len(candidates) > 1 and candidates[0][0].count(".") == candidates[1][0].count("."):
        names = ", ".join(path for path, _ in candidates[:3])
        raise UnsupportedModelError(f"model: several lists look like the decoder blocks ({names}); nothing was patched")
    return candidates[0]


def anatomy(model: nn.Module) -> Anatomy:
    """Find the blocks and linears of a Hugging Face decoder.

    Raises:
        UnsupportedModelError: naming the model's class, when the structure is not that of a decoder.
    """
    config = _text_config(model)
    # Not every hybrid says so of itself: LFM2's layers are "conv" or "full_attention".
    kinds = getattr(config, "layer_types", None) or ()
    if getattr(model, "_is_stateful", False) or any("attention" not in kind or "linear" in kind for kind in kinds):
        raise UnsupportedModelError(
            f"model: {type(model).__name__} keeps a recurrent state, which cannot be rolled back; use a model whose "
            "cache is attention only"
        )
    hidden, count, vocab = (getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers", "vocab_size"))
    if not (hidden and count and vocab):
        raise UnsupportedModelError(
            f"model: the configuration of {type(model).__name__} lacks hidden_size, num_hidden_layers or vocab_size"
        )
    path, blocks = _find_blocks(model, count)
    linears = {
        plain_path(f"{path}.{name}"): module
        for name, module in blocks.named_modules()
        if is_linear(module) and ".lora_" not in name
    }
    experts = {
        plain_path(f"{path}.{name}"): fused
        for name, module in blocks.named_modules()
        if (fused := FusedExperts.of(module)) is not None
    }
    shape = ModelShape(str(getattr(config, "model_type", "unknown")), int(hidden), int(count), int(vocab))
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    return Anatomy(tuple(blocks), linears, head if isinstance(head, nn.Linear) else None, shape, experts)
