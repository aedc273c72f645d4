"""Several checkpoints of one architecture added into one."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from personafast.errors import PersonafastError

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_OURS = "_personafast"


def merge_models(reference: nn.Module, models: Mapping[str, tuple[nn.Module, float]]) -> nn.Module:
    """theta_0 + sum_i alpha_i (theta_i - theta_0) as a model of its own (task arithmetic, arXiv 2212.04089).

    Each tensor is summed in fp32 and cast to the reference's dtype. Parameters that are equal in all models are the
    reference's own, not copies. Personas attached to the reference are not part of the result.

    Args:
        reference: theta_0.
        models: name -> (theta_i, alpha_i).

    Raises:
        PersonafastError: parameters or buffers differ in name or shape, buffers in value, or a parameter holds no
            floats (quantised) or is not in memory.
    """
    check_mergeable(reference, {name: model for name, (model, _) in models.items()})
    theirs = [(dict(model.named_parameters()), alpha) for model, alpha in models.values()]
    made: dict[int, Any] = {}
    # No inference tensors, whatever mode the caller is in: the result may be used in another.
    with torch.inference_mode(False), torch.no_grad():
        for path, own in reference.named_parameters():
            made[id(own)] = _sum(own, [(parameters[path], alpha) for parameters, alpha in theirs])
        with _without_personas(reference):
            # The parameters are in the memo, so that this copies the structure only; tied ones stay tied.
            return copy.deepcopy(reference, made)


def check_mergeable(reference: nn.Module, models: Mapping[str, nn.Module]) -> None:
    """Raise what `merge_models` raises."""
    for name, model in models.items():
        _check_parameters(name, dict(reference.named_parameters()), dict(model.named_parameters()))
        _check_buffers(name, dict(reference.named_buffers()), dict(model.named_buffers()))


def _sum(own: nn.Parameter, others: list[tuple[nn.Parameter, float]]) -> nn.Parameter:
    base = own.detach().float()
    moved = None
    for other, alpha in others:
        if other is own:
            continue
        step = other.detach().float() - base
        if step.any():
            moved = (base.clone() if moved is None else moved).add_(step, alpha=alpha)
    return own if moved is None else nn.Parameter(moved.to(own.dtype), requires_grad=False)


def _check_parameters(name: str, own: Mapping[str, nn.Parameter], theirs: Mapping[str, nn.Parameter]) -> None:
    for path in sorted(own.keys() ^ theirs.keys()):
        holder, other = (f"policies[{name!r}]", "the reference") if path in theirs else ("the reference", repr(name))
        raise PersonafastError(
            f"merged: {holder} has a parameter {path!r} that {other} lacks (of its own, or tied to another); merging "
            "needs models of one architecture"
        )
    for path, parameter in own.items():
        if theirs[path].shape != parameter.shape:
            raise PersonafastError(
                f"merged: {path} is {list(theirs[path].shape)} in policies[{name!r}] and {list(parameter.shape)} in "
                "the reference; merging needs models of one architecture"
            )
        for tensor in (parameter, theirs[path]):
            if tensor.is_meta or not tensor.is_floating_point():
                what = "not in memory (meta)" if tensor.is_meta else f"of {tensor.dtype}"
                raise PersonafastError(f"merged: {path} is {what}; merging needs whole models in floating point")


def _check_buffers(name: str, own: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> None:
    for path, buffer in own.items():
        other = theirs.get(path)
        if other is None or other.shape != buffer.shape or not torch.equal(other.to(buffer.dtype), buffer):
            raise PersonafastError(
                f"merged: buffer {path} of policies[{name!r}] is not that of the reference (other positions or "
                "scales); merging needs models of one architecture"
            )


@contextlib.contextmanager
def _without_personas(model: nn.Module) -> Iterator[None]:
    """Take everything of ours off every module for the time of the `with`: a copy made inside has none of it."""
    kept: list[tuple[nn.Module, dict[str, Any]]] = []
    try:
        for module in model.modules():
            state = module.__dict__
            mine = {key: state[key] for key in state if key.startswith(_OURS)}
            if _is_ours(state.get("forward")):
                mine["forward"] = state["forward"]
            hooks = {key: state[key] for key in _HOOKS if any(_is_ours(hook) for hook in state[key].values())}
            kept.append((module, {**mine, **hooks}))
            for key in mine:
                del state[key]
            for key, found in hooks.items():
                state[key] = OrderedDict((i, hook) for i, hook in found.items() if not _is_ours(hook))
        yield
    finally:
        for module, state in kept:
            module.__dict__.update(state)


def _is_ours(function: Any) -> bool:
    function = getattr(function, "func", function)  # of a partial
    owner = getattr(function, "__self__", None)  # of a method
    where = getattr(function, "__module__", None) if owner is None else type(owner).__module__
    return isinstance(where, str) and where.split(".")[0] == "personafast"
