"""Shapes and pieces that several modules of cases share."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.case import Inputs, nbytes
from personafast import ops

# Outputs x features: the wide projection of an MLP, and one of attention.
WEIGHTS = ((11008, 4096), (4096, 4096))


def unpack(words: torch.Tensor, features: int) -> torch.Tensor:
    """Bits of packed masks as bool, independent of the operators that are measured."""
    bits = np.unpackbits(words.numpy().view(np.uint8), axis=-1, count=features, bitorder="little")
    return torch.from_numpy(bits).bool()


def masked(weight: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """`weight` with a packed mask multiplied in."""
    kept = unpack(words, weight.shape[1])
    if weight.element_size() == 2:
        # As integers: several times faster than torch's product with bool.
        return torch.from_numpy(weight.view(torch.int16).numpy() * kept.numpy()).view(weight.dtype)
    return weight * kept


def linear(inputs: Inputs) -> torch.Tensor:
    return F.linear(inputs.x, inputs.weight)


def dense(inputs: Inputs) -> torch.Tensor:
    """Our own dense pass."""
    return ops.linear(inputs.x, inputs.weight)


def linear_traffic(inputs: Inputs) -> int:
    """The weight, the rows and the result, once each."""
    rows, outputs = inputs.x.shape[0], inputs.weight.shape[0]
    return nbytes(inputs.weight, inputs.x) + rows * outputs * inputs.x.element_size()


def weight_bytes(inputs: Inputs) -> int:
    return nbytes(inputs.weight)
