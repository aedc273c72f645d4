"""The demo on a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from personafast.cli.demo_text import TERMINAL_COLOURS, WHY, colours, conditions, segments, verdict


def _percent(rate: float) -> str:
    return f"{100 * rate:.0f}"


def _interval(value: Mapping[str, float]) -> str:
    return f"{_percent(value['rate'])} [{_percent(value['low'])}, {_percent(value['high'])}]"


def show(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the table, sample replies with highlighted traits, and what to conclude."""
    console = console or Console()
    chosen = result["chosen"]
    colour = colours(chosen, TERMINAL_COLOURS)

    table = Table(
        title="Replies that show each trait, in %",
        caption=conditions(result),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    table.add_column("method", no_wrap=True)
    for name in chosen:
        table.add_column(Text(name, style=f"black on {colour[name]}"), justify="right", no_wrap=True)
    table.add_column(f"all {len(chosen)}\n\\[95 %]", justify="right", no_wrap=True)
    table.add_column("grammar", justify="right", no_wrap=True)
    table.add_column("tokens\n/s", justify="right", no_wrap=True)
    table.add_column("forwards\na token", justify="right", no_wrap=True)
    for method in result["methods"]:
        table.add_row(
            method["name"],
            *(_percent(method["traits"][name]["rate"]) for name in chosen),
            _interval(method["joint"]),
            _percent(method["grammar"]),
            f"{method['tokens_per_s']:,.0f}",
            f"{method['forwards_per_token']:.2f}",
            style="bold" if method["name"] == "direct" else "",
        )
    if console.measure(table, options=console.options.update_width(1000)).maximum > console.width:
        table.padding = 0
    console.print(table)

    console.print("\nFirst replies, traits highlighted:", *_legend(colour))
    for method in result["methods"]:
        how = result["settings"]["how"][method["name"]]
        console.print(Text.assemble((method["name"], "bold"), (f"  {how}", "dim")))
        for sample in method["samples"]:
            line = Text("  ")
            for text, name in segments(sample["reply"], sample["spans"]):
                line.append(text, style=f"black on {colour[name]}" if name else "")
            shown = [name for name in chosen if sample["spans"][name]]
            line.append(f"  ({', '.join(shown) or 'none'})", style="dim")
            console.print(line, soft_wrap=not console.is_terminal)
    console.print()
    console.print(Text(verdict(result), style="bold"), soft_wrap=not console.is_terminal)
    console.print(Text(WHY), soft_wrap=not console.is_terminal)


def _legend(colour: Mapping[str, str]) -> list[Text]:
    return [Text(f" {name} ", style=f"black on {shade}") for name, shade in colour.items()]
