"""Every operator of `personafast.ops`, checked and then timed beside its baselines."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.case import Case
from benchmarks.cases import CASES
from benchmarks.measure import checked, measure
from benchmarks.replay import CLOCK, replay

ORDER = [case.name for case in CASES]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    ("case", "contender"),
    [
        pytest.param(case, contender.name, id=f"{case.name}-{contender.name}")
        for case in CASES
        for contender in case.contenders
    ],
)
def test_operator(case: Case, contender: str, benchmark: Any, bench: Any, pytestconfig: pytest.Config) -> None:
    def run() -> Any:
        missing = case.missing()
        if missing is not None:
            pytest.skip(missing)
        return measure(case, pytestconfig.getoption("--bench-seconds"))

    if benchmark.disabled:
        if contender != case.ours.name or case.missing() is not None:
            pytest.skip(case.missing() or "checked together with ours")
        benchmark.pedantic(checked, (case,))
        return
    benchmark.group = case.name
    found = bench.measured("ops", ORDER, case.name, run)
    if contender in found.absent:
        pytest.skip(found.absent[contender])
    entry = found.record["ours"] if contender == case.ours.name else found.record["baselines"][contender]
    benchmark.extra_info.update(entry)
    replay(benchmark, found.samples[contender])
