"""What the figures of `personafast vectors` share."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path
from typing import Any

from personafast._io import atomic_path
from personafast.errors import PersonafastError

INK, FAINT, GRID = "#1f2933", "#8a94a0", "#e3e7eb"
DPI = 150


def check_plot(path: Path | None) -> None:
    """Refuse a `--plot` that could not be written, before anything is computed.

    Raises:
        PersonafastError: no matplotlib, no such folder, or a name that does not end in .png.
    """
    if path is None:
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise PersonafastError(f"--plot {path}: matplotlib is missing; pip install 'personafast[eval]' brings it")
    if path.suffix.lower() != ".png":
        raise PersonafastError(f"--plot {path}: the figure is a PNG; give a name that ends in .png")
    if not path.parent.is_dir():
        raise PersonafastError(f"--plot {path}: the folder {path.parent} does not exist; make it first")


def new_figure(width: float, height: float) -> Any:
    """An empty white figure of that many inches, drawn without a display and without matplotlib's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Write the figure as a PNG, atomically. A token in a script that matplotlib's font lacks is drawn as a box."""
    with atomic_path(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(temporary, format="png")
