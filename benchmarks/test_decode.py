"""Decoding of whole models, checked and then timed beside unpatched transformers."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.case import Absent
from benchmarks.decode import DECODE_CASES, DecodeCase, measure_decoding
from benchmarks.replay import CLOCK, replay

ORDER = [case.name for case in DECODE_CASES]


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize(
    ("case", "contender"),
    [
        pytest.param(case, contender, id=f"{case.name}-{contender}")
        for case in DECODE_CASES
        for contender in case.contenders
    ],
)
def test_decoding(case: DecodeCase, contender: str, benchmark: Any, bench: Any, pytestconfig: pytest.Config) -> None:
    if benchmark.disabled:
        pytest.skip("decoding is checked when it is timed")

    def run() -> Any:
        try:
            return measure_decoding(
                case, pytestconfig.getoption("--bench-tokens"), pytestconfig.getoption("--bench-rounds")
            )
        except Absent as why:
            pytest.skip(str(why))

    benchmark.group = case.name
    found = bench.measured("decode", ORDER, case.name, run)
    if contender in found.absent:
        pytest.skip(found.absent[contender])
    benchmark.extra_info.update(found.record["contenders"][contender])
    replay(benchmark, found.samples[contender])
