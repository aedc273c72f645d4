"""The parts of a decoder, found by structure: nothing here knows a model family by name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from personafast.errors import UnsupportedModelError


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
        recurrent: the name of the model's class when tokens leave a state behind that cannot be rolled back (Mamba,
            RWKV, hybrids). A vector needs no rollback; masks, policies and our own decoding loop do.
    """

    blocks: tuple[nn.Module, ...]
    linears: Mapping[str, nn.Module]
    head: nn.Module | None
    shape: ModelShape
    recurrent: str | None = None

    def check_attention_only(self, what: str) -> None:
        """Raise `UnsupportedModelError`, blaming `what`, when the model keeps a recurrent state."""
        if self.recurrent:
            raise UnsupportedModelError(
                f"{what}: {self.recurrent} keeps a recurrent state, which cannot be rolled back; on such a model "
                "personas are vectors, in stock generate inside personas.using([...])"
            )


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' `Conv1D`, a linear that stores its weight as [in, out]."""
    return (
        type(module).__name__ == "Conv1D"
        and hasattr(module, "nf")
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes x W^T + b with a weight of its own, plain or quantised.

    Quantisers keep `in_features` and `out_features` and little else: some replace the weight by a packed one of another
    name, shape and dtype, and not all derive from nn.Linear.
    """
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return True
    return (
        isinstance(getattr(module, "in_features", None), int)
        and isinstance(getattr(module, "out_features", None), int)
        # What wraps a linear (PEFT's layers) has its numbers too.
        and next(module.children(), None) is None
    )


def plain_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of a linear that stores it as floating-point numbers, one an element; None if it is quantised."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return None
    if type(weight) not in (torch.Tensor, nn.Parameter) or weight.dtype.itemsize == 1:
        return None
    return weight


def linear_features(module: nn.Module) -> tuple[int, int]:
    """(out_features, in_features) of a linear."""
    weight = plain_weight(module)
    if weight is None:
        layer: Any = module
        return int(layer.out_features), int(layer.in_features)
    rows, columns = weight.shape
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def plain_path(path: str) -> str:
    """The path a module has before PEFT wraps it."""
    return path.removeprefix("base_model.model.").replace(".base_layer", "")


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(f"model: {type(model).__name__} has no `config`; pass a transformers causal LM")
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"model: {type(model).__name__} is an encoder-decoder; only decoders are supported")
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _text_decoder(model: nn.Module) -> nn.Module:
    """The part of a model that holds the text's blocks: a vision tower has blocks too, sometimes as many."""
    found = getattr(model, "get_decoder", lambda: None)()
    return found if isinstance(found, nn.Module) else model


def _block_counts(config: Any) -> set[int]:
    """How many blocks the configuration speaks of: some count halves of blocks, some those of an absent encoder."""
    names = ("num_hidden_layers", "num_layers", "decoder_layers")
    return {count for name in names if isinstance(count := getattr(config, name, None), int)}


def _find_blocks(model: nn.Module, counts: set[int]) -> tuple[str, nn.ModuleList]:
    candidates = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) in counts
        # Hybrids have blocks of several classes.
        and all(any(is_linear(part) for part in block.modules()) for block in module)
    ]
    # A model may call its head a decoder.
    inside = {id(part) for part in _text_decoder(model).modules()}
    candidates = [item for item in candidates if id(item[1]) in inside] or candidates
    # Experts and heads are ModuleLists too, but they lie deeper than the blocks that hold them.
    candidates.sort(key=lambda item: item[0].count("."))
    if not candidates:
        wanted = " or ".join(map(str, sorted(counts)))
        raise UnsupportedModelError(
            f"model: no list of {wanted} decoder blocks found in {type(model).__name__}; nothing was patched"
        )
    if len(candidates) > 1 and candidates[0][0].count(".") == candidates[1][0].count("."):
        names = ", ".join(path for path, _ in candidates[:3])
        raise UnsupportedModelError(
            f"model: several lists of {type(model).__name__} look like its blocks ({names}); nothing was patched"
        )
    return candidates[0]


def _check_one_stream(model: nn.Module, config: Any, block: nn.Module) -> None:
    """Raise unless a block turns one residual stream [B, T, H] into the next."""
    streams = max(int(getattr(config, name, None) or 1) for name in ("hc_mult", "altup_num_inputs"))
    # XLNet's second stream; its tensors are [T, B, H] at that.
    if streams > 1 or "output_g" in inspect.signature(block.forward).parameters:
        raise UnsupportedModelError(
            f"model: the blocks of {type(model).__name__} pass on several residual streams, and a vector belongs to "
            "one; nothing was patched"
        )


def _recurrent(model: nn.Module, config: Any) -> bool:
    # Not every hybrid says so of itself: LFM2's layers are "conv" or "full_attention".
    kinds = getattr(config, "layer_types", None) or ()
    stateful = getattr(model, "_is_stateful", False)
    return bool(stateful) or any("attention" not in kind or "linear" in kind for kind in kinds)


def anatomy(model: nn.Module) -> Anatomy:
    """Find the blocks and linears of a Hugging Face decoder.

    Raises:
        UnsupportedModelError: naming the model's class, when the structure is not that of a decoder.
    """
    config = _text_config(model)
    hidden, vocab = (getattr(config, name, None) for name in ("hidden_size", "vocab_size"))
    counts = _block_counts(config)
    if not (hidden and counts and vocab):
        raise UnsupportedModelError(
            f"model: the configuration of {type(model).__name__} lacks hidden_size, num_hidden_layers or vocab_size"
        )
    path, blocks = _find_blocks(model, counts)
    _check_one_stream(model, config, blocks[0])
    linears = {
        plain_path(f"{path}.{name}"): module
        for name, module in blocks.named_modules()
        if is_linear(module) and ".lora_" not in name
    }
    shape = ModelShape(str(getattr(config, "model_type", "unknown")), int(hidden), len(blocks), int(vocab))
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if find_head is not None else None
    return Anatomy(
        tuple(blocks),
        linears,
        head if isinstance(head, nn.Linear) else None,
        shape,
        type(model).__name__ if _recurrent(model, config) else None,
    )
