"""A compressed checkpoint: of the masked linears only what the mask keeps, as `ops.compress` lays it out.

The folder is a transformers checkpoint but for its weights. `compressed-*.safetensors` hold `linear.weight::values`,
`::bitmap` and `::row_offsets` for every masked linear, and everything else of the model under its own name; tied
weights are held once. transformers finds no weights there and refuses the folder, rather than making some up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from personafast import ops
from personafast._io import read_json, read_safetensors, write_json, write_safetensors
from personafast.errors import FormatError, PersonafastError, UnsupportedModelError
from personafast.masks.applied import covered
from personafast.masks.export import RECORD, describe, new_folder
from personafast.masks.mask import PersonaMask
from personafast.models.compressed import CompressedWeight

FORMAT_VERSION = 1
_KIND = "compressed"
_PARTS = ("values", "bitmap", "row_offsets")
_SHARD = 5 * 10**9


def export_compressed(
    model: Any,
    mask: PersonaMask,
    folder: str | Path,
    *,
    tokenizer: Any = None,
    replace: bool = False,
    max_shard_bytes: int = _SHARD,
) -> Path:
    """Write a checkpoint that holds only the weights a mask keeps: 9 bits a weight at 16 bit and 50 %.

    Args:
        model: a transformers causal LM with plain weights; it is not changed.
        mask: the mask, with gamma 0.
        folder: where it goes; written beside it and renamed, so that it appears whole or not at all.
        tokenizer: saved with it.
        replace: replace a folder that holds something.
        max_shard_bytes: a file is closed when its tensors reach this.

    Returns:
        The folder, for `load_compressed`.

    Raises:
        PersonafastError: gamma is not 0, the folder holds something or is the model's own, or the mask does not fit.
        UnsupportedModelError: the model is quantised, wrapped by PEFT or not in memory, or a masked weight is not that
            of an nn.Linear, or also another module's.
    """
    if mask.gamma:
        raise PersonafastError(
            f"gamma: {mask.gamma} keeps a share of every weight, so that nothing is saved; export it dense, or use "
            "mask.with_metadata(gamma=0)"
        )
    targets = covered(model, mask)
    for path, target in targets.items():
        if target.expert is not None or target.transposed:
            raise UnsupportedModelError(
                f"model: {path} is part of a {type(target.module).__name__}, and only nn.Linear can be compressed; "
                "export it dense"
            )
    with new_folder(Path(folder), model, replace) as where:
        shard: dict[str, torch.Tensor] = {}
        files: list[str] = []
        for name, tensor in _tensors(model, mask):
            shard[name] = tensor
            if sum(part.numel() * part.element_size() for part in shard.values()) >= max_shard_bytes:
                files.append(_write_shard(where, len(files), shard))
        if shard:
            files.append(_write_shard(where, len(files), shard))
        record = {
            "kind": _KIND,
            "format_version": FORMAT_VERSION,
            "files": files,
            "linears": {path: list(target.features) for path, target in targets.items()},
            "mask": describe(mask),
        }
        model.config.save_pretrained(where)
        if getattr(model, "generation_config", None) is not None:
            model.generation_config.save_pretrained(where)
        if tokenizer is not None:
            tokenizer.save_pretrained(where)
        write_json(where / RECORD, record)
    return Path(folder)


def is_compressed(folder: str | Path) -> bool:
    """Whether a folder is a compressed checkpoint."""
    file = Path(folder) / RECORD
    if not file.is_file():
        return False
    record = read_json(file)
    return isinstance(record, dict) and record.get("kind") == _KIND


def load_compressed(folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> Any:
    """The model of a compressed checkpoint; the dense weights of its masked linears are at no time in memory.

    Their parameters are there by name and shape, on the meta device, and their products run `ops.sparse_linear`. The
    model generates as it is, and `attach` gives it vectors and policies; it has no other mask than its own.

    Args:
        folder: what `export_compressed` wrote.
        dtype: of the weights; that of the checkpoint if not given.
        device: where they go.

    Returns:
        The transformers causal LM, in eval mode.

    Raises:
        FormatError: a file is missing, truncated, or does not hold what the model needs.
    """
    folder = Path(folder)
    record = _record(folder)
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise FormatError(f"{folder / 'config.json'}: cannot be read ({str(error).splitlines()[0]})") from None
    with _EmptyOnMeta():
        options = {} if dtype is None else {"dtype": dtype}
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    weights = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tensors: dict[str, torch.Tensor] = {}
    for file in record["files"]:
        found, _ = read_safetensors(folder / file)
        for name, tensor in found.items():
            cast = dtype if name in weights or name.endswith("::values") else None
            tensors[name] = tensor.to(device=device, dtype=cast)
    for path, features in record["linears"].items():
        _install(folder, model, path, tuple(features), tensors)
    _fill(folder, model, tensors, torch.device(device))
    _load_generation_config(folder, model)
    return model.eval()


class _EmptyOnMeta(TorchFunctionMode):
    """Makes `torch.empty` give tensors without memory: what layers allocate for weights before they are initialised.

    Buffers are computed, and stay real; of the parameters only norms and biases are, which are overwritten.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _tensors(model: nn.Module, mask: PersonaMask) -> Iterator[tuple[str, torch.Tensor]]:
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in model.state_dict().items():
        path = name.removesuffix(".weight")
        if path in mask.words:
            words = mask.words[path].to(tensor.device)
            for part, value in zip(_PARTS, ops.compress(tensor, words), strict=True):
                yield f"{name}::{part}", value
            continue
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in seen:
            continue  # tied to one that is there
        seen.add(place)
        yield name, tensor


def _write_shard(folder: Path, index: int, shard: dict[str, torch.Tensor]) -> str:
    name = f"compressed-{index + 1:05}.safetensors"
    write_safetensors(folder / name, shard, {"format": "pt"})
    shard.clear()
    return name


def _record(folder: Path) -> dict[str, Any]:
    file = folder / RECORD
    record = read_json(file)
    if not isinstance(record, dict) or record.get("kind") != _KIND:
        raise FormatError(f"{file}: not a compressed checkpoint's; load the folder with transformers")
    if record.get("format_version") != FORMAT_VERSION:
        raise FormatError(f"{file}: expected format_version {FORMAT_VERSION}; export it again with this version")
    files, linears = record.get("files"), record.get("linears")
    if (
        not isinstance(files, list)
        or not isinstance(linears, dict)
        or not all(isinstance(name, str) and Path(name).name == name for name in files)
        or not all(isinstance(shape, list) and len(shape) == 2 for shape in linears.values())
    ):
        raise FormatError(f"{file}: lacks its files or linears; export it again")
    return record


def _install(
    folder: Path, model: nn.Module, path: str, features: tuple[int, ...], tensors: dict[str, torch.Tensor]
) -> None:
    try:
        linear = model.get_submodule(path)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear) or tuple(linear.weight.shape) != features:
        raise FormatError(f"{folder / RECORD}: {path} {list(features)} is not a linear of config.json's model")
    parts = [tensors.pop(f"{path}.weight::{part}", None) for part in _PARTS]
    values, bitmap, offsets = parts
    if values is None or bitmap is None or offsets is None:
        raise FormatError(f"{folder}: lacks the compressed weight of {path}; copy or export it again")
    outputs = features[0]
    if (
        bitmap.shape != (outputs, -(-features[1] // 32))
        or offsets.shape != (outputs + 1,)
        or (bitmap.dtype, offsets.dtype) != (torch.int32, torch.int64)
        or values.dim() != 1
        or int(offsets[0]) != 0
        or int(offsets[-1]) != len(values)
        or bool((offsets.diff() < 0).any())
    ):
        raise FormatError(f"{folder}: the compressed weight of {path} does not fit {list(features)}; export it again")
    linear.weight = nn.Parameter(torch.empty(features, dtype=values.dtype, device="meta"), requires_grad=False)
    CompressedWeight(values, bitmap, offsets, True).install(linear, forward=True)


def _fill(folder: Path, model: Any, tensors: Mapping[str, torch.Tensor], device: torch.device) -> None:
    keys = model.load_state_dict(tensors, strict=False, assign=True)
    if keys.unexpected_keys:
        raise FormatError(
            f"{folder}: holds {keys.unexpected_keys[0]!r}, which config.json's model lacks; export it again"
        )
    model.tie_weights()
    weights = dict(model.named_parameters(remove_duplicate=False))
    read = {id(weights[name]) for name in tensors if name in weights}
    for name in keys.missing_keys:
        path, _, key = name.rpartition(".")
        compressed = key == "weight" and "_personafast_compressed" in model.get_submodule(path).__dict__
        tied = id(weights.get(name)) in read
        if not compressed and not tied:
            raise FormatError(f"{folder}: lacks the weight {name}; copy or export it again")
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)


def _load_generation_config(folder: Path, model: Any) -> None:
    from transformers import GenerationConfig

    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
