"""The mask that several masks of one linear differ least from."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def majority(masks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Bit by bit, what most masks have; the first mask's bit where they are even.

    Of all bases this has the fewest differing bits, summed over the masks. Counts are kept bit-sliced: plane b holds
    bit b of every place's count, so that 32 places are counted by one word operation.

    Args:
        masks: one or more of int32 [out, W].

    Returns:
        int32 [out, W].
    """
    planes: list[torch.Tensor] = []
    for words in masks:
        carry = words
        for index, plane in enumerate(planes):
            planes[index], carry = plane ^ carry, plane & carry
        if len(planes) < len(masks).bit_length():
            planes.append(carry)
    # More than half, compared plane by plane from the top; `even` ends as: exactly half.
    half = len(masks) // 2
    more, even = torch.zeros_like(masks[0]), torch.full_like(masks[0], -1)
    for index in reversed(range(len(planes))):
        plane = planes[index]
        if half >> index & 1:
            even = even & plane
        else:
            more = more | (even & plane)
            even = even & ~plane
    return more | (even & masks[0]) if len(masks) % 2 == 0 else more
