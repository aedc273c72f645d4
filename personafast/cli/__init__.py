"""The command line: `personafast demo`, `generate`, `doctor`, `eval`, `vectors`, `masks` and `zoo`.

Results go to stdout, progress and notes to stderr. An error a caller can mend is one line on stderr and exit code 2.
"""

from __future__ import annotations

import os
from typing import Annotated

import typer

from personafast._version import __version__
from personafast.cli import demo, doctor, evaluate, generate, masks, vectors, zoo
from personafast.cli.errors import OneLineErrors

app = typer.Typer(
    name="personafast",
    cls=OneLineErrors,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Let a Hugging Face model speak with several personas at once.\n\n"
    "Start with `personafast demo`: it compares every method on the built-in model in under a minute, offline.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"personafast {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; may stand anywhere.")] = False,
) -> None:
    pass


app.command("demo", epilog=demo.EXAMPLE)(demo.demo)
app.command("generate", epilog=generate.EXAMPLE)(generate.generate)
app.command("doctor", epilog=doctor.EXAMPLE)(doctor.doctor)
app.add_typer(evaluate.app, name="eval")
app.add_typer(vectors.app, name="vectors")
app.add_typer(masks.app, name="masks")
app.add_typer(zoo.app, name="zoo")


def main() -> None:
    """Entry point of the `personafast` command."""
    # Read when torch loads libgomp, which no command has done yet. Threads that spin while they wait take the cores
    # from each other as soon as anything else runs: the demo was seen to take a hundred times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app()
