"""Persona vectors at every block, checked and then timed beside the model without them and beside plain hooks."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.case import Absent
from benchmarks.replay import CLOCK, replay
from benchmarks.steering import VIEWS, measure_steering
from benchmarks.views import View

ORDER = [view.name for view in VIEWS]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    ("view", "contender"),
    [pytest.param(view, contender, id=f"{view.name}-{contender}") for view in VIEWS for contender in view.contenders],
)
def test_steering(view: View, contender: str, benchmark: Any, bench: Any, pytestconfig: pytest.Config) -> None:
    if benchmark.disabled:
        pytest.skip("steering is checked when it is timed")

    def run() -> Any:
        try:
            return measure_steering(
                view, pytestconfig.getoption("--bench-tokens"), pytestconfig.getoption("--bench-rounds")
            )
        except Absent as why:
            pytest.skip(str(why))

    benchmark.group = view.name
    found = bench.measured("steer", ORDER, view.name, run)
    if contender in found.absent:
        pytest.skip(found.absent[contender])
    benchmark.extra_info.update(found.record["contenders"][contender])
    replay(benchmark, found.samples[contender])
