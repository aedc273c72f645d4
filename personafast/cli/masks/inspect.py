"""`personafast masks inspect`: what the masks of a library keep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personafast.cli.masks.common import mask_of

if TYPE_CHECKING:
    from personafast.masks import PersonaMask

EXAMPLE = "**How much of each module does a mask keep?**\n\n`personafast masks inspect --library my-masks seek`"


def inspect(
    library: Annotated[Path, typer.Option(help="Library folder.")],
    name: Annotated[str | None, typer.Argument(help="A mask; without one, every mask gets a line.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what share of each module's weights a mask keeps, and its bytes in memory and on disk.

    On disk, masks that differ little share a base: a mask's own bytes are what it adds to the library.
    """
    from personafast.library import PersonaLibrary
    from personafast.masks.storage import stored_bytes

    found = PersonaLibrary.from_pretrained(library)
    masks = {name: mask_of(found, name, library)} if name is not None else dict(sorted(found.masks.items()))
    on_disk, base = stored_bytes(library)
    facts = {
        key: {**_facts(mask, name is not None), "disk_bytes": on_disk.get(key, 0), "base_bytes": base}
        for key, mask in masks.items()
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
    elif name is not None:
        _print_one(name, facts[name])
    else:
        _print_all(facts, library)


def _facts(mask: PersonaMask, modules: bool) -> dict[str, Any]:
    from personafast.masks import shares

    rows = shares(mask)
    facts: dict[str, Any] = {
        "kept": mask.kept,
        "linears": len(rows),
        "weights": sum(row.weights for row in rows),
        "bytes": sum(row.nbytes for row in rows),
        "gamma": mask.gamma,
        "made": dict(mask.metadata),
    }
    if modules:
        facts["modules"] = [
            {"path": row.path, "block": row.block, "module": row.name, "kept": row.share, "weights": row.weights,
             "bytes": row.nbytes}
            for row in rows
        ]  # fmt: skip
    return facts


def _print_one(name: str, facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from personafast.cli.facts import fact_table

    console = Console()
    table = Table(title=f"What {name} keeps", title_justify="left")
    for heading in ("module", "kept, %", "weights", "bytes"):
        table.add_column(heading, justify="left" if heading == "module" else "right", overflow="fold")
    for row in facts["modules"]:
        table.add_row(row["path"], f"{100 * row['kept']:.2f}", f"{row['weights']:,}", f"{row['bytes']:,}")
    table.add_section()
    table.add_row("all", f"{100 * facts['kept']:.2f}", f"{facts['weights']:,}", f"{facts['bytes']:,}")
    console.print(table)
    console.print(_on_disk([facts]))
    console.print(fact_table("How it was made", facts["made"]))


def _print_all(facts: dict[str, Any], library: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    from personafast.cli.facts import plain

    table = Table(title=f"Masks of {library}", title_justify="left")
    for heading in ("mask", "kept, %", "linears", "bytes", "on disk", "made by"):
        table.add_column(heading, justify="left" if heading in ("mask", "made by") else "right")
    for name, row in facts.items():
        kept = f"{100 * row['kept']:.2f}"
        sizes = f"{row['bytes']:,}", f"{row['disk_bytes']:,}"
        table.add_row(name, kept, str(row["linears"]), *sizes, plain(row["made"]))
    Console().print(table)
    if facts:
        Console().print(_on_disk(list(facts.values())))


def _on_disk(facts: list[dict[str, Any]]) -> str:
    base, count = facts[0]["base_bytes"], len(facts)
    added = sum(row["disk_bytes"] for row in facts) / count
    # Theirs hold a bool, one byte a weight.
    theirs = sum(row["weights"] for row in facts) / count
    shared = f"{base:,} bytes of the base that masks share, and " if base else ""
    times = f" ({theirs / added:.0f} times that in the authors' files)" if added else ""
    return f"On disk: {shared}{added:,.0f} bytes a mask{times}"
