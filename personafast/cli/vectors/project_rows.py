"""Projections as rows of numbers under tokens, for the terminal and for the figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from personafast.vectors import Projection


class Row(NamedTuple):
    """A vector at a block: a number a token."""

    name: str
    block: int
    values: list[float]


def rows_of(found: Projection, cosine: bool) -> list[Row]:
    """Every vector at every block, vector by vector, blocks ascending."""
    source = found.cosines if cosine else found.values
    return [
        Row(name, block, source[name][:, index].tolist())
        for name, blocks in found.blocks.items()
        for index, block in enumerate(blocks)
    ]


def scale_of(rows: Sequence[Row]) -> float:
    """Where the colours saturate: 90 % of all numbers are smaller in size.

    The first token of a text often has a residual stream many times as long as all others, and would leave them pale.
    """
    values = torch.tensor([value for row in rows for value in row.values]).abs()
    return float(values.quantile(0.9)) or float(values.max()) or 1.0


def label_of(row: Row, rows: Sequence[Row]) -> str:
    """The vector's name, with the block where the rows are of different blocks."""
    if len({each.block for each in rows}) == 1:
        return row.name
    return f"{row.name} @{row.block}"


def shown(token: str) -> str:
    """A token on one line and never empty: without the space before it, line ends and tabs spelled out."""
    bare = token.strip(" ") or "\u00b7"
    return bare.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")
