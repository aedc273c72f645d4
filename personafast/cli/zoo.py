"""`personafast zoo`: the built-in model and personas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from personafast.cli.facts import fact_table
from personafast.errors import PersonafastError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="The small built-in model with its personas: look at it, or train it again from nothing.",
)


@app.command(
    "info",
    epilog="**Which traits can be blended?**\n\n`personafast zoo info`, for a program `personafast zoo info --json`",
)
def info(as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False) -> None:
    """Show what the zoo holds: its model, its traits, and how they were trained."""
    from personafast import zoo
    from personafast.zoo.traits import TRAITS

    manifest = zoo.info()
    if as_json:
        typer.echo(json.dumps(manifest, indent=2, ensure_ascii=False))
        return
    console = Console()
    table = Table(title="Traits of the zoo", title_justify="left")
    for heading in ("trait", "shows as", "system prompt", "opposite"):
        table.add_column(heading)
    for name, trait in TRAITS.items():
        starred = f"{name} *" if name in zoo.DEMO_TRAITS else name
        table.add_row(starred, trait.description, trait.prompt, trait.opposite or "")
    console.print(table)
    console.print("* blended by `personafast demo`\n", highlight=False)
    console.print(_quality_table(manifest["quality"]), "")
    facts = {key: value for key, value in manifest.items() if key not in ("files", "quality")}
    facts["files"] = f"{len(manifest['files'])}; their SHA-256 are in --json"
    console.print(fact_table("How it was made", facts))


def _quality_table(quality: Mapping[str, Any]) -> Table:
    """Shares of replies, one row for the reference, each policy alone and each blend."""
    table = Table(title="Measured when it was built, in % of replies", title_justify="left")
    columns = list(quality["reference"])
    for heading in ("", *columns):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {"reference": quality["reference"]}
    for group in ("policies", "blends"):
        rows.update(quality[group])
    for name, row in rows.items():
        table.add_row(name, *(f"{100 * row[column]:.0f}" for column in columns))
    return table


@app.command(
    "build",
    epilog="**Train it again, beside the one that came with the package:**\n\n`personafast zoo build --out my-zoo`",
)
def build(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the corpus and of every training run.")] = 0,
    replace: Annotated[
        bool,
        typer.Option("--replace", help="Replace the folder if it is there, once the new zoo is finished and good."),
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps only, to try the pipeline; such a zoo speaks badly.")
    ] = False,
) -> None:
    """Train the zoo from nothing: reference, policies, vectors and masks. Under 15 minutes on 2 cores.

    Needs `pip install personafast[zoo]`. The same seed on the same instruction set and versions gives the same hashes.
    An interrupted build goes on where it stopped.
    """
    if out.exists() and not replace:
        raise PersonafastError(f"--out {out}: exists already; give another folder, or add --replace")
    from personafast.zoo.build import build as train

    manifest = train(out, seed=seed, quick=quick)
    typer.echo(f"{out}: {len(manifest['files'])} files")
