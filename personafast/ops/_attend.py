"""attend: softmax attention of a few new tokens to many, with grouped heads."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from personafast.ops import _backend
from personafast.ops._library import wants_gradient, watched

_KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# New tokens up to which the kernel was the faster one at every shape tried, and the widest head (docs/kernels.md).
KERNEL_QUERIES, KERNEL_WIDTH = 16, 256


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """softmax(scale Q K^T + mask) V, as `torch.nn.functional.scaled_dot_product_attention` (arXiv 1706.03762, eq. 1).

    G query heads share a key head (arXiv 2305.13245): head h attends to key head h // G. Up to 16 queries a C++ kernel
    does it on a CPU, outside `torch.compile`, autocast, tracing and torch.func and where no gradient is wanted: keys
    and values are read once for all G heads, where they are; weights and sums are fp32 and rounded once, and a row
    depends neither on the rest of the batch nor on the number of threads. All else is torch's, with heads that share a
    key head as queries of one; with `use_backend("reference")` everything is.

    Args:
        query: [B, G K, q, D] float32, bfloat16 or float16.
        key: [B, K, n, D] in the dtype of `query`; may be part of a longer buffer.
        value: likewise.
        mask: bool (True: attend) or in the dtype of `query` (added), [B or 1, 1, q, n]. A query that sees nothing
            gets zeros.
        scale: D ** -0.5 unless given.

    Returns:
        [B, G K, q, D]; the transposed view of a contiguous [B, q, G K, D] if the kernel made it.
    """
    if not _serves(query, key, value, mask):
        return _torch(query, key, value, mask, scale)
    batch, heads, queries, width = query.shape
    key_heads, columns = key.shape[1:3]
    out = query.new_empty(batch, queries, heads, width)
    if mask is None:
        pointer, mask_stride_b, mask_stride_q, adds = 0, 0, 0, False
    else:
        pointer, adds = mask.data_ptr(), mask.dtype is not torch.bool
        mask_stride_b = 0 if mask.shape[0] == 1 else mask.stride(0)
        mask_stride_q = mask.stride(2)
    _backend.module("cpu").attend(
        out.data_ptr(),
        queries * heads * width,
        width,
        heads * width,
        query.data_ptr(),
        *query.stride()[:3],
        key.data_ptr(),
        *key.stride()[:3],
        value.data_ptr(),
        *value.stride()[:3],
        pointer,
        mask_stride_b,
        mask_stride_q,
        adds,
        width**-0.5 if scale is None else scale,
        batch,
        key_heads,
        heads // key_heads,
        queries,
        columns,
        width,
        _KERNEL_DTYPES[query.dtype],
        torch.get_num_threads(),
    )
    return out.transpose(1, 2)


def _torch(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    batch, heads, queries, width = query.shape
    key_heads = key.shape[1]
    groups = heads // key_heads
    foldable = mask is None or (mask.dim() == 4 and mask.shape[1:3] == (1, queries))
    if groups == 1 or not foldable or not query.is_cpu or _backend.forced() == "reference":
        return F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=groups > 1)
    # [B, G K, q, D] is [B, K, G q, D]: torch's kernel, whose cost on a CPU is by head, runs over G times fewer.
    folded = query.reshape(batch, key_heads, groups * queries, width)
    if mask is not None and queries > 1:
        mask = mask.expand(-1, groups, -1, -1).reshape(mask.shape[0], 1, groups * queries, mask.shape[3])
    return F.scaled_dot_product_attention(folded, key, value, mask, scale=scale).reshape(*query.shape[:3], -1)


def _serves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> bool:
    if not (query.is_cpu and key.is_cpu and value.is_cpu) or watched():
        return False
    if not type(query) is type(key) is type(value) is torch.Tensor or query.dim() != 4 or key.dim() != 4:
        return False
    dtype = query.dtype
    if dtype not in _KERNEL_DTYPES or key.dtype != dtype or value.dtype != dtype:
        return False
    batch, heads, queries, width = query.shape
    key_heads, columns = key.shape[1:3]
    if not (0 < queries <= KERNEL_QUERIES and 0 < width <= KERNEL_WIDTH and columns and key_heads):
        return False
    if key.shape != (batch, key_heads, columns, width) or value.shape != key.shape or heads % key_heads:
        return False
    if width > 1 and not query.stride(3) == key.stride(3) == value.stride(3) == 1:
        return False
    if mask is not None:
        if not mask.is_cpu or type(mask) is not torch.Tensor or mask.dtype not in (torch.bool, dtype):
            return False
        if mask.dim() != 4 or mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, queries, columns):
            return False
        if columns > 1 and mask.stride(3) != 1:
            return False
    if wants_gradient(query, key, value, mask):
        return False
    return _backend.forced() in (None, "cpu") and _backend.available("cpu")[0]
