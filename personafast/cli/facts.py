"""Names and values on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text


def fact_table(title: str, facts: Mapping[str, Any]) -> Table:
    """A table of two columns without lines; nested values are spelled out, None reads "not installed"."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2))
    for key, value in facts.items():
        table.add_row(Text(key, style="bold"), Text(plain(value)))
    return table


def plain(value: Any) -> str:
    """A value in words."""
    if value is None:
        return "not installed"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(
            f"{key} ({plain(item)})" if isinstance(item, dict) else f"{key} {plain(item)}"
            for key, item in value.items()
        )
    return f"{value:.4g}" if isinstance(value, float) else str(value)
