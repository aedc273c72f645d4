import json

import pytest
import torch

from personafast.cli import doctor, selfcheck
from personafast.ops import _backend
from personafast.ops import inject_ as real_inject


def test_every_operator_has_a_case():
    assert set(selfcheck.CASES) == set(_backend.KERNELS)


@pytest.mark.parametrize("op", list(selfcheck.CASES))
def test_operators_pass(op):
    check = selfcheck.check_operator(op, "cpu")
    assert check.passed, check


def test_a_wrong_kernel_is_found(monkeypatch):
    def wrong(hidden, bank, slots, scale=None):
        real_inject(hidden, bank, slots, scale)
        if _backend.forced() != "reference":
            hidden[0, 0] += 0.01

    monkeypatch.setattr(selfcheck.ops, "inject_", wrong)
    check = selfcheck.check_operator("inject_", "cpu")
    assert not check.passed and "1.0e-02" in check.detail


def test_a_crashing_kernel_is_reported_and_does_not_end_the_report(monkeypatch):
    def crash(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setitem(selfcheck.CASES, "inject_", crash)
    check = selfcheck.check_operator("inject_", "cpu")
    assert not check.passed and "no such instruction" in check.detail


def test_the_report_as_json(cli):
    result = cli("doctor", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["passed"] and all(check["passed"] for check in report["checks"])
    assert report["versions"]["torch"] == torch.__version__
    assert set(report["backends"]) == set(selfcheck.CASES)
    for devices in report["backends"].values():
        assert devices["cpu"]["backend"] and devices["cpu"]["reason"]
    assert report["hardware"]["cores"] >= 1 and "error" not in report["core"]


def test_a_failed_check_shows_and_exits_with_1(cli, monkeypatch):
    monkeypatch.setattr(
        selfcheck, "checks", lambda devices: iter([selfcheck.Check("inject_ on cpu", False, "off by 1")])
    )
    result = cli("doctor")
    assert result.exit_code == 1
    assert "FAIL" in result.stdout and "off by 1" in result.stdout


def test_a_missing_core_is_said(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(doctor.importlib, "import_module", missing)
    assert "reinstall" in doctor._core()["error"]
