"""Steering as it is done by hand: plain forward hooks that add a vector to the rows of a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from personafast.models.anatomy import anatomy


@contextlib.contextmanager
def adding(net: Any, rows: Sequence[Mapping[int, torch.Tensor] | None]) -> Iterator[None]:
    """Add at each block's output what `rows`, block -> [H], says for each row; beams repeat a row in place."""

    def hook(block: int) -> Any:
        def add(_: Any, __: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            times = hidden.shape[0] // len(rows)
            steered = [row[block] if row and block in row else None for row in rows for _ in range(times)]
            changed = torch.stack(
                [one if vector is None else one + vector for one, vector in zip(hidden, steered, strict=True)]
            )
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return add

    hooks = [block.register_forward_hook(hook(index)) for index, block in enumerate(anatomy(net).blocks)]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


def by_blocks(library: Any, weights: Mapping[str, float]) -> dict[int, torch.Tensor]:
    """Block -> the sum of some vectors of a library with these weights."""
    found: dict[int, torch.Tensor] = {}
    for name, weight in weights.items():
        vector = library.vectors[name]
        for block in vector.blocks:
            found[block] = found.get(block, 0) + weight * vector.directions[block]
    return found
