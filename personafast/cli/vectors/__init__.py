"""`personafast vectors`: make, convert, join and look at persona vectors. One file a command."""

from __future__ import annotations

import typer

from personafast.cli.vectors import blend, convert, extract, inspect, project

app = typer.Typer(
    help="Make, convert, join and look at persona vectors.", no_args_is_help=True, rich_markup_mode="markdown"
)
app.command("extract", epilog=extract.EXAMPLE)(extract.extract)
app.command("blend", epilog=blend.EXAMPLE)(blend.blend)
app.command("convert", epilog=convert.EXAMPLE)(convert.convert)
app.command("inspect", epilog=inspect.EXAMPLE)(inspect.inspect)
app.command("project", epilog=project.EXAMPLE)(project.project)
