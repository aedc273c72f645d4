"""The compiled core as an object: what it links to, which instruction sets it has, and that each of them is right."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from personafast import __version__

core = pytest.importorskip("personafast._C")

ROOT = Path(__file__).resolve().parents[2]
INFO = core.build_info()


def run(*command, **environment):
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


def test_build_info():
    assert INFO["version"] == __version__
    assert INFO["compiler"]
    assert INFO["cuda"] is False or INFO["cuda"] and all(isinstance(target, str) for target in INFO["cuda"])
    assert INFO["isas_compiled"][0] == "scalar"
    assert INFO["isa"] in INFO["isas_supported"]
    assert set(INFO["isas_supported"]) <= set(INFO["isas_compiled"])


def test_no_symbol_of_torch():
    symbols = run("nm", "-D", "--demangle", core.__file__).stdout
    assert "PyInit__C" in symbols
    assert not re.search(r"\b(c10|at|torch|caffe2)::", symbols)
    needed = re.findall(r"NEEDED\s+(\S+)", run("objdump", "-p", core.__file__).stdout)
    assert needed and not [name for name in needed if "torch" in name or "c10" in name or "python" in name]


def test_the_core_has_threads_of_its_own():
    needed = run("objdump", "-p", core.__file__).stdout
    assert "gomp" not in needed and "omp.so" not in needed


def test_isa_units_share_no_inline_code():
    allowed = {"<immintrin.h>", "<math.h>", "<string.h>", '"kernels.h"'}
    units = [path for path in (ROOT / "csrc/cpu").glob("*.cpp") if re.search(r"_(scalar|avx2|avx512)\.cpp$", path.name)]
    assert units and len(units) % 3 == 0
    for unit in units:
        isa = unit.stem.rpartition("_")[2]
        # Helpers of one instruction set live in headers named for it.
        for include in set(re.findall(r"#include (\S+)", unit.read_text())) - allowed:
            assert re.fullmatch(rf'"{isa}_\w+\.h"', include), f"{unit.name} includes {include}"
    for header in (path for isa in INFO["isas_compiled"] for path in (ROOT / "csrc/cpu").glob(f"{isa}_*.h")):
        # Internal linkage: no other unit can be given this copy.
        text = header.read_text()
        assert re.search(r"namespace personafast::(scalar|avx2|avx512) \{\nnamespace \{", text), header.name
    for header in [*(ROOT / "csrc/include").rglob("*.h"), ROOT / "csrc/cpu/kernels.h"]:
        text = header.read_text()
        assert not re.search(
            r"^\s*(inline|template)\b|#include [<\"](torch|ATen|c10|Python|pybind11)", text, re.MULTILINE
        ), header.name


@pytest.mark.parametrize("isa", ["scalar", "avx2", "avx512"])
def test_every_instruction_set_obeys_the_rules(isa):
    if isa not in INFO["isas_supported"]:
        pytest.skip(f"this machine cannot run {isa}")
    operators = (
        "add_inject_rms_norm",
        "aggregate_logits",
        "chunk_accept",
        "chunk_scores",
        "inject",
        "linear",
        "lora_delta",
        "mask_bits",
        "masked_linear",
        "sparse_linear",
        "steer",
        "token_logprobs",
        "verify_draft",
    )
    tests = [str(ROOT / "tests/ops" / f"test_{operator}.py") for operator in operators]
    command = (sys.executable, "-m", "pytest", "-k", "kernel or error_rule", "-p", "no:cacheprovider", *tests)
    result = run(*command, PERSONAFAST_CPU_ISA=isa)
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout
    code = "import personafast._C as core; print(core.build_info()['isa'])"
    assert run(sys.executable, "-c", code, PERSONAFAST_CPU_ISA=isa).stdout.strip() == isa


def test_instruction_sets_give_the_same_bits(tmp_path):
    code = """
import sys, torch
from personafast import ops
g = torch.Generator().manual_seed(0)
results = []
with ops.use_backend("cpu"):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for width in (77, 1000):
            hidden = torch.randn(5, width, generator=g).to(dtype)
            bank, scale = torch.randn(4, width, generator=g), torch.randn(5, generator=g)
            slots = torch.tensor([0, 1, -1, 2, 3], dtype=torch.int32)
            mode = torch.arange(4, dtype=torch.int8)
            params = torch.tensor([[1.0, 0.0], [-0.1, 0.1], [2.0, 0.0], [0.5, 0.0]])
            results.append(ops.inject_(hidden.clone(), bank, slots, scale))
            results.append(ops.steer_(hidden.clone(), bank, slots, mode, params, scale))
            results.append(ops.steer_(hidden.clone(), bank.to(dtype), slots, mode, params))
            results += ops.add_inject_rms_norm(hidden, 2 * hidden, bank, slots, scale, bank[0], 1e-6)
            results += ops.add_inject_rms_norm(hidden, 2 * hidden, bank.to(dtype), slots, None, bank[0].to(dtype), 1e-6)
torch.save(results, sys.argv[1])
"""
    results = []
    for isa in INFO["isas_supported"]:
        path = tmp_path / isa
        done = run(sys.executable, "-c", code, str(path), PERSONAFAST_CPU_ISA=isa)
        assert done.returncode == 0, done.stderr
        results.append(torch.load(path, weights_only=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [0, 1, 2])
def test_kernel_writes_every_output_and_nothing_else(dtype):
    kind = (torch.float32, torch.bfloat16, torch.float16)[dtype]
    x, weight = torch.randn(3, 33).to(kind), torch.randn(7, 33).to(kind)
    masks, slots = torch.full((1, 7, 2), -1, dtype=torch.int32), torch.tensor([0, -1, 0], dtype=torch.int32)
    out = torch.full((5, 7), float("nan"), dtype=kind)
    wrong = core.masked_linear(
        out[1:4].data_ptr(),
        x.data_ptr(),
        33,
        weight.data_ptr(),
        33,
        masks.data_ptr(),
        slots.data_ptr(),
        0,
        0,
        3,
        7,
        33,
        1,
        dtype,
        2,
    )
    assert wrong == -1
    assert not out[1:4].isnan().any() and out[0].isnan().all() and out[4].isnan().all()


def test_kernel_names_the_row_of_a_wrong_slot():
    x, weight, masks = torch.ones(3, 4), torch.ones(2, 4), torch.zeros(1, 2, 1, dtype=torch.int32)
    out, slots = torch.full((3, 2), float("nan")), torch.tensor([0, -1, 1], dtype=torch.int32)
    wrong = core.masked_linear(
        out.data_ptr(),
        x.data_ptr(),
        4,
        weight.data_ptr(),
        4,
        masks.data_ptr(),
        slots.data_ptr(),
        0,
        0,
        3,
        2,
        4,
        1,
        0,
        1,
    )
    assert wrong == 2 and out.isnan().all()
