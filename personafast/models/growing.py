"""A layer of keys and values with room to grow: a new token is written into place, and nothing is copied for it."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

# Columns made at least, and as a share of those that are there, whenever there is no more room.
_ROOM, _SHARE = 64, 0.5


class GrowingLayer(DynamicLayer):
    """transformers' `DynamicLayer`, whose `keys` and `values` are views of longer buffers.

    They may be cropped or replaced from outside: a tensor that is no view of its buffer gets a new buffer.
    """

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [R, heads, k, D]; all of them, [R, heads, n + k, D]."""
        if not self.is_initialized or self.keys is None or self.values is None or self.keys.dim() != 4:
            return super().update(key_states, value_states, *args, **kwargs)
        self.keys, self._key_buffer = _append(self.keys, getattr(self, "_key_buffer", None), key_states)
        self.values, self._value_buffer = _append(self.values, getattr(self, "_value_buffer", None), value_states)
        return self.keys, self.values


def _append(held: torch.Tensor, buffer: torch.Tensor | None, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    columns = held.shape[2]
    length = columns + new.shape[2]
    if (
        buffer is None
        or buffer.shape[2] < length
        or held.data_ptr() != buffer.data_ptr()
        or held.stride() != buffer.stride()
        or held.shape[:2] != buffer.shape[:2]
    ):
        room = length + max(_ROOM, int(_SHARE * length))
        buffer = held.new_empty(held.shape[0], held.shape[1], room, held.shape[3])
        buffer[:, :, :columns] = held
    buffer[:, :, columns:length] = new
    return buffer[:, :, :length], buffer
