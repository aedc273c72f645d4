"""One line for every error a caller can mend."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from personafast.errors import PersonafastError

USAGE_ERROR = 2


def one_line(error: Exception) -> str:
    """The message of `error` on one line, with the file in front where it is about a file."""
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror.lower()}; check the path and its permissions"
    text = error.format_message() if isinstance(error, typer.BadParameter) else str(error)
    return " ".join(text.split())


class OneLineErrors(TyperGroup):
    """A command group that turns what the caller can mend into one line on stderr and exit code 2.

    That is `PersonafastError`, `OSError`, and a value that is missing, out of range or of another type. Anything
    else is a defect of ours and keeps its traceback. `--debug`, anywhere on the line, keeps them all.
    """

    _debug = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take `--debug` out of the arguments of any command."""
        self._debug = "--debug" in args
        return super().parse_args(ctx, [arg for arg in args if arg != "--debug"])

    def invoke(self, ctx: Any) -> Any:
        """Run the command, and report what the caller can mend."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise
        except (PersonafastError, OSError, typer.BadParameter) as error:
            if self._debug:
                raise
            typer.echo(f"error: {one_line(error)}", err=True)
            raise typer.Exit(USAGE_ERROR) from None
