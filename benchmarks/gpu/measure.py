"""From a case to its record: checked on poisoned memory, then timed beside its baselines."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import machine
from benchmarks.case import Absent, Contender, Inputs, held_bytes
from benchmarks.check import CheckFailed, Error, check, fresh, references, tensors
from benchmarks.gpu.case import GpuCase, GpuDraw
from benchmarks.gpu.device import Device, NotCapturable, Sample
from benchmarks.measure import rounded
from benchmarks.sampler import paired, spread

CHECKS = 2
# Buffer sets: until they exceed the cache this many times, within these numbers.
TIMES_CACHE, FEWEST, MOST = 4, 2, 64
MIN_ROUNDS, MAX_ROUNDS = 9, 60
HOST_CALLS = 100


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN, or the greatest integer, so that whatever a kernel leaves unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def checked(
    case: GpuCase, device: Device, seed: int, dtype: torch.dtype | None = None
) -> tuple[dict[str, Error], dict[str, str]]:
    """(error of every contender that is checked, why others are absent), on fresh random inputs of `dtype`.

    Raises:
        CheckFailed: ours is wrong, or gives other bits when called again. A baseline that is wrong is absent.
    """
    errors: dict[str, Error] = {}
    absent: dict[str, str] = {}
    with torch.no_grad(), poisoned():
        for turn in range(CHECKS):
            inputs = case.make(GpuDraw(seed + turn, device.name, dtype or device.dtype))
            exact, plain = references(case, inputs)
            for contender in case.contenders:
                if not contender.same or contender.name in absent:
                    continue
                try:
                    own = inputs if contender.prepare is None else contender.prepare(inputs)
                    error = check(case, contender, own, exact, plain)
                    device.synchronize()
                except Absent as why:
                    absent[contender.name] = str(why)
                except Exception as why:
                    if contender is case.ours:
                        raise
                    absent[contender.name] = f"failed: {_line(why)}"
                else:
                    worst = errors.get(contender.name)
                    if worst is None or error.relative > worst.relative:
                        errors[contender.name] = error
            _check_repeats(case, inputs)
    return errors, absent


def _check_repeats(case: GpuCase, inputs: Inputs) -> None:
    first, second = ([part.clone() for part in _outcome(case, inputs)] for _ in range(2))
    for one, other in zip(first, second, strict=True):
        if not torch.equal(one.nan_to_num(), other.nan_to_num()):
            raise CheckFailed(f"{case.name}: two calls on the same inputs differ in {int((one != other).sum())} values")


def _outcome(case: GpuCase, inputs: Inputs) -> list[torch.Tensor]:
    result = case.ours.run(fresh(case, inputs))
    return tensors(result if case.observe is None else case.observe(inputs, result))


def measure(case: GpuCase, device: Device, seed: int, seconds: float, copy_gb_s: float) -> dict[str, Any]:
    """The record of a case: its errors, then its times in about `seconds`.

    Raises:
        CheckFailed: ours is wrong; nothing has been timed.
    """
    errors, absent = checked(case, device, seed)
    gc.collect()
    with torch.no_grad():
        buffers = _buffers(case, device, seed)
        samples: dict[str, Sample] = {}
        eager: list[str] = []
        for contender in case.contenders:
            if contender.name in absent:
                continue
            try:
                samples[contender.name] = _sample(contender, device, buffers, eager)
            except Exception as why:
                if contender is case.ours:
                    raise
                absent[contender.name] = f"failed: {_line(why)}"
        taken = _interleave(samples, seconds)
        host = _host_microseconds(case, device, buffers[0])
        kernels = device.kernels(lambda: case.ours.run(buffers[0]))
        traffic = {c.name: c.traffic(buffers[0]) for c in case.contenders if c.name in taken}
    record: dict[str, Any] = {
        "name": case.name,
        "operator": case.operator,
        "shape": case.shape,
        "date": machine.today(),
        "rounds": len(taken[case.ours.name]),
        "buffers": {"count": len(buffers), "bytes": held_bytes(buffers[0]) * len(buffers)},
        "host_us_a_call": float(f"{host:.3g}"),
        "kernels_a_call": kernels,
    }
    if case.launches is not None:
        record["kernels_goal"] = case.launches
    if case.copy_share is not None:
        record["copy_share_goal"] = case.copy_share
    entries = {name: _figures(taken[name], traffic[name], copy_gb_s) for name in taken}
    for contender in case.contenders:
        if contender.name not in entries:
            continue
        entry = entries[contender.name]
        if contender.name in errors:
            entry["relative_error"] = float(f"{errors[contender.name].relative:.3g}")
        if contender.name in eager:
            entry["eager"] = True
        if contender is not case.ours:
            entry["times_faster"] = rounded(paired(taken[contender.name], taken[case.ours.name]))
            if contender.goal is not None:
                entry["goal"] = round(contender.goal, 4)
    record["ours"] = entries.pop(case.ours.name)
    record["baselines"] = {c.name: entries.get(c.name, {"absent": absent.get(c.name)}) for c in case.baselines}
    return record


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _buffers(case: GpuCase, device: Device, seed: int) -> list[Inputs]:
    first = case.make(GpuDraw(seed, device.name, device.dtype))
    size = max(1, held_bytes(first))
    wanted = min(MOST, max(FEWEST, math.ceil(TIMES_CACHE * device.cache_bytes() / size)))
    # A third of what is free: the baselines' own weights want room too.
    fits = max(1, device.free_bytes() // 3 // size)
    makers = range(1, min(wanted, fits))
    return [first, *(case.make(GpuDraw(seed + index, device.name, device.dtype)) for index in makers)]


def _sample(contender: Contender, device: Device, buffers: Sequence[Inputs], eager: list[str]) -> Sample:
    """Samples from graph replays; from eager calls, whose names go into `eager`, where a graph cannot hold them."""
    if contender.prepare is not None:
        first = contender.prepare(buffers[0])
        fits = max(1, device.free_bytes() // 3 // max(1, held_bytes(first)))
        count = min(len(buffers), contender.buffers or len(buffers), fits)
        buffers = [first, *(contender.prepare(inputs) for inputs in buffers[1:count])]
    try:
        return device.sample(contender.run, buffers)
    except NotCapturable:
        eager.append(contender.name)
        return device.eager(contender.run, buffers)


def _interleave(samples: dict[str, Sample], seconds: float) -> dict[str, list[float]]:
    """Rounds of one sample each, in an order drawn anew, so that ratios are those of one moment."""
    taken: dict[str, list[float]] = {name: [] for name in samples}
    order = list(samples)
    until = time.monotonic() + seconds
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.monotonic() > until:
            break
        random.shuffle(order)
        for name in order:
            taken[name].append(samples[name]())
    return taken


def _host_microseconds(case: GpuCase, device: Device, inputs: Inputs) -> float:
    """What a call costs the thread that makes it, while the device is still busy with the calls before."""
    run: Callable[[Inputs], Any] = case.ours.run
    calls = 1 if device.rehearsal else HOST_CALLS
    times = []
    for _ in range(3):
        device.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            run(inputs)
        times.append((time.perf_counter() - began) / calls)
        device.synchronize()
    return 1e6 * statistics.median(times)


def _figures(seconds: Sequence[float], traffic: int, copy_gb_s: float) -> dict[str, Any]:
    microseconds = rounded(spread([1e6 * value for value in seconds]))
    gb_s = traffic / (microseconds["median"] * 1e-6) / 1e9
    return {
        "microseconds": microseconds,
        "bytes": traffic,
        "gb_s": float(f"{gb_s:.4g}"),
        "share_of_copy_bandwidth": float(f"{gb_s / copy_gb_s:.3g}"),
    }
