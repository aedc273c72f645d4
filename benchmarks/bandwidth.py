"""How fast this machine reads memory, found by trying: the measure that kernels are held against."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from benchmarks.machine import last_level_cache


class Reader:
    """Reads one large buffer, in the way that was fastest here.

    Attributes:
        method: which of the ways it is.
        nbytes: bytes a call reads.
    """

    def __init__(self) -> None:
        self.nbytes = min(max(4 * last_level_cache(), 64 << 20), 512 << 20)
        floats = torch.empty(self.nbytes // 4).normal_()
        words = floats.view(torch.int64)
        ways: dict[str, Callable[[], object]] = {
            "sum of int64": words.sum,
            "sum of int64, row by row": lambda: words.view(256, -1).sum(1),
            "sum of float32": floats.sum,
            "largest float32, row by row": lambda: floats.view(256, -1).amax(1),
            "dot product of float32": lambda: torch.dot(floats[: floats.numel() // 2], floats[floats.numel() // 2 :]),
        }
        fastest = {name: min(_seconds(way) for _ in range(9)) for name, way in ways.items()}
        self.method = min(fastest, key=fastest.__getitem__)
        self._way = ways[self.method]

    def sample(self) -> float:
        """Seconds of one read of the whole buffer."""
        return _seconds(self._way)


@functools.cache
def reader() -> Reader:
    """The one `Reader` of this process."""
    return Reader()


def _seconds(way: Callable[[], object]) -> float:
    began = time.perf_counter()
    way()
    return time.perf_counter() - began
