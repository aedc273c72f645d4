"""Signed numbers as colours, on a terminal and in a figure: blue below zero, red above, nothing at zero."""

from __future__ import annotations

from rich.console import Console
from rich.style import Style
from rich.text import Text

COLOUR_MAP = "RdBu_r"
"""matplotlib's name of the map; red and blue that readers with any common colour blindness tell apart."""

_BELOW = ("#d3e6f2", "#a5cee3", "#6baed6")
_ABOVE = ("#fbdccb", "#f6b799", "#ee8a68")
# Of 16 colours the nearest to those would be grey on either side.
_BELOW_OF_16 = ("bright_cyan", "cyan", "bright_blue")
_ABOVE_OF_16 = ("bright_yellow", "yellow", "bright_red")


def heat(value: float, limit: float, console: Console) -> Style:
    """Black on a shade of the value's sign, in three steps up to `limit`; plain below a sixth of it."""
    step = round(3 * min(abs(value) / limit, 1.0)) if limit > 0 else 0
    if step == 0:
        return Style()
    few = console.color_system in ("standard", "windows")
    above, below = (_ABOVE_OF_16, _BELOW_OF_16) if few else (_ABOVE, _BELOW)
    return Style(color="black", bgcolor=(above if value > 0 else below)[step - 1])


def signed(value: float) -> str:
    """A number of at most three figures, with its sign: +0.12, -3.4, +25, -1300."""
    for digits, below in ((2, 0.995), (1, 9.95)):
        if abs(value) < below:
            return f"{value:+.{digits}f}"
    return f"{value:+.0f}"


def cosine_cell(cosine: float | None, console: Console) -> Text:
    """A cosine for a table, on its shade; a dash where it is not defined."""
    return Text("-") if cosine is None else Text(f"{cosine:+.2f}", style=heat(cosine, 1.0, console))
