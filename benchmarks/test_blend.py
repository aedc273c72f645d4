"""Blending LoRA policies while decoding, checked and then timed beside the reference alone and beside PEFT."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.blend import VIEWS, View, measure_blending
from benchmarks.case import Absent
from benchmarks.replay import CLOCK, replay

ORDER = [view.name for view in VIEWS]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    ("view", "contender"),
    [
        pytest.param(view, contender, id=f"{view.name}-{contender}")
        for view in VIEWS
        for contender in (view.baseline, *view.goals)
    ],
)
def test_blending(view: View, contender: str, benchmark: Any, bench: Any, pytestconfig: pytest.Config) -> None:
    if benchmark.disabled:
        pytest.skip("blending is checked when it is timed")

    def run() -> Any:
        try:
            return measure_blending(
                view, pytestconfig.getoption("--bench-tokens"), pytestconfig.getoption("--bench-rounds")
            )
        except Absent as why:
            pytest.skip(str(why))

    benchmark.group = view.name
    found = bench.measured("blend", ORDER, view.name, run)
    benchmark.extra_info.update(found.record["contenders"][contender])
    replay(benchmark, found.samples[contender])
