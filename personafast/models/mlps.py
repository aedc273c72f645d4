"""The gated MLPs of a decoder whose activation one kernel can stand in for, found by what they compute."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from personafast import ops
from personafast.ops import _backend

_LINEARS = ("gate_proj", "up_proj", "down_proj")


def find_mlps(model: nn.Module) -> list[nn.Module]:
    """Every module that computes down(silu(gate(x)) * up(x)).

    A class is tried once with each activation, on a copy with three small linears: the names promise nothing.
    """
    kinds: dict[tuple[type[nn.Module], Any], bool] = {}
    found = []
    for module in model.modules():
        if not _looks_like_one(module):
            continue
        activation: Any = module.act_fn
        kind = (type(module), type(activation) if isinstance(activation, nn.Module) else activation)
        if kind not in kinds:
            kinds[kind] = _is_one(module)
        if kinds[kind]:
            found.append(module)
    return found


def gated(mlp: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Stands in for the forward pass of a module that `find_mlps` has found."""
    if not x.is_cpu or _backend.forced() == "reference":
        out: torch.Tensor = type(mlp).forward(mlp, x)
        return out
    parts: Any = mlp._modules
    down: torch.Tensor = parts["down_proj"](ops.silu_mul(parts["gate_proj"](x), parts["up_proj"](x)))
    return down


def _looks_like_one(module: nn.Module) -> bool:
    parts = module._modules
    return (
        all(parts.get(name) is not None for name in _LINEARS)
        and set(parts) <= {*_LINEARS, "act_fn"}
        and not module._parameters
        and hasattr(module, "act_fn")
        and "forward" not in module.__dict__
    )


@torch.no_grad()
def _is_one(module: nn.Module) -> bool:
    generator = torch.Generator().manual_seed(0)
    trial = copy.copy(module)
    # The copy shares all but its parts with the module.
    trial._modules = dict(module._modules)
    shapes = {"gate_proj": (8, 12), "up_proj": (8, 12), "down_proj": (12, 8)}
    for name, (width, outputs) in shapes.items():
        # On meta nothing is drawn: attaching leaves torch's generator as it is.
        linear = nn.Linear(width, outputs, bias=False, device="meta")
        linear.weight = nn.Parameter(torch.randn(outputs, width, generator=generator))
        trial._modules[name] = linear
    x = torch.randn(2, 3, 8, generator=generator)
    try:
        found = type(module).forward(trial, x)
    except Exception:
        return False
    return isinstance(found, torch.Tensor) and torch.allclose(found, gated(trial, x), rtol=1e-4, atol=1e-4)
