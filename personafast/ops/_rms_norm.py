"""rms_norm: the RMSNorm of most decoders in one pass, where torch takes six operators."""

from __future__ import annotations

import torch

from personafast.ops import _backend
from personafast.ops._library import PLAIN, wants_gradient, watched

_KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# One thread, plain C++: beyond so many numbers torch's operators catch up.
KERNEL_NUMBERS = 1 << 16


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = weight * (x / sqrt(mean(x^2) + eps)), as transformers' `LlamaRMSNorm` rounds it.

    The mean and the quotient are fp32; the quotient is rounded to the dtype of `x`, and so is its product with the
    weight. Up to 65,536 numbers a C++ kernel does it on a CPU, outside `torch.compile` and where no gradient is wanted;
    all else, and everything with `use_backend("reference")`, is plain torch.

    Args:
        x: [..., H] float32, bfloat16 or float16.
        weight: [H] in the dtype of `x`.
        eps: added to the mean.

    Returns:
        [..., H].
    """
    if not serves(x, weight):
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return weight * scaled.to(x.dtype)
    return run_kernel(x, weight, eps)


def run_kernel(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` by the kernel, for arguments that it `serves`."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    _backend.module("cpu").rms_norm(
        out.data_ptr(), x.data_ptr(), weight.data_ptr(), eps, x.numel() // width, width, _KERNEL_DTYPES[x.dtype]
    )
    return out


def serves(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel takes this call."""
    return (
        x.is_cpu
        and weight.is_cpu
        and type(x) is torch.Tensor
        and type(weight) in PLAIN
        and not watched()
        and x.dtype in _KERNEL_DTYPES
        and x.is_contiguous()
        and 0 < x.numel() <= KERNEL_NUMBERS
        and weight.dtype == x.dtype
        and weight.shape == x.shape[-1:]
        and weight.is_contiguous()
        and not wants_gradient(x, weight)
        and _backend.pick("add_inject_rms_norm", "cpu") == "cpu"
    )
