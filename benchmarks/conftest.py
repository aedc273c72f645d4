"""Options, the measuring itself, the summary at the end, and the results' files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.machine import require_passive_waiting

try:
    require_passive_waiting()
except RuntimeError as error:
    pytest.exit(str(error), returncode=4)

from benchmarks.results import Bench, Suite  # noqa: E402 - imports torch, which has to find the policy set
from benchmarks.summary import summary  # noqa: E402

SUITES = pytest.StashKey[dict[str, Suite]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("personafast benchmarks")
    group.addoption(
        "--bench-seconds", type=float, default=1.5, metavar="S", help="about how long each case is timed (default 1.5)"
    )
    group.addoption(
        "--bench-tokens", type=int, default=16, metavar="N", help="new tokens timed when decoding (default 16)"
    )
    group.addoption(
        "--bench-rounds", type=int, default=5, metavar="N", help="rounds of the cases that decode (default 5)"
    )
    group.addoption(
        "--bench-results", type=Path, metavar="DIR", help="write the results under DIR; without it no file is written"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SUITES] = {}


@pytest.fixture(scope="session")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    yield Bench(request.config.stash[SUITES])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    folder = config.getoption("--bench-results", None)
    for suite in config.stash[SUITES].values():
        for line in summary(suite):
            terminalreporter.write_line(line)
        if folder is not None and suite.records:
            try:
                terminalreporter.write_line(f"written to {suite.write(folder)}")
            except ValueError as error:
                terminalreporter.write_line(f"not written: {error}", red=True)
