"""Keep the best scores of a group, exactly as many as asked for: of each row, or of any number of matrices.

Scores are float64, at least 0, on the CPU. Several levels are compared in turn: the first decides, the next decides
among those that are equal in it, and in the end the smaller index (of the matrix, the row, the column) wins. The number
of threads has no part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

Levels = tuple[torch.Tensor, ...]

_DIGIT = 16
# So many candidates are sorted at once instead of being narrowed down further.
_FEW = 1 << 22


def best_of_rows(levels: Levels, keep: int) -> torch.Tensor:
    """Keep `keep` entries of every row.

    Args:
        levels: scores, each float64 [rows, columns].
        keep: entries kept a row, 0 <= keep <= columns.

    Returns:
        bool [rows, columns].
    """
    rows, columns = levels[0].shape
    chosen = torch.zeros(rows, columns, dtype=torch.bool)
    undecided = torch.ones_like(chosen)
    missing = torch.full((rows, 1), keep)
    for index, level in enumerate(levels):
        if bool((missing == undecided.sum(1, keepdim=True)).all()):
            return chosen | undecided
        scores = level if index == 0 else level.masked_fill(~undecided, -1.0)
        ordered = torch.from_numpy(np.sort(scores.numpy(), axis=1))
        # A row that has all it needs has a threshold that nothing reaches.
        threshold = ordered.gather(1, (columns - missing).clamp(max=columns - 1))
        threshold = threshold.masked_fill(missing == 0, torch.inf)
        above = undecided & (scores > threshold)
        chosen |= above
        missing = missing - above.sum(1, keepdim=True)
        undecided &= scores == threshold
    # Counting along the rows costs as much as all the rest, and only rows with ties that matter need it.
    tied = (undecided.sum(1, keepdim=True) > missing).squeeze(1)
    if bool(tied.any()):
        undecided[tied] &= undecided[tied].cumsum(1) <= missing[tied]
    return chosen | undecided


def best_of_all(pieces: Sequence[Callable[[], Levels]], keep: int) -> list[torch.Tensor]:
    """Keep `keep` entries of several matrices together, which are made one at a time, some times over.

    Memory is that of the largest piece: the threshold is found digit by digit of the scores' bit patterns.

    Args:
        pieces: each makes the levels of one matrix, float64 [rows, columns].
        keep: entries kept in all of them together.

    Returns:
        bool [rows, columns] for every piece.
    """
    thresholds: list[float] = []
    missing = keep
    depth = len(pieces[0]())

    def undecided(levels: Levels) -> torch.Tensor:
        where = torch.ones_like(levels[0], dtype=torch.bool)
        for level, threshold in zip(levels, thresholds, strict=False):
            where &= level == threshold
        return where

    for index in range(depth):

        def candidates(index: int = index) -> Iterable[torch.Tensor]:
            for piece in pieces:
                levels = piece()
                yield levels[index][undecided(levels)] if index else levels[0].flatten()

        threshold, above, equal = kth_largest(candidates, missing)
        thresholds.append(threshold)
        missing -= above
        if missing in (0, equal):
            break
    kept = []
    for piece in pieces:
        levels = piece()
        mask = torch.zeros_like(levels[0], dtype=torch.bool)
        tied = torch.ones_like(mask)
        for level, threshold in zip(levels, thresholds, strict=False):
            mask |= tied & (level > threshold)
            tied &= level == threshold
        tied &= (tied.flatten().cumsum(0) <= missing).view_as(tied)
        missing -= int(tied.sum())
        kept.append(mask | tied)
    return kept


def kth_largest(values: Callable[[], Iterable[torch.Tensor]], k: int) -> tuple[float, int, int]:
    """The k-th largest of many numbers that do not fit into memory at once.

    Args:
        values: makes the numbers anew, as float64 tensors [n] of entries of at least 0.
        k: 1 is the largest; 0 gives infinity.

    Returns:
        (the number, how many are larger, how many are equal to it).
    """
    if k == 0:
        return float("inf"), 0, 0
    prefix, above = 0, 0
    for shift in range(64 - _DIGIT, -1, -_DIGIT):
        counts = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for part in values():
            digits = _digits(part, prefix, shift)
            counts += torch.bincount(digits, minlength=1 << _DIGIT)
        # From the largest digit down, the first whose running total reaches k.
        totals = counts.flip(0).cumsum(0) + above
        place = int((totals < k).sum())
        digit = (1 << _DIGIT) - 1 - place
        equal = int(counts[digit])
        above = int(totals[place]) - equal
        prefix = prefix << _DIGIT | digit
        if shift and equal <= _FEW:
            found = torch.cat([_with_prefix(part, prefix, shift) for part in values()])
            number = float(found.kthvalue(equal - (k - above) + 1).values)
            return number, above + int((found > number).sum()), int((found == number).sum())
    return float(torch.tensor(prefix).view(torch.float64)), above, equal


def _bits(numbers: torch.Tensor) -> torch.Tensor:
    # Bit patterns of floats of at least 0 are in the floats' order; adding 0 turns -0 into 0.
    return (numbers + 0.0).view(torch.int64)


def _digits(numbers: torch.Tensor, prefix: int, shift: int) -> torch.Tensor:
    bits = _bits(numbers)
    if shift + _DIGIT < 64:
        bits = bits[bits >> (shift + _DIGIT) == prefix]
    return (bits >> shift) & ((1 << _DIGIT) - 1)


def _with_prefix(numbers: torch.Tensor, prefix: int, shift: int) -> torch.Tensor:
    return numbers[_bits(numbers) >> shift == prefix]
