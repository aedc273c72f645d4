"""The weights of a model that a mask can lie over: linears of the blocks, and experts fused into one parameter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from personafast.errors import PersonafastError
from personafast.models.anatomy import Anatomy, anatomy, is_conv1d, linear_features, plain_path

ATTENTION, MLP = "attention", "mlp"


@dataclass(frozen=True)
class Target:
    """One matrix that a mask covers.

    Attributes:
        path: its name in a mask: that of the linear, or of the fused parameter with the expert's index behind it, as in
            ``model.layers.0.mlp.experts.down_proj.3``.
        module: the linear, or the module that holds the experts.
        parameter: name of the weight in the module.
        features: (out, in).
        transposed: whether the weight lies as [in, out] (Conv1D, some experts).
        expert: index into the first dimension of a fused parameter, or None.
    """

    path: str
    module: nn.Module
    parameter: str
    features: tuple[int, int]
    transposed: bool = False
    expert: int | None = None

    @property
    def kind(self) -> str:
        """``attention`` or ``mlp``."""
        return module_kind(self.path)

    def weight(self) -> torch.Tensor:
        """The weight as [out, in], a view: writing into it changes the model."""
        whole = getattr(self.module, self.parameter)
        matrix = whole.detach() if self.expert is None else whole.detach()[self.expert]
        return matrix.t() if self.transposed else matrix


def block_of(path: str) -> int:
    """Index of the block that a path lies in: its first number."""
    return next((int(part) for part in path.split(".") if part.isdigit()), 0)


def module_kind(path: str) -> str:
    """``attention`` where a part of the path says so, else ``mlp``."""
    return ATTENTION if any("attn" in part or "attention" in part for part in path.split(".")) else MLP


def short_name(path: str) -> str:
    """What a linear is called inside its block: `self_attn.q_proj` of `model.layers.3.self_attn.q_proj`.

    An expert goes by the name that all experts of its kind share.
    """
    parts = path.split(".")
    first = next((index for index, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(part for part in parts[first + 1 :] if not part.isdigit())


@dataclass(frozen=True)
class Targets(Mapping[str, Target]):
    """What can be masked in a model, by path, in the order of the blocks.

    Attributes:
        parts: the anatomy the linears come from.
        by_path: the targets.
        experts: path of a module of fused experts -> the module, where its inputs can be followed.
        left_out: parameters of fused experts that cannot be masked, since nothing says how they are laid out.
    """

    parts: Anatomy
    by_path: Mapping[str, Target]
    experts: Mapping[str, nn.Module]
    left_out: tuple[str, ...]

    def __getitem__(self, path: str) -> Target:
        return self.by_path[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_path)

    def __len__(self) -> int:
        return len(self.by_path)


def find_targets(model: nn.Module) -> Targets:
    """Everything in a model's blocks that a mask can cover.

    Experts in one 3-D parameter are covered one by one where their module declares its layout (transformers'
    ``use_experts_implementation``); those of other modules are listed in `left_out`.

    Raises:
        UnsupportedModelError: the model's structure was not understood.
    """
    parts = anatomy(model)
    found: dict[str, Target] = {}
    for path, linear in parts.linears.items():
        found[path] = Target(path, linear, "weight", linear_features(linear), is_conv1d(linear))
    experts: dict[str, nn.Module] = {}
    left_out: list[str] = []
    inside = {id(part) for block in parts.blocks for part in block.modules()}
    for name, module in model.named_modules():
        fused = {
            key: parameter
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3 and parameter.is_floating_point()
        }
        if id(module) not in inside or not fused:
            continue
        path = plain_path(name)
        if not _declares_layout(module, fused):
            left_out += [f"{path}.{key}" for key in fused]
            continue
        experts[path] = module
        transposed = bool(module.is_transposed)
        for key, parameter in fused.items():
            count, rows, columns = parameter.shape
            features = (columns, rows) if transposed else (rows, columns)
            for index in range(count):
                where = f"{path}.{key}.{index}"
                found[where] = Target(where, module, key, features, transposed, index)
    return Targets(parts, found, experts, tuple(left_out))


def _declares_layout(module: nn.Module, fused: Mapping[str, nn.Parameter]) -> bool:
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    return hasattr(module, "is_transposed") and hasattr(module, "_apply_gate") and set(fused) == {up, "down_proj"}


def expert_inputs(module: nn.Module, index: int, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """What each projection of one expert reads, given the rows x [T, in] that are routed to it.

    The up projection reads x itself; what the down projection reads is computed again as the module does.
    """
    part: dict[str, torch.Tensor] = dict(module.named_parameters(recurse=False))
    gated = getattr(module, "has_gate", True)
    name = "gate_up_proj" if gated else "up_proj"
    weight = part[name][index]
    hidden = x.to(weight.dtype) @ (weight if module.is_transposed else weight.t())
    if f"{name}_bias" in part:
        hidden = hidden + part[f"{name}_bias"][index]
    act = module._apply_gate if gated else module.act_fn
    return {name: x, "down_proj": act(hidden)}  # type: ignore[operator]


def refuse_unknown(model: nn.Module, path: str, argument: str) -> PersonafastError:
    """The error for a path that no mask can cover; it says so where the path is the head's or an embedding's."""
    for find in ("get_output_embeddings", "get_input_embeddings"):
        special = getattr(model, find, lambda: None)()
        names = {plain_path(name) for name, module in model.named_modules() if module is special}
        if special is not None and (path in names or any(name.endswith(f".{path}") for name in names)):
            return PersonafastError(f"{argument}: {path!r} is the head or an embedding, which is never masked; drop it")
    return PersonafastError(f"{argument}: the model has no such linear; calibrate on this model")
