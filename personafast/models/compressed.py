"""One mask's weights in place of the dense ones: what `attach(..., keep_dense=False)` makes of a linear."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from personafast import ops
from personafast.models.anatomy import is_conv1d, linear_features
from personafast.ops._sparse_linear import BoundSparse


def home(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """The dtype and device that a module's activations are likely to have.

    Weights tell it as long as they are numbers in memory. Quantised ones have a dtype of their own: their scales and
    biases speak then. Where all are away (offloaded, on meta) it is float32 on the CPU: what is made there follows the
    activations once it sees them.
    """
    compressed = [part.__dict__.get("_personafast_compressed") for part in module.modules()]
    values = [found.values for found in compressed if found is not None]
    weights = [parameter for parameter in module.parameters() if not parameter.is_meta]
    known = weights + values + [buffer for buffer in module.buffers() if not buffer.is_meta]
    dtype = next((tensor.dtype for tensor in known if tensor.is_floating_point() and tensor.dtype.itemsize > 1), None)
    device = known[0].device if known else torch.device("cpu")
    return dtype or torch.float32, device


@dataclass(frozen=True)
class CompressedWeight:
    """The weights that a mask keeps, as `ops.compress` lays them out."""

    values: torch.Tensor
    bitmap: torch.Tensor
    row_offsets: torch.Tensor
    requires_grad: bool
    _bound: BoundSparse = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # Not a cached property: the lock that takes is a break in a graph of torch.compile.
        object.__setattr__(self, "_bound", BoundSparse(self.values, self.bitmap, self.row_offsets))

    @classmethod
    def take(cls, linear: nn.Module, words: torch.Tensor) -> CompressedWeight:
        """Compress a linear's weight and free it: its parameter stays by name and shape, without memory (meta)."""
        weight = linear.weight
        assert isinstance(weight, nn.Parameter)
        dense = weight.detach()
        if is_conv1d(linear):
            dense = dense.t().contiguous()
        taken = cls(*ops.compress(dense, words.to(weight.device)), weight.requires_grad)
        linear.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)
        taken.install(linear)
        return taken

    def install(self, linear: nn.Module, *, forward: bool = False) -> None:
        """Be the weight of a linear whose own is on the meta device; with `forward` for calls of the linear too.

        `attach` replaces the forward of what it compresses itself; a linear that is loaded compressed needs one.
        """
        if forward:
            # A partial, not a closure: a deep copy of the model computes with the copy's weights.
            linear.forward = functools.partial(_product, linear)
        linear.__dict__["_personafast_compressed"] = self
        linear.__dict__["_personafast_hooks"] = [
            linear.register_state_dict_post_hook(_save_dense),
            linear.register_load_state_dict_pre_hook(_refuse_to_load),
        ]

    def put_back(self, linear: nn.Module) -> None:
        """Give the linear a dense weight again: what was kept, and zeros for what is gone."""
        # No inference tensor: it may be trained.
        with torch.inference_mode(False), torch.no_grad():
            linear.weight = nn.Parameter(self.dense(linear), requires_grad=self.requires_grad)
        for hook in linear.__dict__.pop("_personafast_hooks"):
            hook.remove()
        del linear.__dict__["_personafast_compressed"]

    def dense(self, linear: nn.Module) -> torch.Tensor:
        """The weight with zeros for what is gone, in the dtype that `model.to` has given the linear since."""
        missing = linear.weight
        assert isinstance(missing, nn.Parameter)
        shape = linear_features(linear)
        weight = torch.zeros(shape, dtype=missing.dtype, device=self.values.device)
        weight[ops.unpack_mask(self.bitmap, shape[1])] = self.values.to(missing.dtype)
        return weight.t().contiguous() if is_conv1d(linear) else weight

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., I] -> [..., O]."""
        return self._bound(x, bias)


def _product(linear: nn.Module, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name for it
    compressed: CompressedWeight = linear.__dict__["_personafast_compressed"]
    return compressed(input, linear._parameters["bias"])


def _save_dense(linear: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    # What is saved is the model that speaks, not a placeholder without numbers.
    with torch.no_grad():
        state_dict[f"{prefix}weight"] = linear.__dict__["_personafast_compressed"].dense(linear)


def _refuse_to_load(linear: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    errors: list[str] = rest[-1]
    if f"{prefix}weight" in state_dict:
        errors.append(f"{prefix}weight: its dense weight was given up (keep_dense=False); detach before loading")
