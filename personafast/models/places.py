"""Where the tokens of a forward pass stand in their rows, and where the rows' prompts end.

A token's index counts the tokens of its row before it, padding left out, whatever columns they are in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from personafast.errors import PersonafastError


@dataclass(frozen=True)
class Generation:
    """What a call of `generate` began with: columns of its prompt, and its mask [B, columns] if it had one."""

    columns: int
    mask: torch.Tensor | None


class Prompts:
    """Lengths of the rows' prompts, told by the caller, by `generate`, or by the pass that began with no cache.

    Args:
        lengths: tokens of every row's prompt, without padding; None if the caller does not say.
        outer: a call of `generate` that was running before, whose prompts these are not.
    """

    def __init__(self, lengths: Sequence[int] | None = None, outer: Generation | None = None) -> None:
        self.outer = outer
        self.told = None if lengths is None else torch.tensor(list(lengths), dtype=torch.long)
        self._seen: torch.Tensor | None = None

    def check(self, places: Places) -> None:
        """Refuse a pass that goes on from a cache when nobody has told where its prompts end; its cache is untouched.

        Raises:
            PersonafastError: naming what tells it.
        """
        if self.told is None and self._seen is None and not places.in_generation and not places.begins:
            self._refuse()

    def of(self, places: Places, index: torch.Tensor) -> torch.Tensor:
        """Prompt length of every row of a pass whose tokens have this index [B, L]; int64 [B].

        Raises:
            PersonafastError: the pass goes on from a cache, and nobody has told where its prompts end.
        """
        batch, device = index.shape[0], index.device
        if self.told is not None:
            return repeated(self.told, batch, "prompt_lengths").to(device, non_blocking=True)
        began = places.prompts_of_generation(batch)
        if began is not None:
            return began.to(device)
        if places.begins:
            self._seen = index[:, : places.columns_of_prompt].amax(dim=1) + 1
        if self._seen is None or self._seen.shape[0] != batch:
            self._refuse()
        return self._seen.to(device)

    @staticmethod
    def _refuse() -> NoReturn:
        raise PersonafastError(
            "prompt_lengths: this pass goes on from a cache, which does not tell where the prompts end; give "
            "personas.using(..., prompt_lengths=...), or make the pass over the prompts inside the same `with`"
        )


class Places:
    """The tokens of one forward pass.

    Args:
        inputs: what the decoder is called with, by name.
        generation: the call of `generate` that the pass belongs to, if any.
    """

    def __init__(self, inputs: Mapping[str, Any], generation: Generation | None) -> None:
        self._mask, self._positions = inputs.get("attention_mask"), inputs.get("position_ids")
        self._generation = generation
        cache = inputs.get("past_key_values")
        # Read now: the cache grows while the pass runs. A static cache tells a tensor.
        past = 0 if cache is None else cache.get_seq_length()
        self._past: int | torch.Tensor = past.clone() if isinstance(past, torch.Tensor) else int(past)

    @property
    def begins(self) -> bool:
        """Whether nothing is in the cache yet."""
        return bool(self._past == 0)

    @property
    def in_generation(self) -> bool:
        """Whether the pass belongs to a call of `generate`."""
        return self._generation is not None

    @property
    def columns_of_prompt(self) -> int | None:
        """Columns that the prompts take, or None if nobody says."""
        return None if self._generation is None else self._generation.columns

    @property
    def _live(self) -> torch.Tensor | None:
        """Which columns hold tokens, bool [B, C], where a mask says so."""
        mask = self._mask
        return mask != 0 if isinstance(mask, torch.Tensor) and mask.dim() == 2 else None

    def index(self, batch: int, length: int, device: torch.device) -> torch.Tensor:
        """Index of every token in its row, int64 [B, L]; -1 for padding.

        Raises:
            PersonafastError: the pass does not tell padding from tokens.
        """
        live, past, positions = self._live, self._past, self._positions
        if live is not None:
            counted = torch.where(live, live.long().cumsum(dim=1) - 1, -1)
            columns = counted.shape[1]
            if isinstance(past, torch.Tensor):
                found = counted[:, past.to(counted.device) + torch.arange(length, device=counted.device)]
            elif columns < past + length:
                raise PersonafastError(
                    f"attention_mask: {columns} columns for {past} tokens in the cache and {length} new ones; steering "
                    "by positions needs a mask over all of them"
                )
            else:
                found = counted[:, past : past + length]
        elif self._mask is None:
            start = past.to(device) if isinstance(past, torch.Tensor) else past
            found = (start + torch.arange(length, device=device))[None]
        elif isinstance(positions, torch.Tensor) and positions.dim() == 2 and positions.shape[1] == length:
            found = positions
        else:
            raise PersonafastError(
                "attention_mask: a mask that is not [rows, columns] does not tell padding from tokens; steering by "
                "positions needs position_ids beside it"
            )
        return found.to(device).expand(batch, length)

    def prompts_of_generation(self, batch: int) -> torch.Tensor | None:
        """Prompt lengths int64 [B] as masks tell them; None outside of `generate` or without any such mask."""
        generation = self._generation
        if generation is None:
            return None
        live = self._live
        if generation.mask is not None:
            return repeated(generation.mask.long().sum(dim=1), batch, "attention_mask")
        if live is not None and live.shape[1] >= generation.columns:
            return live[:, : generation.columns].long().sum(dim=1).expand(batch)
        # A mask of another form: the pass over the prompts tells by its positions.
        return torch.full((batch,), generation.columns) if self._mask is None else None


def repeated(values: torch.Tensor, batch: int, what: str) -> torch.Tensor:
    """Values [R] of rows as [batch], each repeated in place: beams, several sequences a row."""
    rows = values.shape[0]
    if rows == 0 or batch % rows:
        raise PersonafastError(f"{what}: {rows} given for a batch of {batch} rows; give one a row")
    return values.repeat_interleave(batch // rows) if batch != rows else values
