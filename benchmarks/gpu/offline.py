"""Kernels without a GPU: every launch of a call, compiled for a named GPU, and what the compiler made of it."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

# Multiprocessors and shared bytes a block, by compute capability: A100, RTX 3090, RTX 4090, H100 and H200, B200,
# RTX 5090.
GPUS = {
    80: (108, 163 << 10),
    86: (82, 99 << 10),
    89: (128, 99 << 10),
    90: (132, 227 << 10),
    100: (148, 227 << 10),
    120: (170, 99 << 10),
}


@dataclass
class Launch:
    """One launch of a call, compiled and not run.

    Attributes:
        kernel: name of the function.
        capability: compute capability it was compiled for.
        grid: programs along the three axes.
        args: what the kernel was given; addresses for tensors.
        shared: bytes of shared memory a block.
        threads: threads a block.
        cubin: the machine code.
    """

    kernel: str
    capability: int
    grid: tuple[int, int, int]
    args: tuple[Any, ...]
    shared: int
    threads: int
    cubin: bytes

    @functools.cached_property
    def _usage(self) -> dict[str, int]:
        text = _cuobjdump("--dump-resource-usage", self.cubin)
        return {name: int(number) for name, number in re.findall(r"\b([A-Z]+(?:\[\d\])?):(\d+)", text)}

    @property
    def registers(self) -> int:
        """Registers a thread."""
        return self._usage["REG"]

    @property
    def stack(self) -> int:
        """Bytes of local memory a thread: spilled registers, or an array indexed at run time."""
        return self._usage["STACK"] + self._usage["LOCAL"]

    @functools.cached_property
    def sass(self) -> list[str]:
        """The machine code, an instruction an entry."""
        return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(\S.*?)\s*;", _cuobjdump("-sass", self.cubin))

    def count(self, instruction: str) -> int:
        """How often an instruction that matches the regular expression stands in the machine code."""
        return sum(re.search(instruction, line) is not None for line in self.sass)


class StubDriver:
    """Stands in for a GPU of some compute capability: whatever is launched on it is compiled, listed and not run.

    Args:
        capability: as in `GPUS`.
    """

    def __init__(self, capability: int) -> None:
        multiprocessors, shared = GPUS[capability]
        self.capability = capability
        self.launches: list[Launch] = []
        # Raised by every launch while it is set.
        self.failure: Exception | None = None
        properties = {"multiprocessor_count": multiprocessors, "max_shared_mem": shared}
        self.utils = SimpleNamespace(
            get_device_properties=lambda index: properties,
            load_binary=lambda name, cubin, shared, index: (None, (name, cubin, shared), 0, 0, 1024),
            unload_module=lambda module: None,
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        threads = 32 * int(metadata.num_warps)

        def run(*arguments: Any) -> None:
            now = driver.active
            if now.failure is not None:
                raise now.failure
            grid, (name, cubin, shared) = arguments[:3], arguments[4]
            now.launches.append(Launch(name, self.capability, grid, arguments[9:], shared, threads, cubin))

        return run

    # What Triton and `launch` have compiled they keep by device: the capability stands for its number.
    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, index: int) -> int:
        return 0

    def get_device_capability(self, index: int) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


@contextmanager
def pretending(capability: int) -> Iterator[StubDriver]:
    """Within it Triton takes the machine for one with a GPU of `capability`. Give the kernels meta tensors."""
    before = driver._active
    stub = StubDriver(capability)
    driver.set_active(stub)
    try:
        yield stub
    finally:
        driver._active = before


def launches(call: Callable[[], Any], capability: int) -> list[Launch]:
    """What `call`, given meta tensors, launches on a GPU of `capability`."""
    with pretending(capability) as stub, torch.no_grad():
        call()
    return stub.launches


def _cuobjdump(option: str, cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([str(tool), option, file.name], check=True, capture_output=True, text=True)
    return done.stdout
