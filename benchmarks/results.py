"""Results as files: one folder a machine, one file a suite."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import machine
from benchmarks.bandwidth import reader
from benchmarks.measure import Measurement
from personafast._io import read_json, write_json

FOLDER = machine.ROOT / "benchmarks" / "results"


class Suite:
    """The records of one run of a suite, case by case.

    Args:
        name: "ops" or "decode"; the file's name.
        cases: names of all its cases, in order.
    """

    def __init__(self, name: str, cases: Iterable[str]) -> None:
        self.name = name
        self.order = list(cases)
        self.records: dict[str, dict[str, Any]] = {}

    def add(self, record: dict[str, Any]) -> None:
        self.records[record["name"]] = record

    def skip(self, case: str, why: str) -> None:
        self.add({"name": case, "skipped": why})

    def write(self, folder: Path) -> Path:
        """Write the records under `folder`, beside those of cases that this run left out.

        Raises:
            ValueError: cases were left out, and the file's records of them were measured with other versions or
                hardware.
        """
        path = folder / machine.machine_name() / f"{self.name}.json"
        head = {"suite": self.name, "hardware": machine.hardware(), "versions": machine.versions()}
        records = self.records
        if path.exists() and set(self.order) - set(records):
            before = read_json(path)
            if {key: before.get(key) for key in head} != head:
                raise ValueError(
                    f"{path}: its other cases were measured with other versions or hardware; run the whole suite"
                )
            records = {**{record["name"]: record for record in before["cases"]}, **records}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {**head, "read_method": reader().method, "cases": [*_ordered(records, self.order)]})
        return path


class Bench:
    """Measures every case once, whatever number of tests asks for it.

    Args:
        suites: where the records go, by the suite's name; filled here.
    """

    def __init__(self, suites: dict[str, Suite]) -> None:
        self._suites = suites
        self._done: dict[str, Measurement | BaseException] = {}

    def measured(self, suite: str, order: Sequence[str], name: str, measure: Callable[[], Measurement]) -> Measurement:
        """The measurement of the case `name`, by calling `measure` the first time; its error every time.

        A case that fails or is skipped gets a record without figures, which takes the place of older figures.
        """
        results = self._suites.setdefault(suite, Suite(suite, order))
        if name not in self._done:
            try:
                found = measure()
            except (Exception, pytest.skip.Exception) as error:
                self._done[name] = error
                kind = "" if isinstance(error, pytest.skip.Exception) else f"{type(error).__name__}: "
                results.skip(name, kind + str(error).partition("\n")[0])
            else:
                self._done[name] = found
                results.add(found.record)
        done = self._done[name]
        if isinstance(done, BaseException):
            raise done
        return done


def _ordered(records: Mapping[str, dict[str, Any]], order: Sequence[str]) -> list[dict[str, Any]]:
    """In the order of the registry; a case that it no longer has is dropped."""
    return [records[name] for name in order if name in records]
