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

        from personafast.models.growing import GrowingLayer

        self.model = model
        self.device = device
        length = max(len(ids) for ids in prompts)
        self._prompt = torch.zeros(len(prompts), length, dtype=torch.long)
        self._live = torch.zeros(len(prompts), length, dtype=torch.bool)
        for row, ids in enumerate(prompts):
            self._prompt[row, length - len(ids) :] = torch.tensor(ids)
            self._live[row, length - len(ids) :] = True
        self._prompt = self._prompt.to(device)
        self._started = False
        self._ragged = not bool(self._live.all())
        # Without the configuration every layer keeps all columns, which dead columns in a sliding window need.
        self._cache = DynamicCache()
        self._cache.layer_class_to_replicate = GrowingLayer
        # PEFT's wrapper takes anything, so the model inside says what it understands.
        base: Any = getattr(model, "get_base_model", lambda: model)()
        self._parameters = inspect.signature(base.forward).parameters
        self._window = _sliding_window(model)
        self._last_position = learned_positions(model)

    @property
    def rows(self) -> int:
        """R."""
        return self._live.shape[0]

    def feed(self, tokens: torch.Tensor, keep: int, live: torch.Tensor | None = None) -> torch.Tensor:
        """Append tokens [R, k] to every row (after the prompt, the first time) and return the last `keep` logits.

        Args:
            tokens: int64 [R, k].
            keep: how many places to give the logits of.
            live: bool [R, k] on the CPU, which of them are tokens of their row: a row's own stand at its right. None
                for all.

        Returns:
            float32 [R, keep, V]; those of a place that is not live mean nothing.

        Raises:
            UnsupportedModelError: rows get different numbers of tokens, and the model derives positions or windows
                from columns.
        """
        tokens = tokens.to(self.device, non_blocking=True)
        fresh = self._live.new_ones(tokens.shape) if live is None else live
        if live is not None and not bool(live.all()):
            self._check_ragged(self._live.shape[1] + tokens.shape[1])
            self._ragged = True
        if not self._started:
            tokens = torch.cat([self._prompt, tokens], dim=1)
            whole = torch.cat([self._live, fresh], dim=1)
            positions = (whole.long().cumsum(dim=1) - 1).clamp(min=0)
            self._started = True
        else:
            whole = torch.cat([self._live, fresh], dim=1)
            start = self._live.sum(dim=1, keepdim=True)
            if live is None:
                positions = start + torch.arange(tokens.shape[1])
            else:
                positions = start + (live.long().cumsum(dim=1) - 1).clamp(min=0)
        if self._last_position is not None:
            # Drafts may run past the end of a row that is full; what is read there is not kept.
            positions = positions.clamp(max=self._last_position - 1)
        inputs: dict[str, Any] = {
            "input_ids": tokens,
            "past_key_values": self._cache,
            "use_cache": True,
            # Full rows take the path without a mask, as stock generate does.
            "attention_mask": whole.long().to(self.device, non_blocking=True) if self._ragged else None,
        }
        if "position_ids" in self._parameters:
            inputs["position_ids"] = positions.to(self.device, non_blocking=True)
        if "logits_to_keep" in self._parameters:
            inputs["logits_to_keep"] = keep
        logits = self.model(**inputs).logits[:, -keep:].float()
        self._live = whole
        return logits

    def rollback(self, counts: torch.Tensor) -> None:
        """Forget the last counts[r] tokens of row r, int64 [R] on the CPU.

        Raises:
            UnsupportedModelError: the counts differ, and the model derives positions from columns.
        """
        most, least = int(counts.max()), int(counts.min())
        if most == 0:
            return
        if least:
            self._each(lambda whole: whole[:, :, :-least])
            self._live = self._live[:, :-least]
        if most > least:
            self._check_ragged(0)
            # The columns to forget are the last live ones: rows may hold dead columns from earlier rollbacks.
            from_end = self._live.flip(1).long().cumsum(dim=1).flip(1)
            self._live = self._live & (from_end > (counts - least)[:, None])
            self._ragged = True
            # A window counts columns, so there none may be dead between live ones.
            self._gather(close=self._window is not None)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only, int64 on the CPU."""
        self._live = self._live[rows]
        there = rows.to(self.device, non_blocking=True)
        if self._started:
            self._each(lambda whole: whole[there])
            self._gather()
        else:
            self._prompt = self._prompt[there]

    def _check_ragged(self, columns: int) -> None:
        """Raise unless dead columns may stand between live ones, `columns` of both in all."""
        if "position_ids" not in self._parameters or _chunked_attention(self.model):
            raise UnsupportedModelError(
                f"model: {type(self.model).__name__} takes positions from the columns of its cache, so rows cannot go "
                "on by different counts; use sampler='direct' or one row a call"
            )
        if self._window is not None and columns > self._window:
            raise UnsupportedModelError(
                f"model: {type(self.model).__name__} attends to a window of {self._window} columns, so a longer text "
                "cannot go on by different counts a row; use sampler='direct' or one row a call"
            )

    def _gather(self, close: bool = False) -> None:
        """Move the live columns to the right and cut off what is dead in every row, when that is much or to `close`."""
        columns = self._live.shape[1]
        needed = int(self._live.sum(dim=1).max())
        if not close and columns - needed <= max(8, _WASTE * needed):
            return
        # A stable sort of the flags puts dead columns first and keeps the order of the live ones.
        order = self._live.long().argsort(dim=1, stable=True)[:, columns - needed :]
        self._live = self._live.gather(1, order)
        order = order.to(self.device, non_blocking=True)
        self._each(
            lambda whole: whole.gather(2, order[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3]))
        )
        self._ragged = not bool(self._live.all())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace the keys and values [R, heads, columns, size] of every layer."""
        for layer in self._cache.layers:
            for name in ("keys", "values"):
                setattr(layer, name, change(getattr(layer, name)))


def goes_on_by_row(model: nn.Module, length: int) -> bool:
    """Whether rows of up to `length` tokens can be rolled back, or go on, by different counts."""
    base: Any = getattr(model, "get_base_model", lambda: model)()
    if "position_ids" not in inspect.signature(base.forward).parameters or _chunked_attention(model):
        return False
    window = _sliding_window(model)
    return window is None or length <= window


def learned_positions(model: nn.Module) -> int | None:
    """How many positions a model with a table of learned positions has; None for rotary and relative ones."""
    most = getattr(_text_config(model), "max_position_embeddings", None)
    if most is None:
        return None
    inputs = model.get_input_embeddings()  # type: ignore[operator]
    tables = (part for part in model.modules() if isinstance(part, nn.Embedding) and part is not inputs)
    # OPT and its kin keep two rows more than positions.
    return int(most) if any(table.num_embeddings - int(most) in (0, 2) for table in tables) else None


def _text_config(model: nn.Module) -> Any:
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _chunked_attention(model: nn.Module) -> bool:
    return bool(getattr(_text_config(model), "attention_chunk_size", None))


def _sliding_window(model: nn.Module) -> int | None:
    text = _text_config(model)
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    if "local" in (getattr(text, "attention_layers", None) or ()):  # GPT-Neo's names
        return int(text.window_size)
    if window is None or getattr(text, "use_sliding_window", True) is False:
        return None
    return int(window) if kinds is None or "sliding_attention" in kinds else None
