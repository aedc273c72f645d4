"""The masks of a model in memory: one bank of bit masks a linear, and what dropped weights are multiplied with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from personafast.models.mixtures import MixtureTable
from personafast.models.rows import Spread
from personafast.ops import masked_linear


class Gate(Protocol):
    """A mask: G = M + gamma (1 - M), M bit-packed by module path."""

    @property
    def words(self) -> Mapping[str, torch.Tensor]:
        """Module path -> int32 [out, ceil(in / 32)]."""

    @property
    def gamma(self) -> float:
        """What dropped weights are multiplied with."""


class MaskBank:
    """All masks of a model, path -> int32 [C, out, ceil(in / 32)], with C slots of which some may be spare.

    A slot, once written, keeps its mask until the bank is moved to larger memory, so that masks may share their bits
    with it (`words_of`), and a mask that is added costs its own bits, not a copy of all.

    Attributes:
        slots: name -> slot.
        mixtures: weighted sums of gates, in slots below -1.
        moves: how often a bank has followed its linear to another device.
    """

    def __init__(self, max_mixtures: int) -> None:
        self.slots: dict[str, int] = {}
        self.moves = 0
        self.mixtures = MixtureTable(max_mixtures)
        self._held: dict[str, Gate] = {}
        self._words: dict[str, torch.Tensor] = {}
        self._free: list[int] = []
        self._capacity = 0
        self._gamma: dict[torch.device, torch.Tensor] = {}
        self._soft: set[int] = set()

    def __contains__(self, path: str) -> bool:
        return path in self._words

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Path -> the bits of all masks, int32 [C, out, ceil(in / 32)]."""
        return dict(self._words)

    def missing(self, masks: Mapping[str, Gate]) -> set[str]:
        """Paths that these masks cover and the bank does not."""
        return {path for mask in masks.values() for path in mask.words} - set(self._words)

    def fill(self, masks: Mapping[str, Gate], devices: Mapping[str, torch.device]) -> bool:
        """Hold these masks and no others.

        Args:
            masks: by name; one that is held already, the same object, is not copied again.
            devices: path -> where its weight is.

        Returns:
            Whether a tensor is new, which recordings from before do not know.
        """
        gone = [name for name, mask in self._held.items() if masks.get(name) is not mask]
        fresh = sorted(name for name, mask in masks.items() if self._held.get(name) is not mask)
        for name in gone:
            del self._held[name], self.slots[name]
        if not fresh:
            return False
        # No inference tensors, whatever mode the call is made in: later ones may be made in another.
        with torch.inference_mode(False), torch.no_grad():
            moved = self._room(len(fresh))
            for path in sorted(self.missing(masks)):
                shape = next(mask.words[path].shape for mask in masks.values() if path in mask.words)
                # All bits set: a mask that leaves this linear alone keeps every weight of it.
                self._words[path] = torch.full((self._capacity, *shape), -1, dtype=torch.int32, device=devices[path])
                moved = True
            for name in fresh:
                self._put(name, masks[name])
            return self._set_gamma() or moved

    def words_of(self, name: str) -> dict[str, torch.Tensor] | None:
        """The bits of a mask where the bank has them, views; None where the bank is not in the CPU's memory."""
        slot = self.slots[name]
        if any(self._words[path].device.type != "cpu" for path in self._held[name].words):
            return None
        return {path: self._words[path][slot] for path in self._held[name].words}

    def linear(
        self,
        path: str,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: Spread,
        slots: torch.Tensor,
    ) -> torch.Tensor:
        """x [T, in] through `weight` [out, in] as its rows' masks gate it, slots int32 [T]; [T, out]."""
        if not rows.mixed:
            return masked_linear(x, weight, self._bank(path, x.device), slots, self._gamma_for(rows, x.device), bias)
        parts, shares = self.mixtures.parts(slots)
        count = parts.shape[1]
        # One product for each mask of a mixture, as rows of one call: the weight is read once. A bias goes through
        # with every part, since the shares sum to one, and rows of a single mask keep their bits.
        products = masked_linear(
            x.repeat_interleave(count, dim=0),
            weight,
            self._bank(path, x.device),
            parts.reshape(-1),
            self._gamma_for(rows, x.device),
            bias,
        ).view(x.shape[0], count, weight.shape[0])
        wide = torch.promote_types(x.dtype, torch.float32)
        return (products.to(wide) * shares[..., None]).sum(dim=1).to(x.dtype)

    def _bank(self, path: str, device: torch.device) -> torch.Tensor:
        bank = self._words[path]
        if bank.device != device:  # the model was moved
            bank = self._words[path] = bank.to(device)
            self.moves += 1
        return bank

    def _gamma_for(self, rows: Spread, device: torch.device) -> torch.Tensor | None:
        """Gammas [C] where a row needs one: without them dropped weights are not computed with."""
        if not self._soft or not (rows.mixed or rows.may_use(self._soft)):
            return None
        if device not in self._gamma:
            self._gamma[device] = next(iter(self._gamma.values())).to(device)
        return self._gamma[device]

    def _room(self, count: int) -> bool:
        """See that `count` slots can be written; whether the banks were moved to larger memory."""
        if count <= len(self._free):
            return False
        live = sorted(self.slots.values())
        needed = len(live) + count
        # The first masks get what they need, later ones room for half as many again.
        spare = max(2, self._capacity // 2) if self._capacity else 0
        capacity = max(needed, self._capacity + spare)
        for path, bank in self._words.items():
            larger = torch.full((capacity, *bank.shape[1:]), -1, dtype=torch.int32, device=bank.device)
            larger[live] = bank[live]
            self._words[path] = larger
        self._capacity = capacity
        self._free = [slot for slot in range(capacity - 1, -1, -1) if slot not in live]
        return True

    def _put(self, name: str, mask: Gate) -> None:
        slot = self._free.pop()
        for path, words in mask.words.items():
            self._words[path][slot].copy_(words)
        self.slots[name] = slot
        self._held[name] = mask

    def _set_gamma(self) -> bool:
        gamma = torch.zeros(self._capacity)
        for name, mask in self._held.items():
            gamma[self.slots[name]] = mask.gamma
        self._soft = {self.slots[name] for name, mask in self._held.items() if mask.gamma}
        known = self._gamma
        if known and next(iter(known.values())).shape == gamma.shape:
            for there in known.values():
                there.copy_(gamma)
            return False
        self._gamma = {torch.device("cpu"): gamma}
        return bool(known)
