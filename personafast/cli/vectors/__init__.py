"""`personafast vectors`: make, convert, join and look at persona vectors. One file a command."""

from __future__ import annotations

import typer

from personafast.cli.vectors import convert

app = typer.Typer(help="Make, convert, join and look at persona vectors.", no_args_is_help=True)

app.command("convert", epilog=convert.EXAMPLE)(convert.convert)
