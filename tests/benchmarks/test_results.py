import json

import pytest

from benchmarks import machine
from benchmarks.check import CheckFailed
from benchmarks.measure import Measurement
from benchmarks.results import Bench, Suite


@pytest.fixture(autouse=True)
def _one_machine(monkeypatch):
    monkeypatch.setattr(machine, "machine_name", lambda: "here")
    monkeypatch.setattr("benchmarks.results.reader", lambda: type("Reader", (), {"method": "sum"}))


def suite(**records):
    made = Suite("ops", ["a", "b", "c"])
    for name, value in records.items():
        made.add({"name": name, "value": value})
    return made


def cases(path):
    return {case["name"]: case.get("value") for case in json.loads(path.read_text())["cases"]}


def test_a_file_a_machine_and_suite_in_the_order_of_the_registry(tmp_path):
    path = suite(b=2, a=1, c=3).write(tmp_path)
    assert path == tmp_path / "here" / "ops.json"
    assert list(cases(path).items()) == [("a", 1), ("b", 2), ("c", 3)]
    assert json.loads(path.read_text())["versions"] == machine.versions()


def test_a_part_takes_the_place_of_its_own_cases_only(tmp_path):
    suite(a=1, b=2, c=3).write(tmp_path)
    part = suite(b=20)
    part.skip("c", "no such operator yet")
    assert cases(part.write(tmp_path)) == {"a": 1, "b": 20, "c": None}


def test_a_part_measured_with_other_versions_is_refused(tmp_path, monkeypatch):
    path = suite(a=1, b=2, c=3).write(tmp_path)
    before = path.read_text()
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "99"})
    with pytest.raises(ValueError, match="run the whole suite"):
        suite(b=20).write(tmp_path)
    assert path.read_text() == before
    assert cases(suite(a=5, b=6, c=7).write(tmp_path)) == {"a": 5, "b": 6, "c": 7}


def test_a_case_that_the_registry_no_longer_has_is_dropped(tmp_path):
    suite(a=1, b=2, c=3).write(tmp_path)
    shorter = Suite("ops", ["a", "b"])
    shorter.add({"name": "a", "value": 10})
    assert cases(shorter.write(tmp_path)) == {"a": 10, "b": 2}


def test_a_case_is_measured_once_and_a_red_one_loses_its_older_figure(tmp_path):
    suite(a=1, b=2, c=3).write(tmp_path)
    suites, calls = {}, []
    bench = Bench(suites)

    def measure():
        calls.append("a")
        return Measurement({}, {"name": "a", "value": 10})

    def red():
        calls.append("b")
        raise CheckFailed("b: ours: error 3, allowed 1")

    for _ in range(2):
        assert bench.measured("ops", ["a", "b", "c"], "a", measure).record["value"] == 10
        with pytest.raises(CheckFailed, match="allowed 1"):
            bench.measured("ops", ["a", "b", "c"], "b", red)
        with pytest.raises(pytest.skip.Exception):
            bench.measured("ops", ["a", "b", "c"], "c", lambda: pytest.skip("no operator"))
    assert calls == ["a", "b"]
    path = suites["ops"].write(tmp_path)
    assert cases(path) == {"a": 10, "b": None, "c": None}
    reasons = [case.get("skipped") for case in json.loads(path.read_text())["cases"]]
    assert reasons == [None, "CheckFailed: b: ours: error 3, allowed 1", "no operator"]
