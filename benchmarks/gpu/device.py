"""Where the suite runs: a CUDA device, or this machine's CPU for a rehearsal without one."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

# Takes one sample: seconds a call.
Sample = Callable[[], float]

# A sample lasts at least this long: events tick in steps of half a microsecond.
SAMPLE_SECONDS = 2e-3
MAX_REPLAYS = 200
WARM_CALLS = 3


class NotCapturable(Exception):
    """A call waits for the device, so no graph can hold it."""


class Device(Protocol):
    """What the suite asks of the machine."""

    name: str
    dtype: torch.dtype
    rehearsal: bool

    def facts(self) -> dict[str, Any]:
        """Hardware, driver and what else the figures depend on."""

    def cache_bytes(self) -> int:
        """Bytes of the last-level cache."""

    def free_bytes(self) -> int:
        """Bytes that can be allocated."""

    def synchronize(self) -> None:
        """Wait for everything that was launched, and raise what went wrong."""

    def lost(self) -> bool:
        """Whether an error has ended the device's context, so that only a new process can go on."""

    def sample(self, run: Callable[[Any], Any], buffers: Sequence[Any]) -> Sample:
        """Samples of `run` over all of `buffers`; what can be captured, from replays of one graph.

        Raises:
            NotCapturable: the calls cannot be captured.
        """

    def eager(self, run: Callable[[Any], Any], buffers: Sequence[Any]) -> Sample:
        """Samples of `run` called from Python, one call after the other."""

    def kernels(self, call: Callable[[], Any]) -> int | None:
        """How many kernels `call` launches, copies and fills included; None where nobody can tell."""


class Cuda:
    """The CUDA device that is current."""

    name = "cuda"
    dtype = torch.bfloat16
    rehearsal = False

    def facts(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(0)
        return {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": self.cache_bytes(),
            "driver": _smi("driver_version"),
            "clocks_sm_memory_mhz": _smi("clocks.max.sm,clocks.max.memory"),
            "cuda": torch.version.cuda,
            "host": platform.processor() or platform.machine(),
        }

    def cache_bytes(self) -> int:
        return int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0)) or 64 << 20

    def free_bytes(self) -> int:
        # What torch holds and does not use is free as well.
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + unused

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def lost(self) -> bool:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            return True
        return False

    def sample(self, run: Callable[[Any], Any], buffers: Sequence[Any]) -> Sample:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for inputs in (buffers * WARM_CALLS)[: max(WARM_CALLS, len(buffers))]:
                run(inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for inputs in buffers:
                    run(inputs)
        except RuntimeError as error:
            torch.cuda.synchronize()
            raise NotCapturable(str(error).partition("\n")[0]) from error
        return _Timed(graph.replay, len(buffers), (graph, buffers))

    def eager(self, run: Callable[[Any], Any], buffers: Sequence[Any]) -> Sample:
        for inputs in buffers[:WARM_CALLS]:
            run(inputs)

        def calls() -> None:
            for inputs in buffers:
                run(inputs)

        return _Timed(calls, len(buffers), buffers)

    def kernels(self, call: Callable[[], Any]) -> int | None:
        from torch.profiler import ProfilerActivity, profile

        call()
        torch.cuda.synchronize()
        try:
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                call()
                torch.cuda.synchronize()
            events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        except RuntimeError:
            return None
        return len(events) or None


class _Timed:
    """Samples between two events.

    Args:
        play: launches the calls, once each.
        calls: how many there are.
        keep: what has to live as long as the samples are taken: a graph holds addresses only.
    """

    def __init__(self, play: Callable[[], None], calls: int, keep: Any) -> None:
        self._play, self._calls, self._keep = play, calls, keep
        self._begin, self._end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._seconds(1)
        self._plays = max(1, min(MAX_REPLAYS, round(SAMPLE_SECONDS / max(self._seconds(1), 1e-6))))

    def _seconds(self, plays: int) -> float:
        self._begin.record()
        for _ in range(plays):
            self._play()
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3

    def __call__(self) -> float:
        return self._seconds(self._plays) / (self._plays * self._calls)


class Rehearsal:
    """This machine's CPU, with Triton's interpreter in the GPU's place: every line runs, no time means anything."""

    name = "cpu"
    dtype = torch.float16
    rehearsal = True

    def facts(self) -> dict[str, Any]:
        return {"gpu": "none: a rehearsal in Triton's interpreter", "host": platform.machine()}

    def cache_bytes(self) -> int:
        return 1 << 10

    def free_bytes(self) -> int:
        return 1 << 30

    def synchronize(self) -> None:
        pass

    def lost(self) -> bool:
        return False

    def sample(self, run: Callable[[Any], Any], buffers: Sequence[Any]) -> Sample:
        return self.eager(run, buffers)

    def eager(self, run: Callable[[Any], Any], buffers: Sequence[Any]) -> Sample:
        def sample() -> float:
            began = time.perf_counter()
            run(buffers[0])
            return time.perf_counter() - began

        return sample

    def kernels(self, call: Callable[[], Any]) -> int | None:
        return None


def _smi(query: str) -> str:
    """What nvidia-smi says of the first GPU; it only reads."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"],
            check=True,
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


def folder_name(facts: dict[str, Any]) -> str:
    """A name for this kind of GPU, for the folder of its results."""
    return re.sub(r"[^a-z0-9]+", "-", str(facts["gpu"]).lower()).strip("-")
