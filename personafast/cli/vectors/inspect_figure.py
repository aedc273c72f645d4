"""`vectors inspect` as a figure: norms by block, cosines at one block."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personafast.cli.vectors.heat import COLOUR_MAP
from personafast.cli.vectors.plotting import FAINT, GRID, INK, new_figure, save_figure

# Okabe and Ito's colours without yellow, which is faint on white; with the line styles, 21 lines to tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1f2933")
STYLES = ("-", "--", ":")
CELL = 0.46  # inches


def save(facts: Mapping[str, Any], path: Path) -> None:
    """Draw what `inspect.measure` found and write it to `path` atomically."""
    names = list(facts["vectors"])
    label = 0.085 * max(len(name) for name in names) + 0.2
    square = max(CELL * len(names), 2.6)
    height = square + label + 0.85
    left, middle = 5.4, 0.9 + 2 * label
    width = left + middle + square + 1.3
    figure = new_figure(width, height)
    bottom = max(label, 0.45) + 0.15
    lines = figure.add_axes((0.75 / width, bottom / height, (left - 0.75) / width, square / height))
    cells = figure.add_axes(((left + middle) / width, bottom / height, square / width, square / height))
    scale = figure.add_axes(((left + middle + square + 0.2) / width, bottom / height, 0.16 / width, square / height))
    _draw_norms(lines, facts)
    _draw_cosines(figure, cells, scale, facts)
    for axes, title in ((lines, "Norm at every block"), (cells, f"Cosines at block {facts['block']}")):
        axes.set_title(title, loc="left", size=12, weight="bold", color=INK, pad=12)
    save_figure(figure, path)


def _draw_norms(axes: Any, facts: Mapping[str, Any]) -> None:
    """A line a vector, named at its end; a dot where it acts."""
    ends = []
    for index, (name, vector) in enumerate(facts["vectors"].items()):
        colour, style = COLOURS[index % len(COLOURS)], STYLES[index // len(COLOURS) % len(STYLES)]
        norms = vector["norms"]
        axes.plot(range(len(norms)), norms, style, color=colour, lw=1.8)
        axes.plot(vector["blocks"], [norms[block] for block in vector["blocks"]], "o", color=colour, ms=6)
        ends.append((norms[-1], name, colour))
    count = len(facts["cosines"])
    top = 1.08 * max(max(vector["norms"]) for vector in facts["vectors"].values())
    axes.set_ylim(0, top or 1)
    axes.set_xlim(-0.03 * count, count - 1 + 0.03 * count)
    # Names are put at the ends of their lines, moved apart where lines end close together.
    height = axes.get_position().height * axes.figure.get_size_inches()[1]
    apart = (top or 1) * 0.155 / height
    for place, (value, name, colour) in zip(
        _spread([end[0] for end in sorted(ends)], apart), sorted(ends), strict=True
    ):
        axes.annotate(
            name,
            (count - 1, value),
            xytext=(count - 1 + 0.07 * count, place),
            size=9,
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkA": 0, "shrinkB": 2},
        )
    axes.set_xticks(_ticks(count))
    axes.set_xlabel("block (a dot where the vector acts)", size=9.5, color=INK)
    axes.set_ylabel("Euclidean norm", size=9.5, color=INK)
    axes.grid(axis="y", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)


def _draw_cosines(figure: Any, axes: Any, scale: Any, facts: Mapping[str, Any]) -> None:
    names, table = list(facts["vectors"]), facts["cosines"][facts["block"]]
    values = [[math.nan if value is None else value for value in line] for line in table]
    image = axes.imshow(values, cmap=COLOUR_MAP, vmin=-1, vmax=1, aspect="equal")
    if len(names) <= 20:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                text = "-" if math.isnan(value) else f"{value:.2f}".replace("-0.00", "0.00")
                colour = "white" if abs(value) > 0.55 else INK
                axes.text(column, row, text, ha="center", va="center", size=7.5, color=colour)
    axes.set_xticks(range(len(names)), names, rotation=90, size=9, color=INK)
    axes.set_yticks(range(len(names)), names, size=9, color=INK)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, cax=scale, ticks=[-1, -0.5, 0, 0.5, 1])
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=9, labelcolor=INK)
    bar.set_label("cosine", size=9.5, color=INK)


def _ticks(count: int) -> list[int]:
    """At most nine round block numbers."""
    step = next(step for step in (1, 2, 4, 5, 8, 10, 20, 50, 100, 1000) if count <= 9 * step)
    return list(range(0, count, step))


def _spread(places: list[float], apart: float) -> list[float]:
    """Ascending places moved as little as needed, so that each lies at least `apart` above the one before.

    Neighbours that are too close form a group around their own mean, which grows until it meets no other.
    """
    groups: list[list[float]] = []
    for place in places:
        groups.append([place])
        while len(groups) > 1 and _bottom(groups[-1], apart) < _bottom(groups[-2], apart) + len(groups[-2]) * apart:
            last = groups.pop()
            groups[-1] += last
    return [_bottom(group, apart) + index * apart for group in groups for index in range(len(group))]


def _bottom(group: list[float], apart: float) -> float:
    return sum(group) / len(group) - (len(group) - 1) * apart / 2
