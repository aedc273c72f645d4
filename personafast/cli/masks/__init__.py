"""`personafast masks`: cut persona subnetworks out of a model, compare them, make checkpoints of them."""

from __future__ import annotations

import typer

from personafast.cli.masks import apply, build, diff, import_, inspect

app = typer.Typer(
    help="Cut persona subnetworks out of a model, compare them, make checkpoints of them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

app.command("build", epilog=build.EXAMPLE)(build.build)
app.command("import", epilog=import_.EXAMPLE)(import_.import_)
app.command("apply", epilog=apply.EXAMPLE)(apply.apply)
app.command("diff", epilog=diff.EXAMPLE)(diff.diff)
app.command("inspect", epilog=inspect.EXAMPLE)(inspect.inspect)
