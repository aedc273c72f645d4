"""`vectors project` as a figure: strips of tokens, a row a vector or block, coloured by projection."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from personafast.cli.vectors.heat import COLOUR_MAP
from personafast.cli.vectors.plotting import INK, new_figure, save_figure
from personafast.cli.vectors.project_rows import Row, rows_of, scale_of, shown
from personafast.errors import PersonafastError
from personafast.vectors import Projection

STRIP = 28  # tokens beside each other
CELL, LINE = 0.4, 0.28  # inches, width and height of a cell
TALLEST = 100.0  # inches; a PNG of that height is still opened everywhere
LONGEST = 14  # characters of a token that are shown


class _Panel:
    """Some tokens of a text, under them the rows of one group."""

    def __init__(
        self, title: str, labels: Sequence[str], rows: Sequence[Row], tokens: Sequence[str], start: int
    ) -> None:
        self.title, self.labels = title, labels
        self.tokens = [_cut(shown(token)) for token in tokens[start : start + STRIP]]
        self.values = [row.values[start : start + STRIP] for row in rows]
        self.above = 0.075 * max(map(len, self.tokens)) + 0.12
        self.heading = 0.34 if title else 0.0

    @property
    def height(self) -> float:
        return self.heading + self.above + LINE * len(self.labels) + 0.18


def save(texts: Sequence[Projection], cosine: bool, path: Path) -> None:
    """Draw tokens x vectors where all rows are of one block, else tokens x blocks for every vector.

    Raises:
        PersonafastError: more strips than fit a figure.
    """
    rows = [rows_of(found, cosine) for found in texts]
    limit = scale_of([row for each in rows for row in each])
    panels = [
        panel
        for number, (found, each) in enumerate(zip(texts, rows, strict=True), 1)
        for panel in _panels(found, each, f"text {number}" if len(texts) > 1 else "")
    ]
    top, bottom, right = 0.55, 0.85, 0.3
    left = 0.35 + 0.085 * max(len(label) for panel in panels for label in panel.labels)
    columns = max(len(panel.tokens) for panel in panels)
    width = max(left + CELL * columns + right, 6.0)
    height = top + sum(panel.height for panel in panels) + bottom
    if height > TALLEST:
        raise PersonafastError(
            f"--plot {path}: {len(panels)} strips of tokens do not fit a figure; give fewer texts, vectors or blocks"
        )
    figure = new_figure(width, height)
    what = "Cosine of every token with the persona's direction" if cosine else "Projection of every token, h · v / |v|"
    blocks = sorted({row.block for each in rows for row in each})
    where = f", block {blocks[0]}" if len(blocks) == 1 else ""
    figure.text(left / width, 1 - 0.3 / height, what + where, size=12, weight="bold", color=INK, va="center")
    y, image = height - top, None
    for panel in panels:
        y -= panel.height
        box = (left / width, (y + 0.18) / height, CELL * len(panel.tokens) / width, LINE * len(panel.labels) / height)
        image = _draw(figure.add_axes(box), panel, limit, height)
    scale = figure.add_axes((left / width, 0.5 / height, 3.2 / width, 0.13 / height))
    bar = figure.colorbar(image, cax=scale, orientation="horizontal", extend="both", ticks=[-limit, 0, limit])
    bar.ax.set_xticklabels([f"{-limit:.2g}", "0", f"{limit:.2g}"], size=8.5, color=INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0)
    unit = "cosine" if cosine else "in units of the residual stream"
    note = f"{unit}; 90 % of the numbers lie between the ends"
    scale.text(1.06, 0.5, note, transform=scale.transAxes, size=8.5, color=INK, va="center")
    save_figure(figure, path)


def _panels(found: Projection, rows: Sequence[Row], text: str) -> list[_Panel]:
    if len({row.block for row in rows}) == 1:
        groups = [("", [row.name for row in rows], list(rows))]
    else:
        groups = [
            (
                name,
                [f"block {row.block}" for row in rows if row.name == name],
                [row for row in rows if row.name == name],
            )
            for name in found.blocks
        ]
    panels = []
    for name, labels, group in groups:
        for start in range(0, len(found.tokens), STRIP):
            title = ", ".join(part for part in (text, name) if part) if start == 0 else ""
            # Highest block on top, as a stack of layers is drawn.
            turn = slice(None, None, -1 if name else 1)
            panels.append(_Panel(title, labels[turn], group[turn], found.tokens, start))
    return panels


def _draw(axes: Any, panel: _Panel, limit: float, height: float) -> Any:
    image = axes.imshow(panel.values, cmap=COLOUR_MAP, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set_xticks(range(len(panel.tokens)), panel.tokens, rotation=90, size=8.5, color=INK)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(panel.labels)), panel.labels, size=9, color=INK)
    axes.set_xticks([place - 0.5 for place in range(1, len(panel.tokens))], minor=True)
    axes.set_yticks([place - 0.5 for place in range(1, len(panel.labels))], minor=True)
    axes.grid(which="minor", color="white", lw=1.0)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if panel.title:
        up = (panel.above + 0.17) / (LINE * len(panel.labels))
        axes.text(0, 1 + up, panel.title, transform=axes.transAxes, size=10, weight="bold", color=INK, va="center")
    return image


def _cut(token: str) -> str:
    # Two "$" in a label would be taken for mathematics.
    cut = token if len(token) <= LONGEST else f"{token[: LONGEST - 1]}\u2026"
    return cut.replace("$", r"\$")
