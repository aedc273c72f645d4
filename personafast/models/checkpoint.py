"""Whole checkpoints from local folders; nothing here asks the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from personafast.errors import FormatError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_model(what: str, folder: Path, like: nn.Module) -> Any:
    """The causal LM in a folder, in eval mode, at the dtype and device of `like`.

    Raises:
        FormatError: the folder is missing, holds an adapter, lacks weights, or transformers cannot read it.
    """
    if not folder.is_dir():
        raise FormatError(f"{what}: {folder}: no such folder; give the local folder of a checkpoint")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise FormatError(
                f"{what}: {folder} is a LoRA adapter, not a whole checkpoint; add it to a PersonaLibrary, or load it "
                "with PEFT and use PolicySet.from_adapters"
            )
        raise FormatError(f"{what}: {folder / 'config.json'}: no such file; give the folder of a checkpoint")
    from transformers import AutoModelForCausalLM

    first = next(like.parameters())
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(like, "dtype", first.dtype),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except Exception as error:  # unreadable files raise whatever the reader of their format does
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(f"{what}: {folder} cannot be loaded ({reason}); save the checkpoint again") from None
    model, info = loaded
    missing = sorted(info.get("missing_keys") or ())
    if missing:
        # transformers would fill it with noise and go on.
        raise FormatError(f"{what}: {folder} lacks the weight {missing[0]!r}; save the checkpoint again")
    return model.to(first.device).eval()


def local_tokenizer(source: nn.Module | str | Path) -> Any | None:
    """The tokenizer in a folder, or in the folder a model was loaded from, if there is one that can be read."""
    folder = source
    if isinstance(source, nn.Module):
        folder = getattr(getattr(source, "config", None), "_name_or_path", "")
    if not folder or not Path(str(folder)).is_dir():
        return None
    if not any((Path(str(folder)) / file).is_file() for file in _TOKENIZER_FILES):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError):
        return None
