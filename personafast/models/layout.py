"""Weights that lie in memory as [in, out], turned in place so that the masked kernel can read their rows."""

from __future__ import annotations

import torch
from torch import nn


def turn(parameter: nn.Parameter) -> bool:
    """Let the last two dimensions change places in memory; values, shape and the parameter itself stay.

    Kernels read masks along `in`, so they want a weight's inputs adjacent. A transposed copy beside the weight would
    double its memory; this moves it, one parameter at a time.

    Returns:
        Whether it has been moved; not when it lies like that already.
    """
    if parameter.transpose(-2, -1).is_contiguous():
        return False
    _lay(parameter, parameter.detach().transpose(-2, -1).contiguous().transpose(-2, -1))
    return True


def turn_back(parameter: nn.Parameter) -> None:
    """Undo `turn`: contiguous again."""
    _lay(parameter, parameter.detach().contiguous())


def _lay(parameter: nn.Parameter, values: torch.Tensor) -> None:
    # No inference tensor, whatever mode this is called in: it may be trained.
    with torch.inference_mode(False), torch.no_grad():
        parameter.data = values if not values.is_inference() else values.clone()
