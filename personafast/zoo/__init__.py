"""A small built-in model that speaks with several personas, trained from nothing on this project's own grammar.

>>> from personafast import zoo
>>> model, tokenizer, library = zoo.load()
>>> sorted(library.policies)
['casual', 'cautious', 'curious', 'formal', 'grateful', 'precise', 'vivid', 'warm']
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personafast._io import read_json
from personafast.zoo.grammar import draw_content, draw_prompt
from personafast.zoo.traits import DEMO_TRAITS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from personafast.library import PersonaLibrary

__all__ = ["DEMO_TRAITS", "info", "load", "path", "prompts"]

_HELD_OUT = 1_000_003


def path() -> Path:
    """The folder of the zoo's files: ``model/``, ``library/`` and ``manifest.json``."""
    return Path(__file__).parent / "data"


def load(folder: Path | str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, PersonaLibrary]:
    """The reference model (float32, on the CPU), its tokenizer, and its library of vectors, masks and policies.

    ``folder`` is another zoo that ``personafast zoo build`` wrote.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from personafast.library import PersonaLibrary

    root = path() if folder is None else Path(folder)
    showed_progress = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(root / "model").eval()
    finally:
        if showed_progress:
            logging.enable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    return model, tokenizer, PersonaLibrary.from_pretrained(root / "library")


def prompts(n: int, seed: int = 0) -> list[str]:
    """Draw ``n`` user requests with a generator that no training corpus uses."""
    rng = random.Random(_HELD_OUT + seed)
    return [draw_prompt(draw_content(rng), rng) for _ in range(n)]


def info() -> dict[str, Any]:
    """The manifest: hashes of every file, corpus seed, training settings, versions, measured quality."""
    manifest: dict[str, Any] = read_json(path() / "manifest.json")
    return manifest
