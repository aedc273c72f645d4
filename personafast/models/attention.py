"""Attention of few new tokens on a CPU by `ops.attend`, through transformers' `AttentionInterface`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from personafast import ops
from personafast.ops import _backend
from personafast.ops._library import wants_gradient

NAME = "personafast_sdpa"
_MARK = "_personafast_attention"
# What attention may be asked for beyond a mask.
_OTHERS = ("position_bias", "softcap", "s_aux", "cache")


class AttentionPatch:
    """Lets a model that uses transformers' sdpa attend through `attend`, in the layers that are marked here."""

    def __init__(self, model: nn.Module) -> None:
        config: Any = getattr(model, "config", None)
        self._config = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._named = False
        implementation = getattr(self._config, "_attn_implementation", None)
        # A model may carry the name already: another handle's, or a copy of an attached one.
        self._layers = [
            part
            for part in model.modules()
            if implementation in ("sdpa", NAME) and hasattr(part, "num_key_value_groups") and _MARK not in part.__dict__
        ]
        if not self._layers:
            return
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
        for layer in self._layers:
            layer.__dict__[_MARK] = True
        if implementation == "sdpa":
            self._config._attn_implementation = NAME
            self._named = True

    def remove(self) -> None:
        """Take back what this one did."""
        for layer in self._layers:
            layer.__dict__.pop(_MARK, None)
        self._layers = []
        self.step_aside()

    def step_aside(self) -> None:
        """Let the model attend by transformers' own name again, for what looks at that."""
        if self._named and self._config._attn_implementation == NAME:
            self._config._attn_implementation = "sdpa"
        self._named = False


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(scaling Q K^T + mask) V of decoding steps; anything else goes to transformers' sdpa unchanged.

    Args:
        module: the attention layer.
        query: [B, G K, q, D].
        key: [B, K, n, D], n > q.
        value: likewise.
        attention_mask: bool or additive, [B or 1, 1, q, n]; None only with q = 1, where nothing is masked.
        dropout: as transformers gives it, and so are the rest.
        scaling: likewise.
        is_causal: likewise.
        **kwargs: likewise.

    Returns:
        [B, q, G K, D], and None for the attention weights.
    """
    if not _serves(module, query, key, attention_mask, dropout, kwargs):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    return ops.attend(query, key, value, attention_mask, scaling).transpose(1, 2).contiguous(), None


def _serves(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> bool:
    new, columns = query.shape[2], key.shape[2]
    return (
        query.is_cpu
        and _MARK in module.__dict__
        # Without a mask only the last token alone sees every column.
        and new < columns
        and (new == 1 if mask is None else mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] == new)
        and not dropout
        and not any(kwargs.get(name) is not None for name in _OTHERS)
        and not kwargs.get("output_attentions")
        and not wants_gradient(query, key)
        and _backend.forced() != "reference"
    )
