"""The demo as a figure."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personafast._io import atomic_path
from personafast.cli.demo_text import FIGURE_COLOURS, WHY, colours, conditions, segments, verdict

WIDTH = 14.0  # inches
CHARACTERS = 160  # a line of sample text
LINE = 0.19  # inches, the height of such a line
INK, FAINT, ACCENT = "#1f2933", "#8a94a0", "#1c5fa8"


def save(result: Mapping[str, Any], path: Path) -> None:
    """Draw the table and the sample replies, and write them to `path` atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = _sample_lines(result)
    methods = result["methods"]
    table_height = 0.36 * len(methods)
    text_height = LINE * (len(lines) + 1)
    top, gap, bottom = 1.35, 0.75, 0.95
    height = top + table_height + gap + text_height + bottom
    figure = Figure(figsize=(WIDTH, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)

    chosen = result["chosen"]
    colour = colours(chosen, FIGURE_COLOURS)
    y = (bottom + text_height + gap) / height
    extent = table_height / height
    grid = figure.add_axes((0.085, y, 0.4, extent))
    joint = figure.add_axes((0.5, y, 0.26, extent), sharey=grid)
    cost = figure.add_axes((0.775, y, 0.2, extent), sharey=grid)
    _draw_shares(grid, methods, chosen, colour)
    _draw_joint(joint, methods, len(chosen))
    _draw_cost(cost, methods)

    figure.text(0.02, 1 - 0.32 / height, "Which traits does a reply show?", size=16, weight="bold", color=INK)
    figure.text(0.02, 1 - 0.62 / height, verdict(result), size=11, color=INK)
    words = figure.add_axes((0.02, bottom / height, 0.96, text_height / height))
    _draw_lines(words, lines, colour)
    foot = [conditions(result), *textwrap.wrap(WHY, 170)]
    figure.text(0.02, 0.2 / height, "\n".join(foot), size=9, color=INK, va="bottom", linespacing=1.45)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _draw_shares(axes: Any, methods: list[dict[str, Any]], chosen: list[str], colour: Mapping[str, str]) -> None:
    """One cell a method and trait, filled from the left by the share."""
    for row, method in enumerate(methods):
        for column, name in enumerate(chosen):
            rate = method["traits"][name]["rate"]
            axes.barh(row, 0.94, left=column + 0.03, height=0.76, color="#f1f3f5")
            axes.barh(row, 0.94 * rate, left=column + 0.03, height=0.76, color=colour[name])
            axes.text(column + 0.5, row, f"{100 * rate:.0f} %", ha="center", va="center", size=9, color=INK)
    axes.set_xlim(0, len(chosen))
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_xticks([column + 0.5 for column in range(len(chosen))], chosen, size=10, weight="bold", color=INK)
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(methods)), [method["name"] for method in methods], size=10.5, color=INK)
    for label in axes.get_yticklabels():
        label.set_weight("bold" if label.get_text() == "direct" else "normal")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_joint(axes: Any, methods: list[dict[str, Any]], traits: int) -> None:
    """Joint rate with its Wilson interval, and the grammar check as an open mark."""
    for row, method in enumerate(methods):
        value, shade = method["joint"], ACCENT if method["name"] == "direct" else INK
        axes.plot([100 * value["low"], 100 * value["high"]], [row, row], color=shade, lw=2.2, solid_capstyle="butt")
        axes.plot(
            100 * value["rate"], row, "o", color=shade, ms=6, clip_on=False, label="all traits" if not row else None
        )
        axes.plot(
            100 * method["grammar"], row, "|", color="#c2452d", ms=11, mew=2, clip_on=False,
            label="grammar" if not row else None,
        )  # fmt: skip
    axes.set_xlim(-2, 102)
    axes.set_xticks(range(0, 101, 25), [f"{tick} %" for tick in range(0, 101, 25)], size=9, color=FAINT)
    axes.grid(axis="x", color="#e3e7eb", lw=0.8)
    axes.set_axisbelow(True)
    axes.set_title(f"all {traits} traits at once (95 % interval)", size=10, weight="bold", color=INK, pad=8)
    axes.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=2, frameon=False, fontsize=9, handletextpad=0.4,
        labelcolor=INK,
    )  # fmt: skip
    axes.tick_params(length=0, labelleft=False)
    axes.spines[:].set_visible(False)


def _draw_cost(axes: Any, methods: list[dict[str, Any]]) -> None:
    """Forwards per token and speed, in figures: their scales differ too much for one axis."""
    axes.set_xlim(0, 1)
    for title, side in (("forwards a token", "left"), ("tokens/s", "right")):
        axes.set_title(title, size=10, weight="bold", color=INK, pad=8, loc=side)
    widest = max(method["forwards_per_token"] for method in methods)
    for row, method in enumerate(methods):
        forwards = method["forwards_per_token"]
        axes.barh(row, 0.5 * forwards / widest, height=0.5, color="#d9dfe5")
        axes.text(0.02, row, f"{forwards:.2f}", va="center", size=9, color=INK)
        axes.text(1, row, f"{method['tokens_per_s']:,.0f}", ha="right", va="center", size=9, color=INK)
    axes.set_xticks([])
    axes.tick_params(length=0, labelleft=False)
    axes.spines[:].set_visible(False)


def _sample_lines(result: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str | None]]]]:
    """The sample replies as lines of at most `CHARACTERS`: (method name or "", [(word, trait or None)])."""
    lines: list[tuple[str, list[tuple[str, str | None]]]] = []
    for method in result["methods"]:
        label = method["name"]
        for sample in method["samples"]:
            line: list[tuple[str, str | None]] = []
            used = 0
            for text, name in segments(sample["reply"], sample["spans"]):
                for word in re.findall(r"\S+\s*|\s+", text):
                    if used + len(word.rstrip()) > CHARACTERS:
                        lines.append((label, line))
                        label, line, used = "", [("  ", None)], 2
                    line.append((word, name))
                    used += len(word)
            lines.append((label, line))
            label = ""
    return lines


def _draw_lines(axes: Any, lines: list[tuple[str, list[tuple[str, str | None]]]], colour: Mapping[str, str]) -> None:
    """Monospaced words, each put where the characters before it end: the renderer rounds advances within a text."""
    margin = 12
    axes.set_xlim(0, CHARACTERS + margin)
    axes.set_ylim(len(lines), -1)
    axes.axis("off")
    axes.text(0, -0.7, "First replies of each method", size=10, weight="bold", color=INK, va="center")
    inches = axes.get_position().width * WIDTH / (CHARACTERS + margin)
    size = inches * 72 / 0.602  # points at which DejaVu Sans Mono is one unit of the axis wide
    for row, (label, line) in enumerate(lines):
        y = row + 0.5
        axes.text(0, y, label, size=9, color=ACCENT if label == "direct" else INK, va="center_baseline", weight="bold")
        x = margin
        for name, run in itertools.groupby(line, key=lambda word: word[1]):
            words = [word for word, _ in run]
            if name is not None:
                axes.barh(y, len("".join(words).rstrip()), left=x, height=0.84, color=colour[name])
            for word in words:
                axes.text(x, y, word.rstrip(), size=size, family="DejaVu Sans Mono", color=INK, va="center_baseline")
                x += len(word)
