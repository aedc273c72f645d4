"""`personafast masks diff`: in what two masks of a library differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personafast.cli.masks.common import mask_of
from personafast.errors import PersonafastError

if TYPE_CHECKING:
    from personafast.masks import ModuleDifference

EXAMPLE = (
    "**Where do two opposing masks part?**\n\n"
    "`personafast masks diff seek reject --library my-masks --plot parting.png`"
)


def diff(
    first: Annotated[str, typer.Argument(help="A mask of the library.")],
    second: Annotated[str, typer.Argument(help="Another one.")],
    library: Annotated[Path, typer.Option(help="Library folder.")],
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw blocks against modules to this PNG; needs `pip install 'personafast[eval]'`."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show in what share of each module's weights two masks differ."""
    import importlib.util

    from personafast.library import PersonaLibrary
    from personafast.masks import differences

    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise PersonafastError("--plot: the package matplotlib is missing; pip install 'personafast[eval]'")
    found = PersonaLibrary.from_pretrained(library)
    rows = differences(mask_of(found, first, library), mask_of(found, second, library))
    if plot is not None:
        from personafast.cli.masks.figure import save

        save(rows, first, second, plot)
    if as_json:
        facts = {"first": first, "second": second, **_facts(rows)}
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    _print(rows, first, second)
    if plot is not None:
        typer.echo(f"figure: {plot}", err=True)


def _facts(rows: list[ModuleDifference]) -> dict[str, Any]:
    from personafast.masks.report import totals

    def one(row: ModuleDifference) -> dict[str, Any]:
        return {
            "weights": row.weights,
            "kept": [row.first / row.weights, row.second / row.weights],
            "differ": row.share,
            "jaccard": row.jaccard,
        }

    return {
        "total": {row.path: one(row) for row in totals(rows)},
        "modules": [{"path": row.path, "block": row.block, "module": row.name, **one(row)} for row in rows],
    }


def _print(rows: list[ModuleDifference], first: str, second: str) -> None:
    from rich.console import Console
    from rich.table import Table

    from personafast.masks.report import totals

    table = Table(title=f"{first} and {second}, in % of weights", title_justify="left")
    table.add_column("module", overflow="fold")
    for heading in (f"{first} keeps", f"{second} keeps", "differ", "Jaccard"):
        table.add_column(heading, justify="right")
    for index, row in enumerate([*rows, *totals(rows)]):
        shares = (f"{100 * part / row.weights:.2f}" for part in (row.first, row.second))
        last = index == len(rows) - 1
        table.add_row(row.path, *shares, f"{100 * row.share:.3f}", f"{row.jaccard:.4f}", end_section=last)
    Console().print(table)
