"""LoRA policies out of adapters that a live PEFT model holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import nn

from personafast.density.lora import _CHANGES_BASE, _PLAIN, LoraFactors, LoraPolicy, _scale
from personafast.errors import PersonafastError
from personafast.models.anatomy import Anatomy, plain_path
from personafast.models.wrappers import check_unmerged, wrapped_layers

# Beyond what a saved adapter can have: these act on other modules than linears, or move the base weights.
_PLAIN_LIVE = {**_PLAIN, "target_parameters": None, "trainable_token_indices": None}
_CHANGES_BASE_LIVE = (*_CHANGES_BASE, "lora_ga")


def live_policies(model: Any, inner: nn.Module, parts: Anatomy, names: Sequence[str] | None) -> dict[str, LoraPolicy]:
    """Copy adapters of a PEFT model into policies that stand on the model without any adapter.

    Args:
        model: a PeftModel, or a transformers model that has loaded adapters by itself; `peft_config` lists them.
        inner: the transformers model that holds the wrapped layers.
        parts: its parts.
        names: which adapters; all of them by default.

    Raises:
        PersonafastError: an unknown name, an adapter that is merged into the base or has moved its weights, that is
            more than plain LoRA, or that acts outside the linears of the blocks.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not configs:
        raise PersonafastError(
            f"model: {type(model).__name__} holds no adapters; load them with PEFT, or use PolicySet.from_models"
        )
    wanted = list(configs) if names is None else list(names)
    for name in wanted:
        if name not in configs:
            raise PersonafastError(f"names: no adapter {name!r} in the model; there are: {', '.join(sorted(configs))}")
    for name, config in configs.items():
        _check_reference(name, config)
    for name in wanted:
        _check_plain(name, configs[name])
    factors: dict[str, dict[str, LoraFactors]] = {name: {} for name in wanted}
    for path, wrapper, _ in wrapped_layers(inner):
        check_unmerged(path, wrapper)
        for name in wanted:
            if _acts(wrapper, name):
                factors[name][plain_path(path)] = _take(name, path, wrapper, parts)
    return {name: _policy(name, found, configs[name], parts.shape.vocab_size) for name, found in factors.items()}


def _check_reference(name: str, config: Any) -> None:
    """What any adapter of the model may not have done, whether it is asked for or not."""
    kind = _plain_value(getattr(config, "peft_type", "LORA"))
    if str(kind).upper() != "LORA":
        raise PersonafastError(f"adapters[{name!r}]: peft_type {kind!r} is not supported; train with LORA")
    start = getattr(config, "init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE_LIVE):
        raise PersonafastError(
            f"adapters[{name!r}]: init_lora_weights={start!r} changed the base weights too, so the reference is gone; "
            "convert the adapter to plain LoRA with PEFT's "
            "save_pretrained(path_initial_model_for_weight_conversion=...) and load it on the base model"
        )


def _check_plain(name: str, config: Any) -> None:
    for option, plain in _PLAIN_LIVE.items():
        value = getattr(config, option, plain)
        if value not in (plain, None, [] if plain is None else plain):
            raise PersonafastError(
                f"adapters[{name!r}]: {option}={value!r} is more than plain LoRA; train with {option}={plain!r}"
            )


def _acts(wrapper: nn.Module, name: str) -> bool:
    return any(name in getattr(wrapper, held, ()) for held in ("lora_A", "lora_embedding_A"))


def _take(name: str, path: str, wrapper: Any, parts: Anatomy) -> LoraFactors:
    if plain_path(path) not in parts.linears:
        raise PersonafastError(
            f"adapters[{name!r}]: adapts {path!r}, which is no linear of the decoder's blocks; train LoRA on those only"
        )
    # A layer knows better than the configuration: what it does to x is decided when the adapter is added.
    variant = getattr(wrapper, "lora_variant", {}).get(name)
    if variant is not None or getattr(wrapper, "use_dora", {}).get(name):
        kind = "DoRA" if variant is None else type(variant).__name__
        raise PersonafastError(f"adapters[{name!r}]: {path} computes {kind}, more than plain LoRA; train plain LoRA")
    a, b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
    if getattr(wrapper.lora_B[name], "bias", None) is not None:
        raise PersonafastError(
            f"adapters[{name!r}]: {path} has a bias in lora_B, more than plain LoRA; train with lora_bias=False"
        )
    for tensor in (a, b):
        if tensor.is_meta:
            raise PersonafastError(f"adapters[{name!r}]: {path} is not in memory (meta); load the adapter's weights")
        if tensor.dim() != 2 or not torch.isfinite(tensor).all():
            wrong = f"has factors of shape {list(tensor.shape)}" if tensor.dim() != 2 else "holds NaN or infinity"
            raise PersonafastError(f"adapters[{name!r}]: {path} {wrong}; train or load the adapter again")
    # Where a library's policies are: on the CPU, to be put into the model's banks from there.
    return LoraFactors(_copy(a), _copy(b), float(wrapper.scaling[name]))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def _policy(name: str, factors: dict[str, LoraFactors], config: Any, vocab_size: int) -> LoraPolicy:
    if not factors:
        raise PersonafastError(f"adapters[{name!r}]: adapts no layer of this model; load an adapter made for it")
    values: dict[str, Any] = _plain_value(config.to_dict())
    # A scale that was set after training (`set_scale`) is in no configuration; written down, it survives a save.
    changed = {
        re.escape(path): f.scale * (f.a.shape[0] ** 0.5 if values.get("use_rslora") else f.a.shape[0])
        for path, f in factors.items()
        if _scale(path, f.a.shape[0], values) != f.scale
    }
    if changed:
        values["alpha_pattern"] = {**changed, **(values.get("alpha_pattern") or {})}
    return LoraPolicy(factors, values, vocab_size)


def _plain_value(value: Any) -> Any:
    """What JSON can hold of a configuration's value."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {key: _plain_value(part) for key, part in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, (list, tuple)):
        return [_plain_value(part) for part in value]
    return value
