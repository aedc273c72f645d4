"""A mask applied for good: a plain Hugging Face checkpoint that knows nothing of personafast."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from personafast._io import atomic_directory, write_json
from personafast.errors import PersonafastError
from personafast.masks.applied import covered, masked_parameters
from personafast.masks.mask import PersonaMask

# Says what the folder is; transformers does not look at it.
RECORD = "personafast.json"


def export_masked(
    model: Any,
    mask: PersonaMask,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    replace: bool = False,
    max_shard_size: int | str = "5GB",
    in_place: bool = False,
) -> Path:
    """Write a checkpoint whose masked weights are W * (M + gamma (1 - M)), in the model's dtype.

    `AutoModelForCausalLM.from_pretrained(folder)` loads it anywhere. Its logits are those of `attach` with that mask up
    to rounding: the products are the same, and kernels add them up in another order.

    Args:
        model: a transformers causal LM with plain weights.
        mask: the mask; experts and Conv1D are included.
        folder: where it goes; written beside it and renamed, so that it appears whole or not at all.
        tokenizer: saved with it.
        replace: replace a folder that holds something.
        max_shard_size: largest file of weights, as transformers spells it.
        in_place: change the model's own weights instead of holding the masked ones twice; for a model that is thrown
            away afterwards.

    Returns:
        The folder.

    Raises:
        PersonafastError: the folder holds something or is the model's own, or the mask does not fit the model.
        UnsupportedModelError: the model is quantised, wrapped by PEFT or not in memory, or a weight is also another
            module's.
    """
    targets = covered(model, mask)
    with new_folder(Path(folder), model, replace) as target:
        changed: dict[tuple[int, str], torch.Tensor] = {}
        for module, name, weight in masked_parameters(targets, mask):
            if in_place:
                module._parameters[name].data = weight  # type: ignore[union-attr]
            else:
                changed[id(module), name] = weight
        model.save_pretrained(target, state_dict=_state(model, changed), max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
        write_json(target / RECORD, {"kind": "masked", "mask": describe(mask)})
    return Path(folder)


@contextlib.contextmanager
def new_folder(folder: Path, model: Any, replace: bool) -> Iterator[Path]:
    """An empty folder that takes the place of `folder` at the end, unless that holds something that is to stay."""
    source = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if source and folder.exists() and folder.resolve() == Path(source).resolve():
        raise PersonafastError(f"{folder}: the model's own folder; give another one")
    if folder.exists() and not folder.is_dir():
        raise PersonafastError(f"{folder}: a file; give a folder")
    if folder.is_dir() and any(folder.iterdir()) and not replace:
        raise PersonafastError(f"{folder}: not empty; give a new folder, or replace it (--replace)")
    with atomic_directory(folder) as target:
        yield target


def describe(mask: PersonaMask) -> dict[str, Any]:
    """How a mask was made and what it keeps, as plain JSON values."""
    return {**mask.metadata, "gamma": mask.gamma, "kept": mask.kept, "linears": len(mask.words)}


def _state(model: nn.Module, changed: dict[tuple[int, str], torch.Tensor]) -> dict[str, torch.Tensor]:
    state = model.state_dict()
    for path, module in model.named_modules():
        for name in module._parameters:
            if (id(module), name) in changed:
                state[f"{path}.{name}"] = changed[id(module), name]
    return state
