"""A KV cache of fixed size whose rows have a length each, for transformers.

Row r has its tokens in columns 0 to lengths[r] - 1. New ones are written behind them, at every row's own place, and a
rollback only lowers the length, so nothing is moved, allocated or read by the host: the buffers keep their addresses,
and a captured graph that writes to them stays right whatever the lengths are when it is replayed.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from personafast.errors import PersonafastError

# What attention reads is a multiple of this many columns: memory-efficient attention wants its mask aligned.
COLUMNS = 64

PLAN = "_personafast_plan"


class Plan:
    """Where the new tokens of one forward pass stand, and which columns each of them sees.

    Attributes:
        positions: int64 [R, c], column and position of every new token.
        columns: how many columns attention reads; no token of this pass stands behind them.
        start: the column of every row's first new token, where the host knows it to be one; None otherwise.
    """

    def __init__(self, lengths: torch.Tensor, new: int, columns: int, start: int | None) -> None:
        self.positions = lengths[:, None] + torch.arange(new, device=lengths.device)
        self.columns = columns
        self.start = start
        self._rows = torch.arange(lengths.shape[0], device=lengths.device)[:, None]
        self._masks: dict[int | None, torch.Tensor | None] = {}

    def write(self, buffer: torch.Tensor, new: torch.Tensor) -> None:
        """Put new [R, K, c, D] into the columns of buffer [R, K, C, D] that are theirs."""
        if self.start is not None:
            buffer[:, :, self.start : self.start + new.shape[2]] = new
        else:
            buffer[self._rows, :, self.positions] = new.transpose(1, 2)

    def causal(self, window: int | None) -> bool:
        """Whether this is the first pass, in which every token sees those before it and nothing else is there."""
        new = self.positions.shape[1]
        return self.start == 0 and self.columns == new and (window is None or new <= window)

    def mask(self, window: int | None) -> torch.Tensor | None:
        """Which columns every new token sees, bool [R, 1, c, n]; None where each sees all of them.

        Args:
            window: how many of the last columns, its own included, a token sees; None for all.
        """
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        return self._masks[window]

    def _mask(self, window: int | None) -> torch.Tensor | None:
        new = self.positions.shape[1]
        if self.start is not None and new == 1 and self.columns == self.start + 1:
            if window is None or self.columns <= window:
                return None
        column = torch.arange(self.columns, device=self.positions.device)
        seen = column <= self.positions[:, :, None]
        if window is not None:
            seen = seen & (column > self.positions[:, :, None] - window)
        return seen[:, None]


class RowLayer(CacheLayerMixin):
    """Keys and values [R, K, C, D] of one layer."""

    is_compileable = True
    is_sliding = False

    def __init__(self, cache: RowCache) -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the buffers, of the shape and dtype of the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        rows, capacity = self._cache.lengths.shape[0], self._cache.capacity
        # Zeros: a column that no token sees yet must not hold a NaN, which no mask takes out of a product.
        for name, states in (("keys", key_states), ("values", value_states)):
            setattr(self, name, states.new_zeros(rows, states.shape[1], capacity, states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [R, K, c, D] where the plan says; views of the columns that attention reads."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        plan = self._cache.plan
        if plan is None:
            raise PersonafastError("RowCache: a model was run without `begin`, so there is no place for its tokens")
        assert self.keys is not None and self.values is not None
        plan.write(self.keys, key_states)
        plan.write(self.values, value_states)
        keys, values = self.keys[:, :, : plan.columns], self.values[:, :, : plan.columns]
        # Attention gets no cache, but it gets these keys.
        setattr(keys, PLAN, plan)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that attention reads, and the first of them."""
        plan = self._cache.plan
        return (self._cache.capacity if plan is None else plan.columns), 0

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return self._cache.bound

    def get_max_length(self) -> int:
        """C."""
        return self._cache.capacity

    def get_max_cache_shape(self) -> int:
        """C, by the name that older versions of transformers ask for."""
        return self._cache.capacity


class RowCache(Cache):
    """Keys and values of R rows, each of its own length.

    The host keeps the lengths, since it is told what a round accepted anyway, and the device has a copy: nothing is
    ever read back. Before a forward pass over c new tokens a row comes `begin(c)`; after it `advance` says how many of
    them count.

    Args:
        layers: attention layers of the model.
        rows: R.
        capacity: C, the most tokens a row can have, those of a pass that do not count included.
        device: where the copy of the lengths is; keys and values are where the model makes them.

    Attributes:
        host: int64 [R] on the CPU, tokens of every row.
        lengths: the device's copy; it never moves, and is right from `begin` on.
        plan: that of the pass that has begun.
    """

    def __init__(self, layers: int, rows: int, capacity: int, device: torch.device) -> None:
        self.capacity = -(-capacity // COLUMNS) * COLUMNS
        self.host = torch.zeros(rows, dtype=torch.long)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.plan: Plan | None = None
        self._own = [RowLayer(self) for _ in range(layers)]
        super().__init__(layers=list(self._own))

    @property
    def bound(self) -> int:
        """Tokens of the longest row."""
        return int(self.host.max()) if self.host.numel() else 0

    def begin(self, new: int, columns: int | None = None) -> Plan:
        """Make room for `new` tokens behind every row's last.

        Args:
            new: c.
            columns: what attention is to read, for a pass that is replayed while rows grow; None for what is in use.

        Raises:
            PersonafastError: the longest row has no room.
        """
        need = self.bound + new
        if need > (columns or self.capacity):
            raise PersonafastError(
                f"RowCache: {self.bound} tokens and {new} new ones do not fit into {columns or self.capacity} columns; "
                "make it with a larger capacity"
            )
        self.lengths.copy_(self.host, non_blocking=True)
        even = columns is None and bool((self.host == self.host[:1]).all())
        if columns is None:
            columns = need if even or self.lengths.is_cpu else min(-(-need // COLUMNS) * COLUMNS, self.capacity)
        return self.planned(new, columns, self.bound if even else None)

    def planned(self, new: int, columns: int, start: int | None = None) -> Plan:
        """The plan of a pass from the lengths that the device has: what a recording begins with."""
        self.plan = Plan(self.lengths, new, columns, start)
        return self.plan

    def advance(self, counts: int | torch.Tensor) -> None:
        """Let the first counts[r] of the new tokens of row r count; what is behind them will be written over.

        Args:
            counts: one number for all rows, or int64 [R] on the CPU.
        """
        self.host += counts
        self.plan = None

    def rollback(self, counts: torch.Tensor) -> None:
        """Forget the last counts[r] tokens of row r, int64 [R] on the CPU."""
        if bool((counts > self.host).any()):
            row = int((counts > self.host).int().argmax())
            raise PersonafastError(f"RowCache: row {row} has {int(self.host[row])} tokens, not {int(counts[row])}")
        self.host -= counts

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only, int64 on the CPU: their columns move to the front of smaller views."""
        count, there = rows.shape[0], rows.to(self.lengths.device, non_blocking=True)
        for layer in self._own:
            if layer.is_initialized:
                for name in ("keys", "values"):
                    buffer = getattr(layer, name)
                    buffer[:count] = buffer[there]
                    setattr(layer, name, buffer[:count])
        self.host, self.lengths = self.host[rows], self.lengths[:count]

    def reset(self) -> None:
        """Forget every token."""
        self.host.zero_()
        self.plan = None
