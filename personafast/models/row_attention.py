"""Attention over a `RowCache`, through transformers' `AttentionInterface`.

Every family that asks the interface for its attention function gets this one while `attending` is in force. Its name
has no mask function, so transformers makes no mask, and windows and the soft cap come as the layer gives them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from personafast import ops
from personafast.errors import UnsupportedModelError
from personafast.models.cache import PLAN, Plan

NAME = "personafast_rows"


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """softmax(cap(scaling Q K^T) + mask) V with cap(x) = softcap tanh(x / softcap); a row sees its own columns.

    Args:
        module: the attention layer.
        query: [R, G K, c, D].
        key: [R, K, n, D], as `RowCache` returned it.
        value: likewise.
        attention_mask: None: the cache knows who sees what.
        dropout: 0.
        scaling: D ** -0.5 unless given.
        sliding_window: how many columns a token sees, its own included; None for all.
        softcap: None for none.
        **kwargs: what else transformers gives.

    Returns:
        [R, c, G K, D], and None for the attention weights.

    Raises:
        UnsupportedModelError: the layer attends in a way that this does not know.
    """
    plan: Plan | None = getattr(key, PLAN, None)
    unknown = [name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None]
    if plan is None or unknown or attention_mask is not None or dropout:
        what = unknown[0] if unknown else "a mask, dropout or keys of its own"
        raise UnsupportedModelError(
            f"model: {type(module).__name__} attends with {what}, which a cache of rows does not know; use a "
            "DynamicCache"
        )
    if sliding_window is None:
        sliding_window = getattr(module, "sliding_window", None)
    flash = _flash()
    if flash is not None and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        return _by_flash(flash, query, key, value, plan, scaling, sliding_window, softcap), None
    if plan.causal(sliding_window) and not softcap:
        groups = query.shape[1] // key.shape[1]
        first = F.scaled_dot_product_attention(
            query, key, value, is_causal=query.shape[2] > 1, scale=scaling, enable_gqa=groups > 1
        )
        return first.transpose(1, 2).contiguous(), None
    mask = plan.mask(sliding_window)
    if softcap:
        return _capped(query, key, value, mask, scaling, softcap), None
    return ops.attend(query, key, value, mask, scaling).transpose(1, 2).contiguous(), None


def _capped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float,
) -> torch.Tensor:
    """With the soft cap, which no kernel of torch has; as transformers' eager attention rounds."""
    rows, heads, new, width = query.shape
    groups = heads // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * (width**-0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(dim=-1).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous()


def _by_flash(
    flash: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    plan: Plan,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """flash-attn reads as many columns of each row as it has, so nothing is masked. Unverified: see docs/density.md."""
    lengths = (plan.positions[:, -1] + 1).to(torch.int32)
    out: torch.Tensor = flash(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        cache_seqlens=lengths,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=softcap or 0.0,
    )
    return out


@functools.cache
def _flash() -> Any:
    """flash-attn's attention over a cache, where it is installed."""
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    return flash_attn_with_kvcache


def understood(model: nn.Module) -> bool:
    """Whether `model` asks transformers' interface for its attention function, in every layer."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    return bool(getattr(base, "_supports_attention_backend", False))


@contextlib.contextmanager
def attending(model: nn.Module) -> Iterator[None]:
    """Let `model` attend over a `RowCache` within the `with`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    before = text._attn_implementation
    text._attn_implementation = NAME
    try:
        yield
    finally:
        text._attn_implementation = before
