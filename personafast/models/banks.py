"""What slots index: blended vectors, a row a blend, and the LoRA factors of all adapters of a linear."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from personafast.models.anatomy import Anatomy
from personafast.models.compressed import home
from personafast.ops import SteerMode
from personafast.ops._lora_delta import BoundDelta

# What is done with a slot of a bank that is only added.
ADDED = (-1, 1.0, 1.0)


class Lease:
    """A slot of a bank, which keeps its blend as long as anything holds this.

    Rows in force hold it, and so do a text that is being written between its passes, a logits processor, and a
    checkpointed pass that the backward pass computes again: none of them tells the bank when it is done.
    """

    def __init__(self, slot: int) -> None:
        self.slot = slot

    def __deepcopy__(self, _: object) -> Lease:
        # The rows of a model's copy name the slots of the copy's banks, which were copied with their leases.
        return self


class VectorBank:
    """One row a blend and block: bank[block][slot] is what acts on a row with that slot.

    Attributes:
        capacity: rows.
        made: banks made so far: each is a tensor that recordings from before do not know.
    """

    def __init__(self, parts: Anatomy, capacity: int) -> None:
        self.capacity = capacity
        self._blocks = parts.blocks
        self._hidden = parts.shape.hidden_size
        self._banks: dict[int, torch.Tensor] = {}
        self._slots: dict[object, int] = {}
        self._leases: weakref.WeakValueDictionary[int, Lease] = weakref.WeakValueDictionary()
        # By slot, the blocks where its row is not zero.
        self._acts: dict[int, frozenset[int]] = {}
        self.made = 0

    @property
    def in_use(self) -> set[int]:
        """The slots that may not go."""
        return set(self._leases)

    def known(self, key: object) -> Lease | None:
        """The slot of a blend that is in the bank, else None."""
        if key not in self._slots:
            return None
        slot = self._slots[key] = self._slots.pop(key)  # the last used stand last
        return self._lease(slot)

    def put(self, key: object, rows: torch.Tensor, use: tuple[int, float, float] = ADDED) -> Lease:
        """The slot of a blend that is new to the bank; if that is full, the one used longest ago of those nobody holds.

        Args:
            key: what tells the blend, and its use, from others.
            rows: float32 [num_blocks, H].
            use: what is done along it, of a bank of directions: `ops.steer_`'s mode and parameters.
        """
        slot = len(self._slots)
        if slot == self.capacity:
            slot = self._slots.pop(next(known for known, used in self._slots.items() if used not in self._leases))
        self._acts[slot] = frozenset(block for block, row in enumerate(rows) if bool(row.any()))
        for block, row in enumerate(rows):
            if block in self._banks or block in self._acts[slot]:
                self._put(block, slot, row, use)
        self._slots[key] = slot
        return self._lease(slot)

    def _lease(self, slot: int) -> Lease:
        return self._leases.setdefault(slot, Lease(slot))

    def acts(self, slot: int) -> frozenset[int]:
        """The blocks where the row of a slot is not zero."""
        return self._acts[slot]

    def at(self, block: int) -> torch.Tensor | None:
        """The bank float32 [S, H] of a block, or None when no blend acts there."""
        return self._banks.get(block)

    def on(self, block: int, device: torch.device) -> torch.Tensor | None:
        """As `at`, on the device of the activations: weights that are away, and a model that was moved, mislead."""
        bank = self._banks.get(block)
        if bank is not None and bank.device != device:
            with torch.inference_mode(False):
                self._move(block, device)
            self.made += 1
            bank = self._banks[block]
        return bank

    @property
    def device(self) -> torch.device | None:
        """Where its first bank is; None while it has none."""
        return next((bank.device for bank in self._banks.values()), None)

    def _put(self, block: int, slot: int, row: torch.Tensor, use: tuple[int, float, float]) -> None:
        if block not in self._banks:
            # No inference tensor, whatever mode the first call is made in: later ones may be made in another.
            with torch.inference_mode(False):
                self._make(block, home(self._blocks[block])[1])
            self.made += 1
        self._banks[block][slot].copy_(row)

    def _make(self, block: int, device: torch.device) -> None:
        # In float32 it serves activations of any dtype.
        self._banks[block] = torch.zeros(self.capacity, self._hidden, dtype=torch.float32, device=device)

    def _move(self, block: int, device: torch.device) -> None:
        self._banks[block] = self._banks[block].to(device)


class DirectionBank(VectorBank):
    """A bank whose slots say beside the direction what is done along it."""

    def __init__(self, parts: Anatomy, capacity: int) -> None:
        super().__init__(parts, capacity)
        self._settings: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def settings(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Mode int8 [S] and parameters float32 [S, 2] of a block's slots."""
        return self._settings[block]

    def _put(self, block: int, slot: int, row: torch.Tensor, use: tuple[int, float, float]) -> None:
        super()._put(block, slot, row, use)
        mode, *params = use
        modes, values = self._settings[block]
        # A slot that has nothing to do at this block ablates a direction of length 0, which leaves a row alone.
        modes[slot] = mode if block in self._acts[slot] else int(SteerMode.ABLATE)
        values[slot].copy_(torch.tensor(params))

    def _move(self, block: int, device: torch.device) -> None:
        super()._move(block, device)
        modes, values = self._settings[block]
        self._settings[block] = modes.to(device), values.to(device)

    def _make(self, block: int, device: torch.device) -> None:
        super()._make(block, device)
        self._settings[block] = (
            torch.zeros(self.capacity, dtype=torch.int8, device=device),
            torch.ones(self.capacity, 2, dtype=torch.float32, device=device),
        )


@dataclass(frozen=True)
class AdapterBank:
    """The LoRA factors of all adapters of one linear: A [M, R, in], B [M, out, R], scale [M], ranks [M]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor
    ranks: torch.Tensor

    @cached_property
    def _bound(self) -> dict[tuple[torch.dtype, torch.device], BoundDelta]:
        own = BoundDelta(self.a, self.b, self.scale, self.ranks)
        return {(self.a.dtype, self.a.device): own}

    def add_(self, out: torch.Tensor, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """`out` [..., O], with the updates of `x` [..., I]; slots int32, one for each row of both.

        The factors follow the activations: a quantised or offloaded weight does not say where and in which dtype its
        linear computes, and a model may be moved.
        """
        delta = self._bound.get((out.dtype, out.device))
        if delta is None:
            b = self.b.transpose(1, 2).to(out.device, out.dtype).transpose(1, 2)
            with torch.inference_mode(False):
                delta = BoundDelta(
                    self.a.to(out.device, out.dtype), b, self.scale.to(out.device), self.ranks.to(out.device)
                )
            self._bound[out.dtype, out.device] = delta
        return delta.add_(out, x.to(out.dtype), slots)

    @classmethod
    def stack(
        cls, linear: nn.Module, factors: Sequence[tuple[torch.Tensor, torch.Tensor, float] | None]
    ) -> AdapterBank:
        """Stack (A, B, scale) of every adapter, None for one that leaves this linear alone."""
        dtype, device = home(linear)
        present = [f for f in factors if f is not None]
        rank = max(f[0].shape[0] for f in present)
        a = torch.zeros(len(factors), rank, present[0][0].shape[1], dtype=dtype)
        # A view of [M, R, out]: that layout is what one product over all adapters reads.
        b = torch.zeros(len(factors), rank, present[0][1].shape[0], dtype=dtype).transpose(1, 2)
        scale = torch.zeros(len(factors), dtype=torch.float32)
        ranks = torch.zeros(len(factors), dtype=torch.int32)
        for slot, factor in enumerate(factors):
            if factor is not None:
                r = factor[0].shape[0]
                a[slot, :r], b[slot, :, :r] = factor[0], factor[1]
                scale[slot], ranks[slot] = factor[2], r
        return cls(*(tensor.to(device) for tensor in (a, b, scale, ranks)))
