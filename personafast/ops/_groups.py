"""Rows sorted out by slot, once for all the operators that a forward pass calls with the same slots."""

from __future__ import annotations

import weakref
from typing import TypeAlias

import torch

from personafast.ops._library import check_slot_range

# (slot, rows that carry it): a slice where they lie side by side, else int64 indices.
Groups: TypeAlias = "list[tuple[int, slice | torch.Tensor]]"

# A forward pass calls every linear with one slots tensor of each kind; the last few are remembered. A changed tensor
# is noticed by its values, since what writes through numpy or `.data` leaves its version alone, a freed one by its weak
# reference.
_REMEMBERED = 8
_recent: list[tuple[weakref.ref[torch.Tensor], torch.Tensor, int, Groups]] = []


def row_groups(op: str, slots: torch.Tensor, count: int) -> Groups:
    """The rows of each slot in use, by ascending slot, on a CPU.

    Args:
        op: the operator, for the error message.
        slots: int32 [T].
        count: slots there are; each value is checked to lie in [-1, count).
    """
    for reference, values, known, groups in _recent:
        if reference() is slots and known == count and torch.equal(values, slots):
            return groups
    groups = _sort_out(op, slots, count)
    _recent.insert(0, (weakref.ref(slots), slots.clone(), count, groups))
    del _recent[_REMEMBERED:]
    return groups


def _sort_out(op: str, slots: torch.Tensor, count: int) -> Groups:
    values = check_slot_range(op, "slots", slots, count)
    assert values is not None, "rows are sorted out on the CPU only"
    groups: Groups = []
    for slot in sorted(set(values)):
        rows = (slots == slot).nonzero()[:, 0]
        first, last = int(rows[0]), int(rows[-1])
        side_by_side = last - first + 1 == rows.numel()
        groups.append((slot, slice(first, last + 1) if side_by_side else rows))
    return groups
