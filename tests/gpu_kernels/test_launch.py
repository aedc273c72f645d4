"""How kernels are launched, against a driver that compiles and lists what it is given."""

import os
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("personafast._triton", reason="needs an installed personafast")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

from personafast._triton import inject_, launch
from personafast._triton.inject import inject_config, inject_kernel
from triton import knobs

from benchmarks.gpu.case import meta
from benchmarks.gpu.offline import GPUS, launches, pretending
from personafast.errors import BackendError, KernelError

# What eight rows of 256 bf16 columns are launched with.
CONFIG = inject_config(256, 2, True)


def arguments(rows=8, hidden=256, scale=True, dtype=torch.bfloat16):
    return (
        meta(rows, hidden, dtype=dtype),
        meta(4, hidden, dtype=dtype),
        meta(rows, dtype=torch.int32),
        meta(rows, dtype=torch.float32) if scale else None,
    )


def test_what_the_driver_gets_is_the_call_in_order():
    (made,) = launches(lambda: inject_(*arguments()), 90)
    assert made.kernel == "inject_kernel" and made.grid[0] == 8
    # Addresses (of meta tensors: 0), strides, slots, columns, and the constexpr parameters at the end.
    assert made.args[:8] == (0, 0, 0, 0, 256, 256, 4, 256)
    assert made.args[8:] == CONFIG.values
    (made,) = launches(lambda: inject_(*arguments(scale=False)), 90)
    assert made.args[3] is None


def test_a_kind_of_call_is_resolved_once(monkeypatch):
    monkeypatch.setattr(launch, "_resolved", {})
    with pretending(90) as stub:
        inject_(*arguments())
        before = len(launch._resolved)
        for rows in (8, 16, 24):
            inject_(*arguments(rows))
        assert len(launch._resolved) == before
        assert len(stub.launches) == 4
        inject_(*arguments(dtype=torch.float16))
        inject_(*arguments(scale=False))
        assert len(launch._resolved) == before + 2
        assert len({id(made.cubin) for made in stub.launches}) == 3


def test_every_gpu_gets_its_own_code():
    codes = {launches(lambda: inject_(*arguments()), capability)[0].cubin for capability in GPUS}
    assert len(codes) == len(GPUS)


def test_integers_are_told_apart_as_triton_specialises_on_them():
    config = CONFIG

    def code(columns, stride):
        args = (*arguments(1, 256), stride, 256, 4, columns)
        return launches(lambda: launch.launch(inject_kernel, (1, 1, 1), config, *args), 90)[0].cubin

    assert code(256, 256) == code(512, 4096)
    assert len({code(256, 256), code(255, 256), code(256, 255), code(256, 1), code(256, 1 << 31)}) == 5


def test_an_address_that_is_not_aligned_gets_narrow_loads():
    hidden, bank, slots, scale = arguments()
    with pretending(90) as stub:
        inject_(hidden, bank, slots, scale)

        class Shifted(torch.Tensor):
            def data_ptr(self):
                return 8

        # An empty tensor subclass would not pass the operator's checks; the launcher only asks for an address.
        inject_(hidden.as_subclass(Shifted), bank, slots, scale)
    aligned, shifted = stub.launches
    assert aligned.count(r"STG\.E\.(64|128)") and not shifted.count(r"STG\.E\.(64|128)")


def test_a_failed_launch_names_the_kernel_and_the_error_and_leaves_no_trace():
    with pretending(90) as stub:
        stub.failure = RuntimeError("Triton Error [CUDA]: out of memory")
        with pytest.raises(KernelError) as caught:
            inject_(*arguments())
        assert str(caught.value) == (
            "inject_kernel: launch of 8 x 1 x 1 programs on cuda:90 failed: Triton Error [CUDA]: out of memory"
        )
        assert isinstance(caught.value, BackendError) and isinstance(caught.value.__cause__, RuntimeError)
        stub.failure = None
        inject_(*arguments())
        assert len(stub.launches) == 1


def test_a_kernel_that_does_not_fit_is_named_and_not_kept():
    config = launch.Config({"BLOCK": 1 << 21, "EAGER": False})
    with pretending(90):
        before = dict(launch._resolved)
        with pytest.raises(KernelError, match="inject_kernel: launch of 8 x 1 x 1 .* failed: .*1048576"):
            launch.launch(inject_kernel, (8, 1, 1), config, *arguments(), 256, 256, 4, 256)
        assert launch._resolved == before


def test_nothing_is_launched_over_an_empty_grid():
    assert launches(lambda: inject_(*arguments(rows=0)), 90) == []


def test_the_device_of_the_tensors_is_made_the_current_one(monkeypatch):
    entered = []

    class Guard:
        def __init__(self, index):
            self.index = index

        def __enter__(self):
            entered.append(self.index)
            monkeypatch.setattr(launch, "_index", lambda tensor: 90)

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(launch, "_index", lambda tensor: 3)
    with pretending(90) as stub:
        inject_(*arguments())
    assert entered == [3] and len(stub.launches) == 1


def test_a_profiler_sees_every_launch():
    seen = []
    with pretending(90) as stub:
        knobs.runtime.launch_enter_hook.add(seen.append)
        try:
            inject_(*arguments())
        finally:
            knobs.runtime.launch_enter_hook.remove(seen.append)
        assert len(stub.launches) == 1 and stub.launches[0].args[8:] == CONFIG.values


def test_facts_of_the_device_are_those_of_the_driver():
    for capability, (multiprocessors, shared) in GPUS.items():
        with pretending(capability):
            assert launch.device_of(meta(1)) == (capability, multiprocessors, shared)
    assert launch.device_of(torch.zeros(1)) == launch.INTERPRETED


def test_launching_costs_the_host_less_than_tritons_own_way():
    args = arguments()
    config = CONFIG
    with pretending(90) as stub:

        def ours():
            launch.launch(inject_kernel, (8, 1, 1), config, *args, 256, 256, 4, 256)

        def tritons():
            inject_kernel[(8, 1, 1)](*args, 256, 256, 4, 256, **config.constants, **config.options)

        def once(call):
            stub.launches.clear()
            began = time.perf_counter()
            for _ in range(200):
                call()
            return time.perf_counter() - began

        ours(), tritons()
        ratios = sorted(once(ours) / once(tritons) for _ in range(15))
    assert ratios[len(ratios) // 2] < 0.9


def test_operators_without_a_gpu_do_not_import_triton():
    code = "import sys, personafast.ops; print('triton' in sys.modules, 'personafast._triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False False", done.stderr
