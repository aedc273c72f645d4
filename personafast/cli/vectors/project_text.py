"""Projections on a terminal: every token above its numbers, in colour where there is any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from personafast.cli.vectors.heat import heat, signed
from personafast.cli.vectors.project_rows import Row, label_of, rows_of, scale_of, shown
from personafast.cli.vectors.tables import GAP, fitting, print_grid
from personafast.vectors import Projection

LONGEST = 24
"""Characters of a token that are shown."""


def show(texts: Sequence[Projection], cosine: bool, console: Console) -> None:
    """Print the texts one below the other, each followed by its means and extremes."""
    rows = [rows_of(found, cosine) for found in texts]
    limit = scale_of([row for each in rows for row in each])
    for number, (found, each) in enumerate(zip(texts, rows, strict=True), 1):
        if len(texts) > 1:
            console.print(Text(f"Text {number} of {len(texts)}", style="bold"))
        for line in _lines(found, each, limit, console):
            console.print(line, soft_wrap=True)
        _show_summary(found, each, console)
    what = "cosine of h and v" if cosine else "h . v / |v| at the output of the block"
    blocks = sorted({row.block for each in rows for row in each})
    where = f", block {blocks[0]}" if len(blocks) == 1 else ""
    console.print(Text(f"{what}{where}; colours end at {signed(-limit)} (blue) and {signed(limit)} (red)"))


def _lines(found: Projection, rows: Sequence[Row], limit: float, console: Console) -> Iterator[Text]:
    """Strips of tokens as wide as the terminal, a line a row under each."""
    labels = [label_of(row, rows) for row in rows]
    first = max(map(cell_len, labels))
    tokens = [_cut(shown(token)) for token in found.tokens]
    numbers = [[signed(value) for value in row.values] for row in rows]
    widths = [max([cell_len(token), *(len(line[index]) for line in numbers)]) for index, token in enumerate(tokens)]
    for start, stop in fitting(widths, console.width - first):
        heading = Text(" " * first)
        for index in range(start, stop):
            heading.append(" " * GAP + _padded(tokens[index], widths[index]), style="bold")
        yield heading
        for row, label, line in zip(rows, labels, numbers, strict=True):
            under = Text(_padded(label, first, left=True))
            for index in range(start, stop):
                under.append(" " * GAP)
                under.append(_padded(line[index], widths[index]), style=heat(row.values[index], limit, console))
            yield under
        yield Text()


def _show_summary(found: Projection, rows: Sequence[Row], console: Console) -> None:
    begin = len(found.tokens) - found.response
    cells = []
    for row in rows:
        values = row.values[begin:]
        high, low = (pick(range(len(values)), key=values.__getitem__) for pick in (max, min))
        cells.append(
            [
                signed(sum(values) / len(values)),
                *(f"{signed(values[index])} {_cut(shown(found.tokens[begin + index]))}" for index in (high, low)),
            ]
        )
    whose = "the reply" if begin else "the text"
    print_grid(
        console, f"Over {whose}", "", [label_of(row, rows) for row in rows], ["mean", "highest", "lowest"], cells
    )


def _cut(token: str) -> str:
    return token if cell_len(token) <= LONGEST else f"{token[: LONGEST - 1]}\u2026"


def _padded(text: str, width: int, left: bool = False) -> str:
    spare = " " * (width - cell_len(text))
    return text + spare if left else spare + text
