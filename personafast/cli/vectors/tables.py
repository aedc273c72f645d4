"""Tables that stay readable in a narrow terminal: columns that do not fit go into a table below."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

GAP = 2


def print_grid(
    console: Console,
    title: str,
    corner: str,
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[str | Text]],
) -> None:
    """Print cells [rows][columns] with their labels, in as many tables one below the other as the width asks for."""
    first = max(cell_len(label) for label in (corner, *rows))
    widths = [
        max([cell_len(name), *(cell_len(str(line[index])) for line in cells)]) for index, name in enumerate(columns)
    ]
    for start, stop in fitting(widths, console.width - first):
        console.print(Text(title if start == 0 else f"{title}, continued", style="bold"))
        table = Table(
            box=box.SIMPLE_HEAD,
            show_edge=False,
            pad_edge=False,
            padding=(0, GAP - 1, 0, 0),  # the box adds one
        )
        table.add_column(Text(corner), no_wrap=True)
        for name in columns[start:stop]:
            table.add_column(Text(name), justify="right", no_wrap=True)
        for label, line in zip(rows, cells, strict=True):
            table.add_row(Text(label), *(Text(cell) if isinstance(cell, str) else cell for cell in line[start:stop]))
        console.print(table)
        console.print()


def fitting(widths: Sequence[int], room: int) -> Iterator[tuple[int, int]]:
    """Cut columns into runs (start, stop) whose widths, with a gap before each, fit into `room`; at least one a run."""
    start = used = 0
    for index, width in enumerate(widths):
        if index > start and used + GAP + width > room:
            yield start, index
            start, used = index, 0
        used += GAP + width
    if widths:
        yield start, len(widths)
