"""Grouped-query attention for few new tokens on a CPU, through transformers' `AttentionInterface`.

Queries that share a key head become queries of that head: [B, G K, q, D] over [B, K, n, D] is [B, K, G q, D] over the
same keys. Nothing is repeated, and torch's kernel, whose cost on a CPU is by head, runs over G times fewer of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from personafast.ops import _backend
from personafast.ops._library import wants_gradient

NAME = "personafast_sdpa"
_MARK = "_personafast_attention"
# What attention may be asked for beyond a mask.
_OTHERS = ("position_bias", "softcap", "s_aux", "cache")


def patch_attention(model: nn.Module) -> bool:
    """Let a model that uses transformers' sdpa attend through `attend`; whether it does. Only layers marked here do."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    layers = [part for part in model.modules() if getattr(part, "num_key_value_groups", 1) > 1]
    if getattr(text, "_attn_implementation", None) != "sdpa" or not layers:
        return False
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    for layer in layers:
        layer.__dict__[_MARK] = True
    text._attn_implementation = NAME
    return True


def unpatch_attention(model: nn.Module) -> None:
    """Take it back."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text._attn_implementation == NAME:
        text._attn_implementation = "sdpa"
    for part in model.modules():
        part.__dict__.pop(_MARK, None)


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
        value: as the keys.
        attention_mask: bool or additive, [B or 1, 1, q, n]; None only with q = 1, where nothing is masked.
        dropout: as transformers gives it, like all that follows.
        scaling: factor of Q K^T.
        is_causal: for transformers' own.
        **kwargs: for transformers' own.

    Returns:
        [B, q, G K, D], and None for the attention weights.
    """
    if not _serves(module, query, key, attention_mask, dropout, kwargs):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling=scaling, is_causal=is_causal, **kwargs
        )
    batch, heads, new, width = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(batch, key.shape[1], groups * new, width)
    mask = attention_mask
    if mask is not None and new > 1:
        mask = mask.expand(-1, groups, -1, -1).reshape(mask.shape[0], 1, groups * new, mask.shape[3])
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(batch, heads, new, width).transpose(1, 2).contiguous(), None


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
        and key.shape[1] < query.shape[1]
        # Without a mask only the last token alone sees every column.
        and new < columns
        and (new == 1 if mask is None else mask.dim() == 4 and mask.shape[1] == 1 and mask.shape[2] == new)
        and not dropout
        and not any(kwargs.get(name) is not None for name in _OTHERS)
        and not kwargs.get("output_attentions")
        and not wants_gradient(query, key)
        and _backend.forced() != "reference"
    )
