"""Help teaches, the page of the command line is complete, and the commands start as a user starts them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from personafast import __version__
from personafast.cli import app

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"


def commands():
    top = get_command(app)
    for name, command in top.commands.items():
        for inner, leaf in getattr(command, "commands", {"": command}).items():
            yield f"{name} {inner}".strip(), leaf


@pytest.mark.parametrize(("name", "command"), list(commands()))
def test_help_says_what_it_does_and_shows_an_example(cli, name, command):
    result = cli(*name.split(), "--help")
    assert result.exit_code == 0
    assert f"personafast {name}" in re.sub(r"\s+", " ", result.stdout.partition("─╯")[2])
    for option in command.params:
        assert getattr(option, "help", None), f"{name}: {option.name} has no help"


def test_the_page_names_every_command_and_option():
    page = PAGE.read_text(encoding="utf-8")
    for name, command in commands():
        assert f"personafast {name}" in page
        for option in command.params:
            for spelling in option.opts:
                assert spelling == "--help" or f"`{spelling}" in page or f" {spelling} " in page, f"{name} {spelling}"


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "personafast", *arguments], capture_output=True, text=True)


def test_the_module_runs_as_a_program():
    found = run("--version")
    assert (found.returncode, found.stdout.strip()) == (0, f"personafast {__version__}")
    refused = run("generate", "--prompt", "")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.splitlines() == ["error: --prompt: the prompt is empty; say what the user asks"]
