"""What PEFT puts around a model's layers, known by structure: PEFT itself is never imported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

from personafast.errors import PersonafastError

_NONE = object()


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    inside = getattr(model, "get_base_model", None)
    return model if inside is None else inside()


def wrapped_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """(path, wrapper, what it wraps) of every layer that adapters act on."""
    for path, module in model.named_modules():
        if not hasattr(type(module), "active_adapters"):
            continue
        # The second name is that of modules which are trained whole (modules_to_save).
        inside = module._modules.get("base_layer") or module._modules.get("original_module")
        if inside is not None:
            yield path, module, inside


def check_unmerged(path: str, wrapper: nn.Module) -> None:
    """Raise `PersonafastError` when adapters have been added into the weights that a wrapper holds."""
    merged = wrapper.__dict__.get("merged_adapters")
    if merged:
        raise PersonafastError(
            f"model: adapter {merged[0]!r} is merged into {path}, so the reference is gone; call unmerge_adapter()"
        )


@contextlib.contextmanager
def bypass(model: nn.Module) -> Iterator[None]:
    """Let every wrapped layer compute what it wraps, as PEFT's `disable_adapter` does.

    Each wrapper's `forward` becomes its layer for the time of the `with`: a call goes straight through, and finds
    whatever `forward` and hooks the layer itself has by then. Costs one walk over the modules, so enter it around a
    whole generation. May be nested.

    Raises:
        PersonafastError: an adapter is merged into the weights.
    """
    layers = list(wrapped_layers(model))
    for path, wrapper, _ in layers:
        check_unmerged(path, wrapper)
    before = [wrapper.__dict__.get("forward", _NONE) for _, wrapper, _ in layers]
    try:
        for _, wrapper, inside in layers:
            # Not setattr, which would register the layer a second time, under the name `forward`.
            wrapper.__dict__["forward"] = inside
        yield
    finally:
        for (_, wrapper, _), forward in zip(layers, before, strict=True):
            if forward is _NONE:
                wrapper.__dict__.pop("forward", None)
            else:
                wrapper.__dict__["forward"] = forward
