"""Signed numbers as colours, on a terminal and in a figure: blue below zero, red above, nothing at zero."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text

COLOUR_MAP = "RdBu_r"
"""matplotlib's name of the map; red and blue that readers with any common colour blindness tell apart."""

_BELOW = ("#d3e6f2", "#a5cee3", "#6baed6")
_ABOVE = ("#fbdccb", "#f6b799", "#ee8a68")


def heat(value: float, limit: float) -> Style:
    """Black on a shade of the value's sign, in three steps up to `limit`; plain below a sixth of it."""
    step = round(3 * min(abs(value) / limit, 1.0)) if limit > 0 else 0
    if step == 0:
        return Style()
    return Style(color="#000000", bgcolor=(_ABOVE if value > 0 else _BELOW)[step - 1])


def signed(value: float) -> str:
    """A number of at most three figures, with its sign: +0.12, -3.4, +25, -1300."""
    for digits, below in ((2, 0.995), (1, 9.95)):
        if abs(value) < below:
            return f"{value:+.{digits}f}"
    return f"{value:+.0f}"


def cosine_cell(cosine: float | None) -> Text:
    """A cosine for a table, on its shade; a dash where it is not defined."""
    return Text("-") if cosine is None else Text(f"{cosine:+.2f}", style=heat(cosine, 1.0))
