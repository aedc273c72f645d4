"""Experts that share one parameter [experts, ...]: where they are, and their forward pass with masked weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# (projection, expert, x [n, in], its weight [out, in], bias [out] or None, the tokens x is of) -> [n, out]
Project = Callable[[str, int, torch.Tensor, torch.Tensor, "torch.Tensor | None", torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FusedExperts:
    """Experts whose module says how its parameters lie (transformers' ``use_experts_implementation``).

    Attributes:
        module: holds `up` and ``down_proj``, and their biases, if any, as ``..._bias``.
        up: ``gate_up_proj``, or ``up_proj`` where nothing is gated.
        transposed: whether an expert's weight lies as [in, out].
    """

    module: nn.Module
    up: str
    transposed: bool

    @classmethod
    def of(cls, module: nn.Module) -> FusedExperts | None:
        """The experts a module holds, or None where it holds none or does not say how they lie."""
        fused = {
            name
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3 and parameter.is_floating_point()
        }
        up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
        understood = hasattr(module, "is_transposed") and hasattr(module, "_apply_gate")
        if not understood or fused != {up, "down_proj"} or getattr(module, "has_post_expert_norm", False):
            return None
        return cls(module, up, bool(module.is_transposed))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The weights of all experts, by projection."""
        return {name: self.module.get_parameter(name) for name in (self.up, "down_proj")}

    @property
    def count(self) -> int:
        """How many experts there are."""
        return self.module.get_parameter("down_proj").shape[0]

    def features(self, name: str) -> tuple[int, int]:
        """(out, in) of one expert's projection."""
        _, rows, columns = self.module.get_parameter(name).shape
        return (columns, rows) if self.transposed else (rows, columns)

    def forward(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, project: Project
    ) -> torch.Tensor:
        """sum_k weights[t, k] E_index[t, k](hidden[t]), expert by expert as transformers' plain form does.

        Args:
            hidden: [T, H].
            index: int64 [T, K], an expert beyond the last one standing for none.
            weights: [T, K].
            project: applies one projection of one expert.
        """
        module: Any = self.module
        held = dict(module.named_parameters(recurse=False))
        act = module._apply_gate if getattr(module, "has_gate", True) else module.act_fn
        out = torch.zeros_like(hidden)
        for expert in index.unique().tolist():
            if not 0 <= expert < self.count:
                continue
            place, token = torch.where(index.t() == expert)
            x = hidden[token]
            for name in (self.up, "down_proj"):
                weight = held[name][expert]
                bias = held.get(f"{name}_bias")
                x = project(
                    name,
                    expert,
                    x,
                    weight.t() if self.transposed else weight,
                    None if bias is None else bias[expert],
                    token,
                )
                if name == self.up:
                    x = act(x)
            out.index_add_(0, token, (x * weights[token, place, None]).to(out.dtype))
        return out
