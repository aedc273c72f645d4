"""silu_mul: what a gated MLP does between its linears, without waking torch's threads for it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from personafast.ops import _backend
from personafast.ops._library import wants_gradient, watched

_KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """y = silu(gate) * up, with silu(g) = g / (1 + exp(-g)) (SwiGLU, arXiv 2002.05202), as torch rounds the two.

    A C++ kernel does it on a CPU, outside `torch.compile`, autocast, tracing and torch.func and where no gradient is
    wanted; all else, and everything with `use_backend("reference")`, is torch's.

    Args:
        gate: [...] float32, bfloat16 or float16.
        up: likewise, of the same shape and dtype.

    Returns:
        [...].
    """
    if not _serves(gate, up):
        return F.silu(gate) * up
    out = torch.empty_like(gate)
    _backend.module("cpu").silu_mul(
        out.data_ptr(),
        gate.data_ptr(),
        up.data_ptr(),
        gate.numel(),
        _KERNEL_DTYPES[gate.dtype],
        torch.get_num_threads(),
    )
    return out


def _serves(gate: torch.Tensor, up: torch.Tensor) -> bool:
    return (
        gate.is_cpu
        and up.is_cpu
        and type(gate) is type(up) is torch.Tensor
        and gate.dtype in _KERNEL_DTYPES
        and up.dtype == gate.dtype
        and up.shape == gate.shape
        and gate.is_contiguous()
        and up.is_contiguous()
        and not watched()
        and not wants_gradient(gate, up)
        and _backend.forced() in (None, "cpu")
        and _backend.available("cpu")[0]
    )
