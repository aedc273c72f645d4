"""The Triton kernel, without a GPU: interpreted against the reference, and compiled for the GPUs we name."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")
pytest.importorskip("personafast._triton", reason="needs an installed personafast")

# A process of its own: triton reads TRITON_INTERPRET when a kernel is defined, and it must not leak into other tests.
INTERPRET = """
import itertools
import torch
from personafast import ops
from personafast.ops import _inject

g = torch.Generator().manual_seed(0)
dtypes = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
          (torch.float16, torch.float32)]
ops.use_backend("triton")
for (dtype, bank_dtype), width, scaled in itertools.product(dtypes, (1, 127, 130, 1030), (False, True)):
    wide = torch.randn(4, width + 3, generator=g).to(dtype)
    bank = torch.randn(3, width, generator=g).to(bank_dtype)
    slots = torch.tensor([1, -1, 2, 0], dtype=torch.int32)
    scale = torch.randn(4, generator=g) if scaled else None
    expected = wide.clone()
    _inject.reference(expected[:, :width], bank, slots, scale)
    ops.inject_(wide[:, :width], bank, slots, scale)
    if dtype == torch.bfloat16:  # the interpreter truncates where hardware rounds
        torch.testing.assert_close(wide.float(), expected.float(), rtol=2**-7, atol=0)
    else:
        assert torch.equal(wide, expected), (dtype, width, scaled)
ops.inject_(torch.empty(0, 5), torch.ones(1, 5), torch.empty(0, dtype=torch.int32))
hidden = torch.zeros(6, 4).T
ops.inject_(hidden, torch.ones(6, 1).T.contiguous(), torch.zeros(4, dtype=torch.int32))
assert torch.equal(hidden, torch.ones(4, 6))
print("equal")
"""

COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from personafast._triton.inject import inject_config, inject_kernel

for kind in ("fp32", "bf16", "fp16"):
    for scaled in (False, True):
        config = inject_config(4096)
        signature = {"p_hidden": "*" + kind, "p_bank": "*" + kind, "p_slots": "*i32", "p_scale": "*fp32",
                     "s_hidden": "i64", "s_bank": "i64", "n_bank": "i32", "H": "i32", "HAS_SCALE": "constexpr",
                     "BLOCK": "constexpr"}
        constants = {"HAS_SCALE": scaled, "BLOCK": config.pop("BLOCK")}
        divisible = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 4, 5, 7)}  # pointers, strides and H
        source = ASTSource(inject_kernel, signature, constexprs=constants, attrs=divisible)
        target = GPUTarget("cuda", int(sys.argv[1]), 32)
        compiled = triton.compile(source, target=target, options=config)
        spills = getattr(compiled, "n_spills", None) or getattr(compiled.metadata, "n_spills", 0)
        assert not spills, spills
        ptx = compiled.asm["ptx"]
        assert ".local" not in ptx
        assert "ld.global.v4" in ptx and "st.global.v4" in ptx, ptx
        assert "cubin" in compiled.asm
print("compiled")
"""


def python(code, *args, **environment):
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=300,
    )


def test_interpreted_kernel_equals_the_reference(tmp_path):
    script = tmp_path / "interpret.py"
    script.write_text(INTERPRET)
    result = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        timeout=300,
    )
    assert result.stdout.strip() == "equal", result.stderr


@pytest.mark.parametrize("capability", ["80", "90", "100"])
def test_compiles_without_spills_and_with_wide_accesses(capability):
    result = python(COMPILE, capability)
    assert result.stdout.strip() == "compiled", result.stderr
