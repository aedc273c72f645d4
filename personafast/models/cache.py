"""A KV cache whose rows can be rolled back by different counts, over transformers' `DynamicCache`.

Nothing is moved on a rollback: the columns are marked dead in the row's attention mask, and positions are counted from
the live ones. Columns that are dead in every row at the end are cut off, and when many are dead the live ones are
gathered to the right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from personafast.errors import UnsupportedModelError

# Gather when more than this share of the columns is dead beyond what padding needs.
_WASTE = 0.5


class RaggedContext:
    """The context of R rows in one model: tokens fed so far, and the cache that holds them.

    Args:
        model: a transformers causal LM.
        prompts: token ids a row, of any lengths >= 1; they are fed with the first `feed`.
    """

    def __init__(self, model: nn.Module, prompts: list[list[int]], device: torch.device) -> None:
        from transformers import DynamicCache

        self.model = model
        self.device = device
        length = max(len(ids) for ids in prompts)
        self._prompt = torch.zeros(len(prompts), length, dtype=torch.long)
        self._live = torch.zeros(len(prompts), length, dtype=torch.bool)
        for row, ids in enumerate(prompts):
            self._prompt[row, length - len(ids) :] = torch.tensor(ids)
            self._live[row, length - len(ids) :] = True
        self._prompt, self._live = self._prompt.to(device), self._live.to(device)
        self._started = False
        self._ragged = not bool(self._live.all())
        # Without the configuration every layer keeps all columns, which dead columns in a sliding window need.
        self._cache = DynamicCache()
        self._parameters = inspect.signature(model.forward).parameters
        self._window = _sliding_window(model)

    @property
    def rows(self) -> int:
        """R."""
        return self._live.shape[0]

    def feed(self, tokens: torch.Tensor, keep: int) -> torch.Tensor:
        """Append tokens [R, k] to every row (after the prompt, the first time) and return the last `keep` logits.

        Returns:
            float32 [R, keep, V].
        """
        if not self._started:
            tokens = torch.cat([self._prompt, tokens], dim=1)
            live = torch.cat([self._live, self._live.new_ones(self.rows, tokens.shape[1] - self._live.shape[1])], dim=1)
            positions = (live.long().cumsum(dim=1) - 1).clamp(min=0)
            self._started = True
        else:
            live = torch.cat([self._live, self._live.new_ones(tokens.shape)], dim=1)
            start = self._live.sum(dim=1, keepdim=True)
            positions = start + torch.arange(tokens.shape[1], device=self.device)
        inputs: dict[str, Any] = {
            "input_ids": tokens,
            "past_key_values": self._cache,
            "use_cache": True,
            # Full rows take the path without a mask, as stock generate does.
            "attention_mask": live.long() if self._ragged else None,
        }
        if "position_ids" in self._parameters:
            inputs["position_ids"] = positions
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = keep
        logits = self.model(**inputs).logits[:, -keep:].float()
        self._live = live
        return logits

    def rollback(self, counts: torch.Tensor) -> None:
        """Forget the last counts[r] tokens of row r."""
        most, least = int(counts.max()), int(counts.min())
        if most == 0:
            return
        if least:
            self._each(lambda whole: whole[:, :, :-least])
            self._live = self._live[:, :-least]
        if most > least:
            if self._window is not None and self._live.shape[1] > self._window:
                raise UnsupportedModelError(
                    f"model: a sliding window of {self._window} and a context of {self._live.shape[1]} cannot be "
                    "rolled back by different counts a row; use sampler='direct' or one row a call"
                )
            # The columns to forget are the last live ones: rows may hold dead columns from earlier rollbacks.
            from_end = self._live.flip(1).long().cumsum(dim=1).flip(1)
            self._live = self._live & (from_end > (counts - least).to(self.device)[:, None])
            self._ragged = True
            self._gather()

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only."""
        rows = rows.to(self.device)
        self._live = self._live[rows]
        if self._started:
            self._each(lambda whole: whole[rows])
            self._gather()
        else:
            self._prompt = self._prompt[rows]

    def _gather(self) -> None:
        """Cut dead columns off the left and, when too many lie between live ones, move the live ones together."""
        columns = self._live.shape[1]
        needed = int(self._live.sum(dim=1).max())
        if columns - needed <= max(8, _WASTE * needed):
            return
        # A stable sort of the flags puts dead columns first and keeps the order of the live ones.
        order = self._live.long().argsort(dim=1, stable=True)[:, columns - needed :]
        self._live = self._live.gather(1, order)
        self._each(
            lambda whole: whole.gather(2, order[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3]))
        )
        self._ragged = not bool(self._live.all())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the keys and values [R, heads, columns, size] of every layer."""
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                setattr(layer, name, change(getattr(layer, name)))


def _sliding_window(model: nn.Module) -> int | None:
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    if window is None or getattr(text, "use_sliding_window", True) is False:
        return None
    return int(window) if kinds is None or "sliding_attention" in kinds else None
