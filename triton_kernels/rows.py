"""How the rows of the residual stream are laid over programs and threads."""

from __future__ import annotations

import functools

import torch
import triton
from personafast._triton.launch import device_of

# Elements a thread holds of a row that stays in registers: four accesses of 16 bytes at 16 bit. With fewer, what every
# thread has to do for its row as a whole (addresses, sums over the warps) would be half of its instructions.
PER_THREAD = 32
# The widest row that stays in registers; a wider one is read twice, the second time from cache.
WIDEST = 8192
# Threads of a multiprocessor, of those that have the fewest.
_RESIDENT = 1536


def in_one_wave(tensor: torch.Tensor, programs: int, num_warps: int) -> bool:
    """Whether the programs all run at once on the device of `tensor`.

    If so, nobody else's loads fill the time that a program waits, and it pays to read what may turn out not to be
    needed. If not, memory is what it costs, and a row that is not needed should not be read.
    """
    return programs * 32 * num_warps <= device_of(tensor).multiprocessors * _RESIDENT


@functools.cache
def whole_row(H: int) -> tuple[int, int]:
    """(columns, warps) of a program that has to see its row at once: all of it if it is not wider than `WIDEST`."""
    block = max(128, triton.next_power_of_2(H)) if H <= WIDEST else WIDEST // 2
    return block, max(1, block // (32 * PER_THREAD))
