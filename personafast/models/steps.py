"""What the rows of a batch carry at the residual stream: steps, and what becomes of them at the tokens of a pass.

A row's steps lie in lanes. Even lanes add (`inject_`), odd ones steer (`steer_`), and blocks go through them in order,
so that any number of rows with any steps takes one launch a lane. Where and how strongly a step acts is worked out once
a pass, as slots and scales of its tokens; the banks know nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from personafast.errors import PersonafastError
from personafast.models.banks import Lease
from personafast.models.places import Places, Prompts

NOBODY = -1
# Behind every token; half of int64's range, so that sums with it stay inside.
END = 1 << 62

# (offset, share of the prompt's length): an index counted from the row's beginning or from its prompt's end.
Bound = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """At which tokens of its row a step acts, and how strongly.

    With P the prompt's length, i a token's index and s = max(0, i - (P - 1)), the number of the generated token that it
    leads to, the scale is strength (start + (end - start) min(s / steps, 1)) within the spans and where s < first.

    Attributes:
        spans: (low, high) bounds, high exclusive.
        first: generated tokens until which it acts.
        strength, start, end, steps: the scale.
    """

    spans: tuple[tuple[Bound, Bound], ...] = (((0, 0), (END, 0)),)
    first: int = END
    strength: float = 1.0
    start: float = 1.0
    end: float = 1.0
    steps: int = 1

    @property
    def everywhere(self) -> bool:
        """Whether it acts at every token."""
        return self.spans == (((0, 0), (END, 0)),) and self.first == END

    @property
    def scaled(self) -> bool:
        """Whether a scale other than 1 occurs."""
        return not self.strength == self.start == self.end == 1

    @property
    def counts(self) -> bool:
        """Whether the prompt's length matters."""
        return self.first != END or self.start != self.end or any(share for span in self.spans for _, share in span)


EVERYWHERE = Window()


@dataclass(frozen=True)
class Step:
    """One step of a row.

    Attributes:
        lane: 2 r for an addition in round r, 2 r + 1 for any other operation.
        slot: the row of the lane's bank.
        blocks: where that row is not zero.
        window: where and how strongly it acts.
        lease: keeps the blend in that slot.
    """

    lane: int
    slot: int
    blocks: frozenset[int]
    window: Window = EVERYWHERE
    lease: Lease | None = field(default=None, compare=False, repr=False)


Steps = tuple[Step, ...]


@dataclass(frozen=True)
class Lane:
    """One launch a block.

    Attributes:
        adds: whether it is an addition.
        slots: int32 [T], the bank's row for every token, -1 for none.
        scale: float32 [T], or None for 1.
        blocks: where it acts; None for wherever there is a bank.
    """

    adds: bool
    slots: torch.Tensor
    scale: torch.Tensor | None
    blocks: frozenset[int] | None


@dataclass(frozen=True)
class Table:
    """One lane's steps as tensors, an entry a row.

    Attributes:
        slot: int32 [R], -1 for a row without a step.
        bounds: int64 [R, K, 2, 2], K spans as (low, high) of (offset, share of the prompt's length).
        first: int64 [R].
        level: float32 [R, 4], strength, start, end - start, steps.
    """

    slot: torch.Tensor
    bounds: torch.Tensor
    first: torch.Tensor
    level: torch.Tensor

    @classmethod
    def of(cls, steps: Sequence[Step | None]) -> Table:
        """From a step a row, on the CPU; K is a power of two, so that few of them occur."""
        most = max(len(step.window.spans) for step in steps if step is not None)
        room = 1 << (most - 1).bit_length()
        found = cls.empty(len(steps), room, torch.device("cpu"))
        for row, step in enumerate(steps):
            if step is not None:
                window = step.window
                found.slot[row] = step.slot
                found.bounds[row, : len(window.spans)] = torch.tensor(window.spans)
                found.first[row] = window.first
                level = (window.strength, window.start, window.end - window.start, window.steps)
                found.level[row] = torch.tensor(level)
        return found

    @classmethod
    def empty(cls, rows: int, spans: int, device: torch.device) -> Table:
        """No step in any row."""
        return cls(
            torch.full((rows,), NOBODY, dtype=torch.int32, device=device),
            torch.zeros(rows, spans, 2, 2, dtype=torch.long, device=device),
            torch.zeros(rows, dtype=torch.long, device=device),
            torch.ones(rows, 4, dtype=torch.float32, device=device),
        )

    @property
    def parts(self) -> tuple[torch.Tensor, ...]:
        """Its tensors."""
        return self.slot, self.bounds, self.first, self.level

    def on(self, batch: int, device: torch.device) -> Table:
        """On a device, every row repeated in place to make `batch` rows."""
        times = batch // self.slot.shape[0]
        moved = (part.to(device, non_blocking=True) for part in self.parts)
        return Table(*(part.repeat_interleave(times, dim=0) if times > 1 else part for part in moved))

    def fill(self, other: Table) -> None:
        """Give the first rows what the rows of another table have, and the others nothing."""
        self.slot.fill_(NOBODY)
        for mine, theirs in zip(self.parts, other.parts, strict=True):
            mine[: theirs.shape[0]].copy_(theirs, non_blocking=True)

    def spread(
        self, index: torch.Tensor, prompts: torch.Tensor, scaled: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Slots and scales [B * L] of tokens with this index [B, L] in rows with prompts of these lengths [B]."""
        bounds = self.bounds[..., 0] + self.bounds[..., 1] * prompts[:, None, None]
        low, high = bounds[..., 0, None], bounds[..., 1, None]
        within = ((index[:, None] >= low) & (index[:, None] < high)).any(dim=1)
        step = (index - (prompts - 1)[:, None]).clamp(min=0)
        acting = within & (index >= 0) & (step < self.first[:, None])
        slots = torch.where(acting, self.slot[:, None], NOBODY).reshape(-1)
        if not scaled:
            return slots, None
        strength, start, change, steps = (part[:, None] for part in self.level.unbind(dim=1))
        scale = strength * (start + change * (step / steps).clamp(max=1))
        return slots, scale.reshape(-1)


class RowSteps:
    """The steps of the rows of a batch, for passes that are called one by one.

    Args:
        rows: the steps of every row.
        prompts: where the rows' prompts end.

    Attributes:
        blocks: where any row has a step.
        shaped: whether positions or schedules take part, so that passes differ.
        plain: where there are additions at all tokens and nothing else, their slots, int32 [R]; else None.
    """

    def __init__(self, rows: Sequence[Steps], prompts: Prompts | None = None) -> None:
        self.rows = tuple(rows)
        self.prompts = prompts or Prompts()
        self.blocks = frozenset(block for steps in rows for step in steps for block in step.blocks)
        windows = [step.window for steps in rows for step in steps]
        self.shaped = not all(window.everywhere and not window.scaled for window in windows)
        self.counts = any(window.counts for window in windows)
        only_added = not self.shaped and all(step.lane == 0 for steps in rows for step in steps)
        slots = [next((step.slot for step in steps), NOBODY) for steps in rows]
        self.plain = torch.tensor(slots, dtype=torch.int32) if only_added else None
        self._whole: dict[tuple[int, int, torch.device], tuple[Lane, ...]] = {}
        self._tables: dict[tuple[int, torch.device], list[Table]] = {}

    def __bool__(self) -> bool:
        return any(self.rows)

    def select(self, rows: torch.Tensor) -> RowSteps:
        """The steps of some of the rows."""
        chosen = rows.tolist()
        told = self.prompts.told
        return RowSteps([self.rows[row] for row in chosen], Prompts(None if told is None else told[rows].tolist()))

    @cached_property
    def lanes(self) -> dict[int, tuple[Step | None, ...]]:
        """By lane in order, the step of every row."""
        order = sorted({step.lane for steps in self.rows for step in steps})
        return {
            lane: tuple(next((step for step in steps if step.lane == lane), None) for steps in self.rows)
            for lane in order
        }

    @cached_property
    def facts(self) -> dict[int, tuple[bool, bool, frozenset[int]]]:
        """By lane, whether its steps choose tokens, whether they scale, and the blocks where any acts."""
        found = {}
        for lane, steps in self.lanes.items():
            windows = [step.window for step in steps if step is not None]
            blocks = frozenset(block for step in steps if step is not None for block in step.blocks)
            chooses = not all(window.everywhere for window in windows)
            found[lane] = (chooses, any(window.scaled for window in windows), blocks)
        return found

    def check(self, places: Places) -> None:
        """Raise unless a pass tells what the steps need to know."""
        if self.counts:
            self.prompts.check(places)

    def over(self, batch: int, length: int, device: torch.device, places: Places | None) -> tuple[Lane, ...]:
        """The lanes of a pass over `length` tokens a row. A batch that is a multiple of the rows repeats each row."""
        if self.shaped:
            return self._spread(batch, length, device, places)
        key = (batch, length, device)
        if key not in self._whole:
            self._whole[key] = tuple(
                Lane(lane % 2 == 0, table.slot.repeat_interleave(length), None, facts[2])
                for (lane, facts), table in zip(self.facts.items(), self._on(batch, device), strict=True)
            )
        return self._whole[key]

    def _on(self, batch: int, device: torch.device) -> list[Table]:
        key = (batch, device)
        if key not in self._tables:
            if batch % len(self.rows):
                raise PersonafastError(
                    f"personas: {len(self.rows)} given for a batch of {batch} rows; give one a row (None for none)"
                )
            self._tables[key] = [Table.of(steps).on(batch, device) for steps in self.lanes.values()]
        return self._tables[key]

    def _spread(self, batch: int, length: int, device: torch.device, places: Places | None) -> tuple[Lane, ...]:
        if places is None:
            raise PersonafastError(
                "personas: a block was called outside of its model, where nothing tells the positions of its tokens; "
                "call the model"
            )
        tables = self._on(batch, device)
        index = places.index(batch, length, device)
        prompts = self.prompts.of(places, index) if self.counts else index.new_zeros(batch)
        lanes = []
        for (lane, (_, scaled, blocks)), table in zip(self.facts.items(), tables, strict=True):
            slots, scale = table.spread(index, prompts, scaled)
            # Not looked at where that would wait for the device.
            if slots.is_cpu and not bool((slots >= 0).any()):
                continue
            lanes.append(Lane(lane % 2 == 0, slots, scale, blocks))
        return tuple(lanes)


class HeldSteps:
    """The steps of the seats of a batch in buffers that do not move, for passes that are recorded and replayed.

    Slots and scales are worked out on the device inside the pass, from the tokens' indices there, so that one
    recording serves all rows whose steps lie in the same lanes.
    """

    blocks = None
    shaped = False
    plain: torch.Tensor | None = None

    def __init__(self, seats: int, device: torch.device) -> None:
        self._seats, self._device = seats, device
        self._prompts = torch.zeros(seats, dtype=torch.long, device=device)
        self._tables: dict[tuple[int, int], Table] = {}
        self._index: torch.Tensor | None = None
        self._spread: dict[int, tuple[Lane, ...]] = {}
        # (lane, spans, whether it chooses tokens, whether it scales): a recording holds for these.
        self.kind: tuple[tuple[int, int, bool, bool], ...] = ()

    def hold(self, rows: RowSteps) -> None:
        """Give the first seats the steps of these rows, and the others none."""
        kind = []
        if rows.counts:
            told = rows.prompts.told
            assert told is not None
            self._prompts[: told.shape[0]].copy_(told, non_blocking=True)
        for lane, steps in rows.lanes.items():
            table = Table.of(steps)
            spans = table.bounds.shape[1]
            if (lane, spans) not in self._tables:
                self._tables[lane, spans] = Table.empty(self._seats, spans, self._device)
            self._tables[lane, spans].fill(table)
            chooses, scales, _ = rows.facts[lane]
            kind.append((lane, spans, chooses, scales))
        self.kind = tuple(kind)

    def begin(self, index: torch.Tensor) -> None:
        """A pass begins, over tokens with this index, int64 [seats, L]."""
        self._index = index
        self._spread.clear()

    def over(self, batch: int, length: int, device: torch.device, places: Places | None) -> tuple[Lane, ...]:
        """As `RowSteps.over`."""
        if batch != self._seats:
            raise PersonafastError(f"personas: {self._seats} rows were prepared for a batch of {batch}")
        if length not in self._spread:
            self._spread[length] = tuple(self._lane(length, *kind) for kind in self.kind)
        return self._spread[length]

    def _lane(self, length: int, lane: int, spans: int, chooses: bool, scales: bool) -> Lane:
        table = self._tables[lane, spans]
        if not chooses and not scales:
            return Lane(lane % 2 == 0, table.slot[:, None].expand(-1, length).reshape(-1), None, None)
        assert self._index is not None
        return Lane(lane % 2 == 0, *table.spread(self._index, self._prompts, scales), None)
