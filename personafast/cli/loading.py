"""Models and libraries named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from personafast.errors import FormatError, PersonafastError
from personafast.library import PersonaLibrary

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(name: str, dtype: str, device: str, *, dense: bool = False) -> tuple[Any, Any, PersonaLibrary]:
    """Model, tokenizer and its own library (empty but for the zoo) of "zoo", a checkpoint folder or a hub name.

    The folder may be a compressed checkpoint, unless `dense` weights are needed.

    Weights are read from safetensors only, and no code of a checkpoint is run. Of its generation settings only the
    special tokens are kept, so that the command's options alone say how to sample.

    Raises:
        FormatError: the checkpoint is missing, truncated, or not safetensors.
        PersonafastError: an unknown dtype or a device that is not there.
    """
    import torch
    from transformers import GenerationConfig

    if dtype not in DTYPES:
        raise PersonafastError(f"--dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    try:
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise PersonafastError(f"--device {device!r}: cannot be used here ({_first_line(error)}); try cpu") from None
    model: Any
    if name == "zoo":
        from personafast import zoo

        model, tokenizer, library = zoo.load()
        if dtype != "auto":
            model = model.to(getattr(torch, dtype))
    else:
        model, tokenizer = _load_checkpoint(name, dtype, place, dense)
        library = PersonaLibrary()
    # transformers lays a checkpoint's penalties, cut-offs and banned tokens over the options of a call.
    ids = {key: getattr(model.generation_config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    # A compressed one has weights without memory, which cannot be moved; it is where it belongs already.
    if any(parameter.is_meta for parameter in model.parameters()):
        return model, tokenizer, library
    return model.to(place).eval(), tokenizer, library


def _load_checkpoint(name: str, dtype: str, place: torch.device, dense: bool) -> tuple[Any, Any]:
    folder = Path(name).expanduser()
    if not folder.is_dir() and (folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1):
        raise FormatError(f"--model {name}: no such folder; give a checkpoint folder, a hub name or zoo")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FormatError(
            f"--model {folder / 'config.json'}: no such file; give the folder of a transformers checkpoint"
        )
    source = str(folder) if folder.is_dir() else name

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from personafast.masks.checkpoint import is_compressed, load_compressed

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    compressed = is_compressed(folder)
    if compressed and dense:
        raise FormatError(
            f"--model {name}: a compressed checkpoint, which lacks what its mask drops; give the one it was made from"
        )
    # Whatever transformers raises on a foreign folder, the caller can only mend the folder; --debug shows the cause.
    try:
        if compressed:
            model = load_compressed(folder, dtype=None if dtype == "auto" else getattr(torch, dtype), device=place)
        else:
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True)
    except FormatError:
        raise
    except Exception as error:
        broken = _broken_weights(folder)
        if broken is not None:
            raise FormatError(f"{broken}; copy or save the checkpoint again") from error
        raise FormatError(f"--model {name}: cannot be loaded ({_first_line(error)})") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise FormatError(f"--model {name}: its tokenizer cannot be loaded ({_first_line(error)})") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _broken_weights(folder: Path) -> str | None:
    """What is wrong with the weights of a checkpoint folder, as "file: complaint", or None."""
    from safetensors import SafetensorError, safe_open

    weights = sorted(folder.glob("*.safetensors"))
    if folder.is_dir() and not weights:
        pickles = sorted([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")])
        if pickles:
            return f"{pickles[0]}: a pickle, which can run code, where safetensors is expected"
        return f"{folder}: holds no *.safetensors"
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{path}: truncated or not safetensors ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
