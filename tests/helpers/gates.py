"""Models whose weights are multiplied by hand with a persona's gate."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from personafast.masks import PersonaMask
from personafast.models.anatomy import anatomy, is_conv1d, linear_features


def random_mask(net: Any, seed: int, gamma: float = 0.0, leave: tuple[str, ...] = ()) -> PersonaMask:
    """Keeps half of the weights of every linear in the blocks, but for those whose path ends in one of `leave`."""
    generator = torch.Generator().manual_seed(seed)
    words, features = {}, {}
    for path, linear in anatomy(net).linears.items():
        if leave and path.endswith(leave):
            continue
        out, features[path] = linear_features(linear)
        shape = (out, -(-features[path] // 32))
        words[path] = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int32)
    return PersonaMask(words, features, {"gamma": gamma} if gamma else {})


def gate(masks: Mapping[str, PersonaMask], shares: Mapping[str, float], path: str) -> torch.Tensor | None:
    """sum_i share_i (M_i + gamma_i (1 - M_i)) of one linear, [out, in] in float64; None where no mask covers it."""
    covering = [masks[name] for name in shares if path in masks[name].words]
    if not covering:
        return None
    ones = torch.ones(covering[0].dense(path).shape, dtype=torch.float64)
    total = torch.zeros_like(ones)
    for name, share in shares.items():
        own = ones
        if path in masks[name].words:
            kept = masks[name].dense(path)
            own = kept + masks[name].gamma * (~kept).double()
        total += share * own
    return total


def gated(net: Any, masks: Mapping[str, PersonaMask], shares: Mapping[str, float]) -> Any:
    """A copy of the model with every weight W replaced by W * G."""
    twin = copy.deepcopy(net)
    for path, linear in anatomy(twin).linears.items():
        found = gate(masks, shares, path)
        if found is not None:
            with torch.no_grad():
                linear.weight.mul_((found.t() if is_conv1d(linear) else found).to(linear.weight.dtype))
    return twin
