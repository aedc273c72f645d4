"""How the rows of the residual stream are laid over programs and threads."""

from __future__ import annotations

import functools

import torch
from personafast._triton.launch import cdiv, device_of, next_power_of_2

# Tiles that a row in registers is cut into at most, each 8 elements a thread. With fewer than 32 elements, what every
# thread does for its row as a whole (addresses, sums over the warps) would be half of its instructions. And widths
# that are no power of two leave few threads idle.
_TILES = 5
# The widest tile: 512 threads.
_WIDEST = 4096
# Threads of a multiprocessor, of those that have the fewest.
_RESIDENT = 1536


def in_one_wave(tensor: torch.Tensor, programs: int, num_warps: int) -> bool:
    """Whether the programs all run at once on the device of `tensor`.

    If so, nobody else's loads fill the time that a program waits, and it pays to read what may turn out not to be
    needed. If not, memory is what it costs, and a row that is not needed should not be read.
    """
    return programs * 32 * num_warps <= device_of(tensor).multiprocessors * _RESIDENT


@functools.cache
def whole_row(H: int) -> tuple[dict[str, int | bool], int]:
    """(constants, warps) of a program that has to see its row at once.

    The constants are BLOCK, the columns of a tile; TILES, how many the row has; and HELD, whether all of them stay in
    registers. A row too wide for that goes by a tile at a time.
    """
    block = min(_WIDEST, max(256, next_power_of_2(cdiv(H, _TILES))))
    tiles = max(1, cdiv(H, block))
    return {"BLOCK": block, "TILES": tiles, "HELD": tiles <= _TILES}, block // 256
