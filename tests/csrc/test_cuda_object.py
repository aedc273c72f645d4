"""What nvcc made of the CUDA kernels: for which GPUs, without registers in memory, in accesses of 16 bytes."""

import functools
import re
import subprocess
from pathlib import Path

import pytest

core = pytest.importorskip("personafast._C")
TARGETS = core.build_info()["cuda"]
if not TARGETS:
    pytest.skip("built without CUDA", allow_module_level=True)


@functools.cache
def cuobjdump(*options):
    """Triton's wheel brings cuobjdump along, which not every toolkit does."""
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.is_file():
        pytest.skip("this Triton has no cuobjdump")
    return subprocess.run([tool, *options, core.__file__], capture_output=True, text=True, check=True).stdout


@functools.cache
def kernels():
    """The instructions of every kernel, by mangled name, for the first GPU compiled for."""
    found = {}
    for part in re.split(r"\n\s+Function : ", cuobjdump("-sass", "-arch", f"sm_{TARGETS[0]}"))[1:]:
        name, _, body = part.partition("\n")
        found[name] = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", body)
    return found


def named(*parts):
    matching = {name: code for name, code in kernels().items() if all(part in name for part in parts)}
    assert matching, parts
    return matching


def count(code, pattern):
    return sum(bool(re.search(pattern, line)) for line in code)


def test_compiled_for_the_gpus_it_says():
    assert set(re.findall(r"\.sm_(\w+)\.cubin", cuobjdump("-lelf"))) == set(TARGETS)
    assert set(re.findall(r"\.sm_(\w+)\.ptx", cuobjdump("-lptx"))) == {TARGETS[-1]}


def test_the_runtime_stays_inside():
    """Torch brings a CUDA runtime of its own, and neither may be given the other's functions."""
    symbols = subprocess.run(["nm", "-D", core.__file__], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\b_?_?(cuda|cu)[A-Z]\w*", symbols)
    assert re.findall(r" T (\w+)", symbols) == ["PyInit__C"]
    needed = subprocess.run(["objdump", "-p", core.__file__], capture_output=True, text=True, check=True).stdout
    assert "libcuda" not in needed


def test_no_kernel_keeps_registers_in_memory():
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", cuobjdump("-res-usage"))
    assert len(usage) >= len(TARGETS)
    assert [name for name, _, stack, local in usage if int(stack) or int(local)] == []


@pytest.mark.parametrize("kernel", ["inject_kernel", "steer_kernel", "add_inject_rms_norm_kernel"])
def test_rows_that_allow_it_move_16_bytes_at_a_time(kernel):
    # Kernels of N elements a thread's access are named by the dtypes and then N: 4 of fp32, 8 of 16 bit, or 1.
    wide = {name: code for name, code in named(kernel).items() if re.search(r"E\d+(ELS\d_\d)+ELi[48]E", name)}
    assert len(wide) >= 10
    for name, code in wide.items():
        assert count(code, r"LDG\.E\.128") >= 2 and count(code, r"STG\.E\.128"), name
        # What else is read are slots, scales and parameters.
        assert count(code, r"LDG\.E(?!\.128)") <= 6 and not count(code, r"STG\.E(?!\.128)"), name


def test_chunk_scores_asks_for_everything_before_it_waits():
    """Nine loads, and five more for policies and carried ratios of further members, before anything is exchanged."""
    (code,) = named("chunk_scores_kernelILi8ELb1").values()
    first = next(i for i, line in enumerate(code) if re.search(r"SHFL|STS|LDS|F2F|MUFU", line))
    assert count(code[:first], r"LDG\.E") >= 14


@pytest.mark.parametrize(
    "kernel", ["inject_kernelILNS_5DtypeE1ELS2_1ELi8ELi1ELb1", "steer_kernelILNS_5DtypeE1ELS2_1ELi8ELNS0_5ReadsE0"]
)
def test_hidden_is_asked_for_before_the_slot_has_come(kernel):
    (code,) = named(kernel).values()
    loads = [line for line in code if re.search(r"LDG|EXIT|BRA", line)]
    first = next(i for i, line in enumerate(loads) if re.search(r"LDG\.E\.128 ", line))
    assert not any(re.search(r"EXIT|BRA|CONSTANT", line) for line in loads[:first]), loads


def tensor_core_loops(code):
    """For every loop that multiplies on tensor cores: its instructions."""
    starts = {}
    for i, line in enumerate(code):
        jump = re.search(r"BRA 0x([0-9a-f]+)", line)
        if jump and (first := int(jump[1], 16) // 16) <= i:
            starts[first] = i + 1
    bodies = [code[first:last] for first, last in starts.items()]
    return [body for body in bodies if count(body, "HMMA")]


def test_masked_linear_takes_two_instructions_a_pair_of_weights():
    """Picking the bits, and an addition that keeps or drops: all else is shared by the masks, or done once a word."""
    # bf16, no gamma, words of masks copied by fours
    (code,) = named("masked_linear_kernelILNS_5DtypeE1ELb0ELb1").values()
    inner = min(tensor_core_loops(code), key=len)
    # 8 masks of 2 outputs and 32 columns a lane, on tensor cores 8 weights a lane at a time
    assert count(inner, "HMMA") == 64
    assert count(inner, "HFMA2") == 256
    assert count(inner, "LOP3") <= 256 + 8 * 2 * 4
    assert len(inner) <= 1.8 * 512
    assert count(code, r"LDGSTS\.E\.BYPASS\.128") and count(inner, r"LDS\.128") == 8


# bf16, ranks of up to 16 and 64, whole chunks of 16 bytes
LORA_DELTA = [("lora_delta_kernelILNS_5DtypeE1ELi16ELb1", 6), ("lora_delta_kernelILNS_5DtypeE1ELi64ELb1", 18)]


@pytest.mark.parametrize(("kernel", "loads"), LORA_DELTA)
def test_lora_delta_asks_for_its_factors_as_soon_as_it_knows_whose(kernel, loads):
    """All of A and x that a lane multiplies comes before the first product and the copies of B, which are whole too."""
    (code,) = named(kernel).values()
    product = next(i for i, line in enumerate(code) if "HMMA" in line)
    copy = next(i for i, line in enumerate(code) if "LDGSTS" in line)
    assert count(code[:copy], r"LDG\.E\.128\.CONSTANT") == loads
    assert copy < product and count(code[:product], r"LDG\.E\.128\.CONSTANT") == loads
    assert count(code, "LDGSTS") == count(code, r"LDGSTS\.E\.BYPASS\.128") > 0


@pytest.mark.skipif(not TARGETS[0].startswith(("9", "10", "12")), reason="this GPU has no clusters")
@pytest.mark.parametrize("kernel", [name for name, _ in LORA_DELTA])
def test_lora_delta_sends_its_sums_without_a_fence(kernel):
    (code,) = named(kernel).values()
    assert count(code, r"^(@\S+ )?STAS") == 8  # one to every block of the cluster
    assert count(code, "UCGABAR_ARV") == count(code, "UCGABAR_WAIT") == 1
    assert count(code, "MEMBAR") == 0


@pytest.mark.parametrize("kernel", [name for name, _ in LORA_DELTA])
def test_lora_delta_fetches_but_out_and_b_after_its_sums_are_on_their_way(kernel):
    """What is small, like the scale, would be waited for as long as what is large. (Of two launches it reads sums.)"""
    (code,) = named(kernel).values()
    last = max(i for i, line in enumerate(code) if "HMMA" in line)
    others = [line for line in code[last:] if re.search(r"LDG\.E(?!\.U16)", line)]
    assert len(others) in (0, 8)


def test_sparse_linear_takes_six_instructions_a_weight():
    """Four weights a lane at a time: where they are, three words that hold them, and predicates for what is kept."""
    (code,) = named("sparse_linear_kernelILNS_5DtypeE1ELi1E").values()  # bf16, one row
    stage = min(tensor_core_loops(code), key=len)
    products = [i for i, line in enumerate(stage) if "HMMA" in line]
    assert len(products) == 8  # two for 16 weights a lane
    step = stage[products[3] + 1 : products[5] + 1]
    assert len(step) <= 5.5 * 16
    assert count(step, r"LDS R") == 4 * 4 and count(step, "POPC") == 4 and count(step, r"LDG\.E\.64") == 1
    assert count(step, "R2P") == 4  # four predicates at once
    # What remains prepares the next stage: copies of its values, and where they begin.
    assert count(stage, r"LDGSTS\.E\.BYPASS\.128") == 9 and count(stage, r"STS\.128") <= 2
    assert count(stage, "SHFL") == 4
