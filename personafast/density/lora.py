"""LoRA policies, in PEFT's file format, read without PEFT."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from personafast._io import read_json, read_safetensors, write_json, write_safetensors
from personafast.errors import FormatError, PersonafastError
from personafast.models.anatomy import Anatomy, linear_features, plain_path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"^(?P<path>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight$")
# Options of PEFT that change what an adapter computes, and the value each must have for scale * B A x to be all of it.
_PLAIN = {
    "use_dora": False,
    "lora_bias": False,
    "bias": "none",
    "modules_to_save": None,
    "use_qalora": False,
    "alora_invocation_tokens": None,
}
# Initialisations that also change the base weights, so that B A alone is not the difference to the reference.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


@dataclass(frozen=True)
class LoraFactors:
    """One linear's update: out += scale * B A x."""

    a: torch.Tensor  # [R, in]
    b: torch.Tensor  # [out, R]
    scale: float


@dataclass(frozen=True)
class LoraPolicy:
    """A policy pi_i, as a low-rank change of the reference.

    Attributes:
        factors: module path -> factors; ranks may differ between modules.
        config: the adapter's PEFT configuration.
        vocab_size: vocabulary of the model it was trained on, where known.
        tokenizer_size: tokens of the tokenizer saved beside it, where there is one; models often have room for more.
    """

    factors: Mapping[str, LoraFactors]
    config: Mapping[str, Any] = field(default_factory=dict)
    vocab_size: int | None = None
    tokenizer_size: int | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> LoraPolicy:
        """Read a PEFT adapter folder (`adapter_config.json`, `adapter_model.safetensors`).

        Raises:
            FormatError: a file is missing, truncated or a pickle, or the adapter is not plain LoRA; the message names
                the file and what to do.
        """
        folder = Path(folder)
        if not (folder / CONFIG).is_file():
            _explain_missing_config(folder)
        config = read_json(folder / CONFIG)
        if not isinstance(config, dict):
            raise FormatError(f"{folder / CONFIG}: not an adapter's configuration; copy the file again")
        if str(config.get("peft_type", "LORA")).upper() != "LORA":
            raise FormatError(f"{folder / CONFIG}: peft_type {config['peft_type']!r} is not supported; train with LORA")
        for option, plain in _PLAIN.items():
            if config.get(option, plain) not in (plain, None, [] if plain is None else plain):
                raise FormatError(
                    f"{folder / CONFIG}: {option}={config[option]!r} is more than plain LoRA; merge it with PEFT or "
                    f"train with {option}={plain!r}"
                )
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
            raise FormatError(
                f"{folder / CONFIG}: init_lora_weights={start!r} changed the base weights too; convert the adapter to "
                "plain LoRA with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)"
            )
        if not (folder / WEIGHTS).is_file() and (folder / "adapter_model.bin").is_file():
            raise FormatError(
                f"{folder / 'adapter_model.bin'}: a pickle, which can run code; save the adapter with safetensors"
            )
        tensors, metadata = read_safetensors(folder / WEIGHTS)
        vocab = metadata.get("vocab_size")
        factors = _pair(folder, tensors, config)
        return cls(factors, config, int(vocab) if vocab else None, _tokenizer_size(folder))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the adapter so that PEFT, and `from_pretrained`, read it back unchanged."""
        folder = Path(folder)
        tensors = {}
        for path, factors in self.factors.items():
            tensors[f"base_model.model.{path}.lora_A.weight"] = factors.a
            tensors[f"base_model.model.{path}.lora_B.weight"] = factors.b
        # One entry at most: safetensors writes several in any order, and equal libraries should be equal bytes.
        metadata = {"vocab_size": str(self.vocab_size)} if self.vocab_size else {"format": "pt"}
        write_safetensors(folder / WEIGHTS, tensors, metadata)
        write_json(folder / CONFIG, dict(self.config))

    def check_vocabulary(self, name: str, vocab_size: int) -> None:
        """Raise `PersonafastError` when the policy cannot have been trained from a reference of this vocabulary."""
        size = self.vocab_size or self.tokenizer_size
        if size is not None and (size > vocab_size or (self.vocab_size and size != vocab_size)):
            raise PersonafastError(
                f"policies[{name!r}]: trained with a vocabulary of {size} tokens, the reference has {vocab_size}; "
                "use a policy trained from this reference"
            )

    def check(self, name: str, parts: Anatomy) -> None:
        """Raise `PersonafastError` unless every factor fits a linear of the model and the vocabularies agree."""
        self.check_vocabulary(name, parts.shape.vocab_size)
        for path, factors in self.factors.items():
            if path not in parts.linears:
                raise PersonafastError(
                    f"policies[{name!r}]: adapts {path!r}, which the model lacks; use a policy trained from this model"
                )
            expected = linear_features(parts.linears[path])
            if (factors.b.shape[0], factors.a.shape[1]) != expected:
                raise PersonafastError(
                    f"policies[{name!r}]: {path} is [{factors.b.shape[0]}, {factors.a.shape[1]}] there and "
                    f"{list(expected)} in the model; use a policy trained from this model"
                )


def _explain_missing_config(folder: Path) -> None:
    if (folder / "config.json").is_file():
        raise FormatError(
            f"{folder}: a whole checkpoint, not a LoRA adapter ({CONFIG} is missing); extract or train an adapter on "
            "the reference"
        )
    raise FormatError(f"{folder / CONFIG}: no such file; give the folder of a PEFT LoRA adapter")


def _tokenizer_size(folder: Path) -> int | None:
    """Size of the vocabulary that was saved beside the adapter (TRL does), if any."""
    if not (folder / "tokenizer.json").is_file():
        return None
    tokenizer = read_json(folder / "tokenizer.json")
    model = tokenizer.get("model", {}).get("vocab") or {}
    ids = list(model.values()) if isinstance(model, dict) else list(range(len(model)))
    ids += [token["id"] for token in tokenizer.get("added_tokens", ())]
    return max(ids) + 1 if ids else None


def _pair(folder: Path, tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any]) -> dict[str, LoraFactors]:
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise FormatError(
                f"{folder / WEIGHTS}: tensor {key!r} is not a LoRA factor of a linear; train LoRA on linears only"
            )
        if not torch.isfinite(tensor).all():
            raise FormatError(f"{folder / WEIGHTS}: NaN or infinity in {key!r}; train or copy the adapter again")
        sides.setdefault(plain_path(match["path"]), {})[match["side"]] = tensor
    factors = {}
    for path, pair in sides.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise FormatError(f"{folder / WEIGHTS}: the factors of {path!r} do not fit together; copy the file again")
        factors[path] = LoraFactors(pair["A"], pair["B"], _scale(path, pair["A"].shape[0], config))
    if not factors:
        raise FormatError(f"{folder / WEIGHTS}: holds no LoRA factors; copy the file again")
    return factors


def _scale(path: str, rank: int, config: Mapping[str, Any]) -> float:
    """PEFT's scaling: alpha / r, or alpha / sqrt(r) with rsLoRA; alpha may be set per module by pattern."""
    alpha = float(config.get("lora_alpha", rank))
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path) or fnmatch.fnmatch(path, pattern):
            alpha = float(value)
            break
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)
