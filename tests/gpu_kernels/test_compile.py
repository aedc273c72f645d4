"""Every Triton kernel compiled for GPUs that are not here: no spills, no host reads, tensor cores where meant."""

import os

import pytest

pytest.importorskip("triton")
pytest.importorskip("personafast._triton", reason="needs an installed personafast")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks.gpu.cases import SPECIMENS
from benchmarks.gpu.offline import GPUS, launches

MATRIX = {80: r"^\S*\s*HMMA", 90: "HGMMA", 100: "UTC[A-Z]*MMA|HMMA"}


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("specimen", SPECIMENS, ids=str)
def test_compiles_within_the_limits_of_the_gpu(specimen, capability):
    made = launches(specimen.call, capability)
    assert len(made) == specimen.launches
    for launch in made:
        assert launch.stack == 0, f"{launch.kernel} keeps {launch.stack} bytes a thread in local memory"
        assert launch.registers * launch.threads <= 65536
        assert launch.shared <= GPUS[capability][1]
        assert all(1 <= size <= limit for size, limit in zip(launch.grid, (2**31 - 1, 65535, 65535), strict=True))
    for name in specimen.tensor_cores:
        assert any(launch.kernel == name and launch.count(MATRIX[capability]) for launch in made), name
