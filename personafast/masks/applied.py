"""A mask and the weights of a model that it covers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn

from personafast.errors import PersonafastError, UnsupportedModelError
from personafast.masks.mask import PersonaMask
from personafast.masks.targets import Target, find_targets, refuse_unknown


def covered(model: nn.Module, mask: PersonaMask) -> dict[str, Target]:
    """The weights that a mask covers, by its paths.

    Raises:
        PersonafastError: the mask is empty, covers the head, an embedding or what the model lacks, or is of another
            shape than a weight.
        UnsupportedModelError: the model is quantised, wrapped by PEFT or not in memory, or a weight is also another
            module's.
    """
    _check_plain(model)
    targets = find_targets(model)
    if not mask.words:
        raise PersonafastError("mask: covers no linear; build it on this model")
    owners = Counter(id(parameter) for part in model.modules() for parameter in part._parameters.values())
    found: dict[str, Target] = {}
    for path, words in mask.words.items():
        if path not in targets:
            refused = refuse_unknown(model, path, "mask")
            if "never masked" in str(refused):
                raise refused
            raise PersonafastError(f"mask: covers {path!r}, which the model lacks; build it on this model")
        target = targets[path]
        shape = (words.shape[0], mask.in_features[path])
        if shape != target.features:
            raise PersonafastError(
                f"mask: {path} is {list(shape)} there and {list(target.features)} in the model; build it on this model"
            )
        weight = getattr(target.module, target.parameter)
        if type(weight) is not nn.Parameter or not weight.is_floating_point():
            raise UnsupportedModelError(
                f"model: the weight of {path} is a {type(weight).__name__} of {weight.dtype} (quantised or "
                "parametrised); use the model with plain weights"
            )
        if weight.is_meta:
            raise UnsupportedModelError(f"model: the weight of {path} is not in memory (meta); load the model whole")
        if owners[id(weight)] > 1:
            raise UnsupportedModelError(f"model: {path} shares its weight with another module, which needs it whole")
        found[path] = target
    return found


@torch.no_grad()
def masked_parameters(targets: dict[str, Target], mask: PersonaMask) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """(module, name of its parameter, W * (M + gamma (1 - M)) in the parameter's dtype and layout), one at a time.

    Experts that share one parameter come as one.
    """
    parameters: dict[tuple[int, str], list[tuple[str, Target]]] = {}
    for path, target in targets.items():
        parameters.setdefault((id(target.module), target.parameter), []).append((path, target))
    for parts in parameters.values():
        module, name = parts[0][1].module, parts[0][1].parameter
        whole = getattr(module, name).detach().clone()
        for path, target in parts:
            matrix = whole if target.expert is None else whole[target.expert]
            if target.transposed:
                matrix = matrix.t()
            kept = mask.dense(path).to(whole.device)
            matrix.copy_(torch.where(kept, matrix, matrix * mask.gamma))
        yield module, name, whole


def _check_plain(model: nn.Module) -> None:
    if hasattr(model, "peft_config"):
        raise UnsupportedModelError(
            "model: wrapped by PEFT; merge its adapter (merge_and_unload) or give the model inside"
        )
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None or getattr(model, "is_quantized", False):
        raise UnsupportedModelError(
            "model: quantised, and a mask is over plain weights; load the checkpoint it was quantised from"
        )
