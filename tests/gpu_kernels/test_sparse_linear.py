"""What sparse_linear's machine code has to be for its speed, on GPUs that are not here."""

import os
import re

import pytest

pytest.importorskip("triton")
pytest.importorskip("personafast._triton", reason="needs an installed personafast")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from personafast._triton import launch as launching

from benchmarks.gpu.cases.sparse_linear import SPECIMENS
from benchmarks.gpu.offline import launches


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("specimen", [s for s in SPECIMENS if s.tensor_cores or "bfloat16" in s.name], ids=str)
def test_each_lane_holds_the_elements_that_the_matrix_instruction_takes_for_its_own(specimen, capability, monkeypatch):
    """The instruction goes by the number of the lane: element l of the last axis has to be in lane l of its warp."""
    compiled = []

    def resolve(kernel, grid, config, args):
        made = kernel.warmup(*args, grid=grid, **config.constants, **config.options)
        compiled.append(made)
        return made.run, made.function, made.packed_metadata

    monkeypatch.setattr(launching, "_resolve", resolve)
    monkeypatch.setattr(launching, "_resolved", {})
    launches(specimen.call, capability)
    looked_at = 0
    for made in compiled:
        text = made.asm["ttgir"]
        layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*?)\}>$", text, flags=re.M))
        for line in text.splitlines():
            if 'elementwise_inline_asm "mma.sync' in line:
                for shape, layout in re.findall(r"tensor<([\dx]+)x[if]32, (#\w+)>", line):
                    assert shape.endswith("x32")
                    assert re.search(r"sizePerThread = \[[\d, ]*\b1\]", layouts[layout])
                    assert re.search(r"threadsPerWarp = \[(1, )+32\]", layouts[layout])
                    looked_at += 1
    assert looked_at or "sparse_linear_kernel" not in {made.metadata.name for made in compiled}


@pytest.mark.parametrize("capability", [80, 90])
def test_one_warp_needs_no_barrier_no_conversion_and_the_older_matrix_instruction(capability):
    (specimen,) = (s for s in SPECIMENS if s.name == "bfloat16, 1 rows x 14336 x 4096")
    (launch,) = launches(specimen.call, capability)
    assert launch.kernel == "sparse_linear_kernel"
    # mma.sync takes its operands from registers of any warp, as wgmma does not: HMMA on every GPU.
    assert launch.count(r"HMMA\.16816\.F32\.BF16") == 4
    assert launch.count("BAR|STS|LDS") == 0 and launch.count("FFMA") == 0
    assert launch.registers <= 64  # 32 warps a multiprocessor
    loop = next(i for i, line in enumerate(launch.sass) if "LTC256B" in line or "U16.CONSTANT" in line)
    last = max(i for i, line in enumerate(launch.sass) if "HMMA" in line)
    assert last - loop < 10 * 32, "more than 10 instructions a weight"


@pytest.mark.parametrize("capability", [80, 90])
def test_no_weight_and_no_x_goes_through_shared_memory(capability):
    """Bits, values and x lie over the lanes in one way from the load on: some compilers see to that only if asked."""
    (specimen,) = (s for s in SPECIMENS if s.name == "bfloat16, 8 rows x 14336 x 4096")
    (launch,) = launches(specimen.call, capability)
    last = max(i for i, line in enumerate(launch.sass) if "HMMA" in line)
    assert not [line for line in launch.sass[:last] if "STS" in line or "LDS." in line]
    assert launch.count(r"LDG\.E\..*128") >= 8  # a load of x for every row
