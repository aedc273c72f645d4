"""The cases of the GPU suite, so small that the interpreter runs them: kernels, plain torch and the check itself."""

import pytest
import torch

from benchmarks.check import check, references
from benchmarks.gpu.case import GpuDraw
from benchmarks.gpu.cases import cases


@pytest.mark.parametrize("case", cases(tiny=True), ids=lambda case: case.name)
def test_ours_and_every_baseline_that_is_installed(case):
    inputs = case.make(GpuDraw(0, "cpu", torch.float16))
    exact, plain = references(case, inputs)
    check(case, case.ours, inputs, exact, plain)
