"""Notes what a call of a model's `generate` begins with: later passes do not tell where its prompts end.

An assisted generation scores candidates together with the prompt in its very first pass.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from personafast.models.places import Generation
from personafast.models.steering import SteeredBlocks


class GenerateNote:
    """An instance attribute around a model's `generate`.

    It is a partial of a method, not a closure: a deep copy of the model notes its own calls.
    """

    def __init__(self, model: nn.Module, steering: SteeredBlocks) -> None:
        self._model, self._steering = model, steering
        self._before = model.__dict__.get("generate")
        self._ours: functools.partial[Any] | None = None
        inner = getattr(model, "generate", None)
        if inner is not None:
            self._ours = functools.partial(self._generate, inner)
            model.__dict__["generate"] = functools.update_wrapper(self._ours, inner)

    def remove(self) -> None:
        """Take the attribute away; one that somebody else has put over it since stays."""
        if self._ours is None or self._model.__dict__.get("generate") is not self._ours:
            return
        if self._before is None:
            del self._model.__dict__["generate"]
        else:
            self._model.__dict__["generate"] = self._before

    def _generate(self, inner: Any, *args: Any, **kwargs: Any) -> Any:
        before = self._steering.generation
        self._steering.generation = _began(args, kwargs)
        try:
            return inner(*args, **kwargs)
        finally:
            self._steering.generation = before


def _began(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generation:
    given = kwargs.get("inputs_embeds")
    if not isinstance(given, torch.Tensor):
        given = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
    mask = kwargs.get("attention_mask")
    # Without any input transformers begins with one token, that of the beginning of a text.
    columns = given.shape[1] if isinstance(given, torch.Tensor) and given.dim() > 1 else 1
    return Generation(columns, mask if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None)
