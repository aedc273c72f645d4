"""Which steps of steering, mask and adapter each row of a batch carries."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from personafast.errors import PersonafastError
from personafast.models.places import Prompts
from personafast.models.steps import NOBODY, HeldSteps, RowSteps, Steps


class Spread(Protocol):
    """The slots of one kind, for the tokens of a forward pass."""

    @property
    def used(self) -> set[int]:
        """The slots that rows carry."""

    def over(self, batch: int, length: int, device: torch.device) -> torch.Tensor:
        """Slots [batch * length], row-major."""


class TokenSlots:
    """The slots of one kind, spread over the tokens of a forward pass of any length."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows
        self._spread: dict[tuple[int, int, torch.device], torch.Tensor] = {}

    @property
    def used(self) -> set[int]:
        """The slots that rows carry."""
        return set(self._rows.tolist()) - {NOBODY}

    def over(self, batch: int, length: int, device: torch.device) -> torch.Tensor:
        """Slots [batch * length], row-major. A batch that is a multiple of the rows (beams) repeats each row."""
        key = (batch, length, device)
        if key not in self._spread:
            rows = self._rows.numel()
            if rows == 0 or batch % rows:
                raise PersonafastError(
                    f"personas: {rows} given for a batch of {batch} rows; give one a row (None for none)"
                )
            self._spread[key] = self._rows.repeat_interleave(batch // rows * length).to(device)
        return self._spread[key]


@dataclass(frozen=True)
class RowSlots:
    """What the rows of a batch carry; slots of masks and adapters are int32 [R] on the CPU, -1 leaves a row alone.

    Spread over tokens they are kept with the object, so that all steps of a decoding loop share one tensor a kind.
    """

    steps: RowSteps
    masks: torch.Tensor
    adapters: torch.Tensor

    @classmethod
    def of(
        cls,
        steps: Sequence[Steps],
        masks: Sequence[int],
        adapters: Sequence[int],
        prompts: Prompts | None = None,
    ) -> RowSlots:
        """From plain values, and where the rows' prompts end."""
        slots = (torch.tensor(list(slots), dtype=torch.int32) for slots in (masks, adapters))
        return cls(RowSteps(steps, prompts), *slots)

    def select(self, rows: torch.Tensor) -> RowSlots:
        """The slots of some of the rows."""
        return RowSlots(self.steps.select(rows), self.masks[rows], self.adapters[rows])

    @cached_property
    def of_linears(self) -> dict[str, TokenSlots]:
        """The slots that act at linears, "masks" and "adapters": the kinds that any row uses."""
        kinds = {"masks": self.masks, "adapters": self.adapters}
        return {kind: TokenSlots(slots) for kind, slots in kinds.items() if bool((slots != NOBODY).any())}

    @property
    def of_blocks(self) -> RowSteps | None:
        """The steps that act at blocks, if any row has one."""
        return self.steps if self.steps else None


class DeviceSlots:
    """Slots of the seats of a batch in buffers that do not move, for passes that are recorded and replayed.

    Args:
        seats: rows of the batch.
        device: where the model is.
    """

    def __init__(self, seats: int, device: torch.device) -> None:
        self._held = {kind: _Held(seats, device) for kind in ("masks", "adapters")}
        self._steps = HeldSteps(seats, device)
        self._used: tuple[str, ...] = ()

    def set(self, slots: RowSlots) -> None:
        """Give the first seats the slots of these rows, and the others none."""
        self._used = tuple(slots.of_linears)
        for kind, held in self._held.items():
            held.rows.fill_(NOBODY)
            rows = getattr(slots, kind)
            held.rows[: rows.shape[0]].copy_(rows, non_blocking=True)
        self._steps.hold(slots.steps)

    @property
    def kinds(self) -> tuple[object, ...]:
        """What rows use, not with which values: a recording holds for these."""
        return (*self._used, self._steps.kind) if self._steps.kind else self._used

    @property
    def of_linears(self) -> dict[str, _Held]:
        """As `RowSlots.of_linears`."""
        return {kind: self._held[kind] for kind in self._used}

    @property
    def of_blocks(self) -> HeldSteps | None:
        """As `RowSlots.of_blocks`."""
        return self._steps if self._steps.kind else None

    def begin(self, index: torch.Tensor) -> None:
        """A pass begins, over tokens with this index in their rows, int64 [seats, L]."""
        # What was spread over the tokens of another one is not this one's.
        for held in self._held.values():
            held.spread.clear()
        self._steps.begin(index)


class _Held:
    """The slots of one kind in a buffer; spread over tokens by operators, which a recording repeats."""

    def __init__(self, seats: int, device: torch.device) -> None:
        self.rows = torch.full((seats,), NOBODY, dtype=torch.int32, device=device)
        self.spread: dict[int, torch.Tensor] = {}

    @property
    def used(self) -> set[int]:
        """The slots that rows carry."""
        return set(self.rows.tolist()) - {NOBODY}

    def over(self, batch: int, length: int, device: torch.device) -> torch.Tensor:
        """Slots [batch * length], row-major."""
        if batch != self.rows.shape[0]:
            raise PersonafastError(f"personas: {self.rows.shape[0]} rows were prepared for a batch of {batch}")
        if length not in self.spread:
            self.spread[length] = self.rows[:, None].expand(-1, length).reshape(-1)
        return self.spread[length]
