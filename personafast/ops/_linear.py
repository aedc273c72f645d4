"""linear: F.linear, by the C++ kernel where that reads the weight faster than torch does."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from personafast.ops import _backend
from personafast.ops._library import PLAIN, wants_gradient, watched

_KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Rows up to which the kernel beat F.linear at every shape tried, 128 x 896 to 32000 x 2048 (docs/kernels.md).
KERNEL_ROWS = {torch.float32: 64, torch.bfloat16: 64, torch.float16: 512}


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y = x weight^T + bias, as `torch.nn.functional.linear`, which takes whatever the kernel does not.

    The kernel (that of `masked_linear`, without masks) takes up to 64 rows of fp32 or bf16 and 512 of fp16 on a CPU,
    outside `torch.compile`, autocast, tracing and torch.func and where no gradient is wanted: for few rows its time is
    that of reading the weight. Sums are in fp32 and rounded once, a row's in one order whatever else is in the batch.
    With `use_backend("reference")` it is F.linear.

    Args:
        x: [..., I].
        weight: [O, I] in the dtype of `x`.
        bias: [O] in the dtype of `x`, or None.

    Returns:
        [..., O].
    """
    kind = _KERNEL_DTYPES.get(x.dtype)
    if kind is None or not _serves(x, weight, bias):
        return F.linear(x, weight, bias)
    outputs, features = weight.shape
    rows = x.numel() // features
    if rows > KERNEL_ROWS[x.dtype]:
        return F.linear(x, weight, bias)
    out = x.new_empty((*x.shape[:-1], outputs))
    _backend.module("cpu").linear(
        out.data_ptr(),
        x.data_ptr(),
        weight.data_ptr(),
        weight.stride(0),
        0 if bias is None else bias.data_ptr(),
        rows,
        outputs,
        features,
        kind,
        torch.get_num_threads(),
    )
    return out


def _serves(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    if not (x.is_cpu and weight.is_cpu and type(x) is torch.Tensor and type(weight) in PLAIN and x.is_contiguous()):
        return False
    if watched():
        return False
    if weight.dtype != x.dtype or weight.dim() != 2 or weight.layout is not torch.strided or weight.stride(1) != 1:
        return False
    if x.dim() == 0 or x.shape[-1] != weight.shape[1] or weight.shape[1] == 0:
        return False
    if bias is not None:
        if not (bias.is_cpu and bias.dtype == x.dtype and bias.is_contiguous() and type(bias) in PLAIN):
            return False
        if bias.shape != weight.shape[:1]:  # F.linear spreads some of these, and refuses the others
            return False
    if wants_gradient(x, weight, bias):
        return False
    return _backend.pick("masked_linear", "cpu") == "cpu"
