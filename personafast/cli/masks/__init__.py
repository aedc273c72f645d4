"""`personafast masks`: cut persona subnetworks out of a model, compare them, look at them. One file a command."""

from __future__ import annotations

import typer

from personafast.cli.masks import build, diff, inspect

app = typer.Typer(
    help="Cut persona subnetworks out of a model, compare them, look at them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

app.command("build", epilog=build.EXAMPLE)(build.build)
app.command("diff", epilog=diff.EXAMPLE)(diff.diff)
app.command("inspect", epilog=inspect.EXAMPLE)(inspect.inspect)
