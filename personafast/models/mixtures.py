"""Mixtures of masks: weighted sums of gates over one dense weight, in mask slots below -1."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from personafast.errors import PersonafastError
from personafast.models.rows import NOBODY

# Slot -2 is the first mixture, -3 the second.
_FIRST = NOBODY - 1


class MixtureTable:
    """Mixture m: the masks parts[m, :], int32 [M, N], with the shares shares[m, :], float32 [M, N], that sum to one.

    A mixture of fewer than N masks repeats its first one with share 0.

    Args:
        capacity: M, the most mixtures at a time; beyond it those leave that were used longest ago.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._slots: dict[tuple[tuple[int, float], ...], int] = {}
        self._tables: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}
        self._spread: tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def widest(self) -> int:
        """N, the masks of the largest mixture so far; recordings hold for one N."""
        return next((parts.shape[1] for parts, _ in self._tables.values()), 0)

    def slot(self, parts: Sequence[tuple[int, float]], in_use: set[int]) -> int:
        """The slot, below -1, of sum_i share_i G_i.

        Args:
            parts: (slot of a mask, share), the shares summing to one.
            in_use: slots that rows in force carry; they stay.

        Raises:
            PersonafastError: all slots are in use.
        """
        key = tuple(parts)
        if key in self._slots:
            self._slots[key] = self._slots.pop(key)  # the last used stand last
            return self._slots[key]
        slot = self._vacant(in_use)
        with torch.inference_mode(False), torch.no_grad():
            self._widen(len(key))
            count = self.widest - len(key)
            masks = torch.tensor([mask for mask, _ in key] + [key[0][0]] * count, dtype=torch.int32)
            shares = torch.tensor([share for _, share in key] + [0.0] * count)
            for own_masks, own_shares in self._tables.values():
                own_masks[_FIRST - slot].copy_(masks)
                own_shares[_FIRST - slot].copy_(shares)
        self._slots[key] = slot
        return slot

    def check_room(self, count: int) -> None:
        """Raise `PersonafastError` unless one call may have `count` different mixtures."""
        if count > self.capacity:
            raise PersonafastError(
                f"personas: more than {self.capacity} different mixtures of masks in one call; "
                "attach with a larger max_personas"
            )

    def parts(self, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks and shares of tokens, [T, N] each, of their slots int32 [T]; one that carries no mixture has itself."""
        # All linears of a pass ask with one tensor.
        if self._spread is not None and self._spread[0] is slots:
            return self._spread[1]
        masks, shares = self._at(slots.device)
        mixed = (slots <= _FIRST)[:, None]
        which = (_FIRST - slots).clamp(min=0).long()
        alone = torch.zeros_like(shares[:1])
        alone[:, :1].fill_(1)
        found = torch.where(mixed, masks[which], slots[:, None]), torch.where(mixed, shares[which], alone)
        self._spread = slots, found
        return found

    def _at(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        if device not in self._tables:
            masks, shares = next(iter(self._tables.values()))
            with torch.inference_mode(False):
                self._tables[device] = masks.to(device), shares.to(device)
        return self._tables[device]

    def _vacant(self, in_use: set[int]) -> int:
        taken = set(self._slots.values()) | in_use
        for slot in range(_FIRST, _FIRST - self.capacity, -1):
            if slot not in taken:
                return slot
        self.check_room(len(in_use & taken) + 1)
        return self._slots.pop(next(key for key, slot in self._slots.items() if slot not in in_use))

    def _widen(self, count: int) -> None:
        if count <= self.widest:
            return
        before = self._tables
        if not before:
            empty = torch.zeros(self.capacity, 0)
            before = {torch.device("cpu"): (empty.int(), empty)}
        self._tables = {}
        for device, (masks, shares) in before.items():
            missing = count - masks.shape[1]
            first = masks[:, :1] if masks.shape[1] else masks.new_zeros(self.capacity, 1)
            self._tables[device] = (
                torch.cat([masks, first.expand(-1, missing)], dim=1),
                torch.cat([shares, shares.new_zeros(self.capacity, missing)], dim=1),
            )
