import subprocess
import sys

import pytest
import torch

from personafast import ops
from personafast.errors import BackendError, PersonafastError
from personafast.ops import _backend


def python(code, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def call():
    return ops.inject_(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, dtype=torch.int32))


def test_import_brings_neither_triton_nor_transformers():
    code = (
        "import sys, personafast.ops; from personafast import ops; ops.chosen('inject_');"
        "print([m for m in ('triton', 'transformers', 'peft', 'vllm', 'matplotlib') if m in sys.modules])"
    )
    result = python(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_context_manager_and_setter_restore_what_was_in_force():
    assert _backend.forced() is None
    with ops.use_backend("reference"):
        assert ops.chosen("inject_") == ("reference", "asked for by name ('reference')")
        with ops.use_backend(None):
            assert _backend.forced() is None
        assert _backend.forced() == "reference"
    assert _backend.forced() is None
    ops.use_backend("reference")
    assert _backend.forced() == "reference"


def test_unknown_names_are_refused():
    with pytest.raises(
        BackendError, match="unknown backend 'gpu': choose one of reference, cpu, triton, cuda or 'auto'"
    ):
        ops.use_backend("gpu")
    with pytest.raises(PersonafastError, match="unknown operator 'nothing'"):
        ops.chosen("nothing")


def test_every_operator_says_what_it_runs_on():
    for name in _backend.KERNELS:
        backend, reason = ops.chosen(name)
        assert backend in {"cpu", "torch"} and reason


def test_a_missing_backend_is_named_when_asked_for_and_passed_over_otherwise(monkeypatch):
    monkeypatch.setattr(_backend, "_modules", {"cpu": "personafast._C cannot be imported"})
    monkeypatch.setattr(_backend, "_automatic", {})
    with pytest.raises(BackendError, match="backend 'cpu' cannot run: personafast._C cannot be imported"):
        ops.use_backend("cpu")
    backend, reason = ops.chosen("inject_")
    assert backend == "torch" and "cannot be imported" in reason
    assert torch.equal(call(), torch.ones(1, 2))


def test_an_operator_without_the_kernel_asked_for_raises(monkeypatch):
    monkeypatch.setitem(_backend._modules, "triton", _backend)
    monkeypatch.setitem(_backend.KERNELS, "chunk_accept", ())
    monkeypatch.setitem(_backend.KERNELS, "pack_mask", ("cpu",))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ops.use_backend("triton"):
        with pytest.raises(BackendError, match="pack_mask has no 'triton' kernel: choose 'cpu'"):
            ops.pack_mask(torch.ones(1, 2, dtype=torch.bool))
        with pytest.raises(BackendError, match="needs CUDA tensors"):
            call()
        assert ops.chosen("inject_")[0] == "none"
        assert ops.chosen("chunk_accept")[0] == "torch"


@pytest.mark.parametrize("name", ["reference", "nonsense"])
def test_environment_variable(name):
    code = (
        "import torch; from personafast import ops\n"
        "try: print(ops.chosen('inject_')[0])\n"
        "except ops._backend.BackendError as error: print(error)"
    )
    expected = {"reference": "reference", "nonsense": "PERSONAFAST_BACKEND: unknown backend 'nonsense'"}[name]
    result = python(code, PERSONAFAST_BACKEND=name)
    assert result.stdout.startswith(expected), result.stderr


def test_an_unknown_instruction_set_is_an_error_for_the_automatic_choice_too():
    pytest.importorskip("personafast._C")
    code = (
        "import torch; from personafast import ops\n"
        "try: ops.inject_(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, dtype=torch.int32))\n"
        "except ops._backend.BackendError as error: print(error)"
    )
    result = python(code, PERSONAFAST_CPU_ISA="sse9")
    assert result.stdout.strip() == "PERSONAFAST_CPU_ISA=sse9: choose scalar, avx2 or avx512", result.stderr


class Core:
    """Stands in for a `personafast._C` that was built with CUDA or without."""

    __name__ = "personafast._C"

    def __init__(self, targets, trouble=""):
        self.build_info = lambda: {"cuda": targets}
        self.cuda_trouble = lambda: trouble


@pytest.mark.parametrize(
    "core, message",
    [
        (Core(False), "personafast._C cannot be imported .it was built without CUDA.; build it with .*nvcc"),
        (Core(["90a"], "no kernel image is available"), "compiled for 90a, but no kernel image is available"),
    ],
)
def test_a_core_whose_cuda_kernels_do_not_run_here_says_why_and_is_passed_over(monkeypatch, core, message):
    monkeypatch.setattr(_backend.importlib, "import_module", lambda name: core)
    monkeypatch.setattr(_backend, "_automatic", {})
    monkeypatch.setattr(_backend, "_modules", {"triton": _backend})
    with pytest.raises(BackendError, match=f"backend 'cuda' cannot run: {message}"):
        ops.use_backend("cuda")
    assert _backend.pick("inject_", "cuda") == "triton"


def test_a_kernel_is_chosen_up_to_its_limit_and_named_takes_any_size(monkeypatch):
    monkeypatch.setitem(_backend.LIMITS, ("inject_", "cpu"), _backend.Limit(8))
    pytest.importorskip("personafast._C")
    assert [_backend.pick("inject_", "cpu", rows) for rows in (8, 9)] == ["cpu", "torch"]
    assert ops.chosen("inject_")[1].endswith("above 8 rows, torch")
    with ops.use_backend("cpu"):
        assert _backend.pick("inject_", "cpu", 9) == "cpu"


@pytest.fixture
def gpu_kernels(monkeypatch):
    """As if both kinds of GPU kernels were there for `inject_`."""
    monkeypatch.setattr(_backend, "_automatic", {})
    monkeypatch.setattr(_backend, "_modules", {"cuda": _backend, "triton": _backend})
    monkeypatch.setitem(_backend.KERNELS, "inject_", ("cpu", "triton", "cuda"))


def test_a_gpu_takes_cuda_before_triton(monkeypatch, gpu_kernels):
    assert _backend.pick("inject_", "cuda") == "cuda"
    monkeypatch.setattr(_backend, "_automatic", {})
    monkeypatch.setitem(_backend._modules, "cuda", "not there")
    assert _backend.pick("inject_", "cuda") == "triton"


def test_a_call_too_large_for_cuda_goes_to_triton_and_then_to_torch(monkeypatch, gpu_kernels):
    monkeypatch.setitem(_backend.LIMITS, ("inject_", "cuda"), _backend.Limit(16))
    assert [_backend.pick("inject_", "cuda", rows) for rows in (16, 17)] == ["cuda", "triton"]
    assert ops.chosen("inject_", "cuda")[1].endswith("above 16 rows, triton")
    monkeypatch.setitem(_backend.LIMITS, ("inject_", "triton"), _backend.Limit(64))
    assert [_backend.pick("inject_", "cuda", rows) for rows in (16, 64, 65)] == ["cuda", "triton", "torch"]
    with ops.use_backend("cuda"):
        assert _backend.pick("inject_", "cuda", 65) == "cuda"


def test_a_call_that_cuda_cannot_take_goes_to_triton_unless_cuda_was_asked_for(monkeypatch, gpu_kernels):
    assert _backend.instead("inject_", "cuda", "cuda", "dtype torch.float64") == "triton"
    assert _backend.instead("inject_", "cuda", "triton", "dtype torch.float64") == "torch"
    monkeypatch.setitem(_backend.LIMITS, ("inject_", "triton"), _backend.Limit(64))
    assert _backend.instead("inject_", "cuda", "cuda", "dtype torch.float64", 65) == "torch"
    with ops.use_backend("cuda"), pytest.raises(BackendError, match="'cuda' cannot take dtype torch.float64: choose"):
        _backend.instead("inject_", "cuda", "cuda", "dtype torch.float64")
