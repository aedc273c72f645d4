"""Results as files: one folder a machine, one file a suite."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.bandwidth import reader
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


def _ordered(records: Mapping[str, dict[str, Any]], order: Sequence[str]) -> list[dict[str, Any]]:
    """In the order of the registry; a case that it no longer has is dropped."""
    return [records[name] for name in order if name in records]
