"""The context of rows over a `RowCache`: as `RaggedContext`, but nothing moves, and passes can be replayed."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from personafast.models.cache import COLUMNS, RowCache
from personafast.models.context import learned_positions
from personafast.models.graphs import CudaGraph, GraphError, Tape
from personafast.models.row_attention import attending
from personafast.models.rows import DeviceSlots

# Passes of up to this many tokens a row are recorded; longer ones are prompts, which come once.
RECORDED = 16
# A recorded pass reads a number of columns; there is a recording for each of these steps.
BUCKET = 4 * COLUMNS


class StaticContext:
    """The context of rows in one model: tokens fed so far, and the cache of fixed size that holds them.

    Cache and recordings outlive a text: `start` begins the next one. The cache has a fixed number of seats; a text of
    fewer rows leaves the others empty.

    Args:
        model: a transformers causal LM whose attention `row_attention.understood` finds in order.
        seats: the most rows.
        capacity: the most tokens of a row, those of a draft that is rolled back included.
        device: where the model is.
        recorder: `graphs.CudaGraph` or `graphs.Tape`, to replay short passes; None to call the model every time.

    Attributes:
        slots: what each seat carries; whoever feeds puts them in force.
    """

    def __init__(
        self,
        model: nn.Module,
        seats: int,
        capacity: int,
        device: torch.device,
        recorder: type[CudaGraph] | type[Tape] | None = None,
    ) -> None:
        self.model, self.device = model, device
        base: Any = getattr(model, "get_base_model", lambda: model)()
        parameters = inspect.signature(base.forward).parameters
        self._names = {name for name in ("position_ids", "logits_to_keep") if name in parameters}
        self._last_position = learned_positions(model)
        config: Any = base.config
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self.cache = RowCache(text.num_hidden_layers, seats, capacity, device)
        self.slots = DeviceSlots(seats, device)
        self._recorder, self._seats_stay = recorder, recorder is not None
        self._recordings: dict[tuple[tuple[object, ...], int, int], tuple[torch.Tensor, CudaGraph | Tape]] = {}
        self._version: object = None
        self._pool = torch.cuda.graph_pool_handle() if recorder is CudaGraph else None
        self._prompts: list[list[int]] | None = None
        self._seat = torch.arange(seats)

    def start(self, prompts: Sequence[Sequence[int]]) -> StaticContext:
        """Begin a text.

        Args:
            prompts: token ids a row, of any lengths >= 1, for as many rows as there are seats or fewer; they are fed
                with the first `feed`.
        """
        self.cache.reset()
        self._prompts = [list(ids) for ids in prompts]
        self._seat = torch.arange(len(prompts))
        return self

    @property
    def seats(self) -> int:
        """The most rows."""
        return self.cache.lengths.shape[0]

    @property
    def rows(self) -> int:
        """Rows of the text, R."""
        return self._seat.shape[0]

    def feed(self, tokens: torch.Tensor, keep: int, live: torch.Tensor | None = None) -> torch.Tensor:
        """Append tokens [R, k] to every row (after the prompt, the first time) and return the last `keep` logits.

        Args:
            tokens: int64 [R, k], on the CPU, or on the device where that has drawn them and nobody has looked.
            keep: how many places to give the logits of.
            live: bool [R, k] on the CPU, which of them are tokens of their row: a row's own stand at its right. None
                for all.

        Returns:
            float32 [R, keep, V] on the device; those of a place that is not live mean nothing.
        """
        new = tokens.shape[1]
        counts = torch.full((self.rows,), new) if live is None else live.sum(dim=1)
        # In the cache a row's own tokens stand at the left, and what is behind them does not count.
        shift = (new - counts)[:, None]
        if live is not None:
            order = (torch.arange(new) + shift).clamp(max=new - 1)
            tokens = tokens.gather(1, order.to(tokens.device, non_blocking=True))
        if self._prompts is not None:
            return self._begin(self._prompts, tokens, counts, keep)
        places = (torch.arange(new - keep, new) - shift).clamp(min=0)
        logits = self._pass(tokens)
        self._advance(counts)
        return self._at(logits, places)

    def banks_are(self, version: object) -> None:
        """What the model reads beside its weights: recordings that know another version of it are dropped."""
        if version != self._version:
            self._recordings.clear()
            self._version = version

    def rollback(self, counts: torch.Tensor) -> None:
        """Forget the last counts[r] tokens of row r, int64 [R] on the CPU."""
        self.cache.rollback(self._all(counts))

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only, int64 on the CPU. The others stay where they are, and are not looked at."""
        if self._prompts is not None:
            self._prompts = [self._prompts[row] for row in rows.tolist()]
            self._seat = torch.arange(rows.shape[0])
        elif self._seats_stay:
            self._seat = self._seat[rows]
        else:
            self.cache.keep(self._seat[rows])
            self._seat = torch.arange(rows.shape[0])

    def _begin(self, prompts: list[list[int]], tokens: torch.Tensor, counts: torch.Tensor, keep: int) -> torch.Tensor:
        """The prompts and what is fed with them, each row from column 0 on."""
        self._prompts = None
        starts = torch.tensor([len(ids) for ids in prompts])
        whole = torch.zeros(self.seats, int(starts.max()) + tokens.shape[1], dtype=torch.long)
        for row, ids in enumerate(prompts):
            whole[row, : len(ids)] = torch.tensor(ids)
        columns = starts[:, None] + torch.arange(tokens.shape[1])
        whole, columns, tokens = (part.to(self.device, non_blocking=True) for part in (whole, columns, tokens))
        whole[: len(prompts)].scatter_(1, columns, tokens)
        lengths = starts + counts
        whole = whole[:, : int(lengths.max())]
        places = (lengths[:, None] - keep + torch.arange(keep)).clamp(min=0)
        plan = self.cache.begin(whole.shape[1])
        if "logits_to_keep" in self._names:
            # The head is applied where some row needs it, not at every place of a long prompt.
            needed, places = places.unique(return_inverse=True)
            logits = self._call(whole, plan.positions, needed.to(self.device, non_blocking=True))
        else:
            logits = self._call(whole, plan.positions, None)
        self._advance(lengths)
        return self._at(logits, places)

    def _pass(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [seats, k, V] of the tokens behind every row's last; they are in the cache, and do not count yet."""
        new = tokens.shape[1]
        if self._recorder is None or new > RECORDED:
            fed = self._all(tokens).to(self.device, non_blocking=True)
            return self._call(fed, self.cache.begin(new).positions, None)
        columns = min(-(-(self.cache.bound + new) // BUCKET) * BUCKET, self.cache.capacity)
        self.cache.begin(new, columns)
        key = (self.slots.kinds, new, columns)
        known = self._recordings.get(key)
        if known is None:
            fixed = torch.zeros(self.seats, new, dtype=torch.long, device=self.device)

            def work() -> torch.Tensor:
                return self._call(fixed, self.cache.planned(new, columns).positions, None)

            try:
                recording = self._recorder(work, {"tokens": fixed, "lengths": self.cache.lengths}, self._pool)
            except GraphError as error:
                # Some models look at values on their way, as for rotary embeddings that depend on the length.
                warnings.warn(f"{type(self.model).__name__} is called pass by pass: {error}", stacklevel=2)
                self._recorder = None
                return self._pass(tokens)
            known = self._recordings[key] = (fixed, recording)
        fixed, recording = known
        fixed.copy_(self._all(tokens), non_blocking=True)
        return recording.replay()

    def _call(self, tokens: torch.Tensor, positions: torch.Tensor, places: torch.Tensor | None) -> torch.Tensor:
        inputs: dict[str, Any] = {
            "input_ids": tokens,
            "past_key_values": self.cache,
            "use_cache": True,
            # Not looked at: it keeps transformers from reading the tokens to warn of padding.
            "attention_mask": torch.ones_like(positions),
        }
        if "position_ids" in self._names:
            # Drafts may run past the end of a row that is full; what is read there is not kept.
            inputs["position_ids"] = (
                positions if self._last_position is None else positions.clamp(max=self._last_position - 1)
            )
        if places is not None:
            inputs["logits_to_keep"] = places
        self.slots.begin(positions)
        with attending(self.model):
            logits: torch.Tensor = self.model(**inputs).logits
        return logits

    def _at(self, logits: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """The logits of some places [R, keep] of every row, float32."""
        seat = self._seat[:, None].to(self.device, non_blocking=True)
        return logits[seat, places.to(self.device, non_blocking=True)].float()

    def _advance(self, counts: torch.Tensor) -> None:
        self.cache.advance(self._all(counts))

    def _all(self, of_rows: torch.Tensor) -> torch.Tensor:
        """[R, ...] of the rows as [seats, ...], 0 where nobody sits."""
        if torch.equal(self._seat, torch.arange(self.seats)):
            return of_rows
        seat = self._seat.to(of_rows.device, non_blocking=True)
        return of_rows.new_zeros(self.seats, *of_rows.shape[1:]).index_copy(0, seat, of_rows)
