"""The difference of two masks as a picture: blocks against modules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from personafast._io import atomic_path

if TYPE_CHECKING:
    from personafast.masks import ModuleDifference

INK, FAINT = "#1f2933", "#8a94a0"


def save(rows: Sequence[ModuleDifference], first: str, second: str, path: Path) -> None:
    """Draw the share of weights in which two masks differ, one cell a block and module, to `path` atomically.

    The experts of a block share a cell.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from personafast.masks.report import summed

    blocks = sorted({row.block for row in rows})
    names = list(dict.fromkeys(row.name for row in rows))
    cells = np.full((len(names), len(blocks)), np.nan)
    for y, name in enumerate(names):
        for x, block in enumerate(blocks):
            here = [row for row in rows if row.name == name and row.block == block]
            if here:
                cells[y, x] = 100 * summed(here).share
    label = max(len(name) for name in names) * 0.085
    width, height = label + max(4.2, 0.46 * len(blocks)) + 1.4, 0.42 * len(names) + 1.75
    figure = Figure(figsize=(width, height), dpi=150, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((
        (label + 0.3) / width, 0.62 / height, (width - label - 1.6) / width, 0.42 * len(names) / height,
    ))  # fmt: skip
    top = float(np.nanmax(cells)) or 1.0
    image = axes.imshow(cells, aspect="auto", cmap="Blues", vmin=0, vmax=top)
    figures = len(blocks) <= 40
    for y in range(len(names)):
        for x in range(len(blocks)):
            if figures and np.isfinite(cells[y, x]):
                shade = "white" if cells[y, x] > 0.6 * top else INK
                axes.text(x, y, f"{cells[y, x]:.1f}", ha="center", va="center", size=7, color=shade)
    axes.set_yticks(range(len(names)), names, size=9, color=INK)
    step = max(1, len(blocks) // 16)
    axes.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]], size=9, color=INK)
    axes.set_xlabel("block", size=9, color=FAINT)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.add_axes(((width - 1.15) / width, 0.62 / height, 0.16 / width, 0.42 * len(names) / height))
    scale = figure.colorbar(image, cax=bar)
    scale.outline.set_visible(False)
    scale.ax.tick_params(length=0, labelsize=8, labelcolor=FAINT)
    scale.ax.set_ylabel("% of weights", size=8, color=FAINT)
    total = summed(list(rows))
    head = f"Where {first} and {second} differ"
    figure.text(0.3 / width, 1 - 0.38 / height, head, size=12, weight="bold", color=INK)
    figure.text(
        0.3 / width, 1 - 0.68 / height,
        f"{100 * total.share:.2f} % of all weights are kept by only one of them; Jaccard {total.jaccard:.3f}",
        size=9, color=INK,
    )  # fmt: skip
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
