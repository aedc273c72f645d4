"""From a case to its figures: check every contender, then time them in turns."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import machine
from benchmarks.bandwidth import reader
from benchmarks.case import Absent, Case, Contender, Draw, Inputs, held_bytes
from benchmarks.check import Error, check, references
from benchmarks.memory import extra_memory
from benchmarks.sampler import Rotation, Sample, Spread, interleave, paired, spread, timed_calls
from personafast import ops
from personafast.ops import _backend

READ = "read bandwidth"
# Buffer sets: at least this many, and more until they exceed the last-level cache this many times.
FEWEST, TIMES_CACHE, MOST = 4, 4, 1024
# Buffer sets over which the bytes of a call are averaged.
TRAFFIC_FROM = 16


@dataclass
class Measurement:
    """Samples of every contender of a case, in seconds a call, and the record that goes into the results."""

    samples: dict[str, list[float]]
    record: dict[str, Any]
    absent: dict[str, str] = field(default_factory=dict)


def checked(case: Case) -> tuple[dict[str, Error], dict[str, str]]:
    """(error of every contender that is checked, why others are absent).

    Raises:
        CheckFailed: ours or a baseline is wrong.
    """
    inputs = case.make(Draw(0))
    exact, plain = references(case, inputs)
    errors: dict[str, Error] = {}
    absent: dict[str, str] = {}
    for contender in case.contenders:
        if not contender.same:
            continue
        try:
            own = inputs if contender.prepare is None else contender.prepare(inputs)
            errors[contender.name] = check(case, contender, own, exact, plain)
        except Absent as why:
            absent[contender.name] = str(why)
    return errors, absent


def measure(case: Case, seconds: float) -> Measurement:
    """Check, then time for about `seconds`.

    Raises:
        CheckFailed: a contender is wrong; nothing has been timed.
    """
    errors, absent = checked(case)
    present = [contender for contender in case.contenders if contender.name not in absent]
    extra = extra_memory(case.name) if case.extra_memory else {}
    gc.collect()
    with torch.no_grad():
        buffers = _buffers(case)
        shared = Rotation(buffers)
        rotations = {contender.name: _rotation(contender, shared) for contender in present}
        samples: dict[str, Sample] = {READ: reader().sample}
        for contender in present:
            samples[contender.name] = timed_calls(contender.run, rotations[contender.name])
        taken = interleave(samples, seconds)
    read = [reader().nbytes / seconds / 1e9 for seconds in taken.pop(READ)]
    entries = {
        contender.name: _figures(contender, rotations[contender.name].buffers, taken, read) for contender in present
    }
    for contender in present:
        entry = entries[contender.name]
        if contender.name in errors:
            entry["relative_error"] = float(f"{errors[contender.name].relative:.3g}")
        if contender.name in extra:
            entry["extra_memory_bytes"] = extra[contender.name]
        if contender is not case.ours:
            _compare(entry, entries[case.ours.name], contender, taken[contender.name], taken[case.ours.name])
    total = held_bytes(buffers[0]) * len(buffers)
    record = {
        "name": case.name,
        "operator": case.operator,
        "shape": case.shape,
        "date": machine.today(),
        "commit": machine.commit(),
        "backend": ops.chosen(case.operator)[0] if case.operator in _backend.KERNELS else "",
        "rounds": len(read),
        "buffers": {
            "count": len(buffers),
            "bytes": total,
            "times_last_level_cache": round(total / machine.last_level_cache(), 2),
        },
        "read_bandwidth_gb_s": rounded(spread(read)),
        "ours": entries.pop(case.ours.name),
        "baselines": {
            contender.name: entries.get(contender.name, {"absent": absent.get(contender.name)})
            for contender in case.baselines
        },
    }
    return Measurement(taken, record, absent)


def rounded(values: Spread, digits: int = 4) -> dict[str, float]:
    """A spread as it stands in the results."""
    return {key: float(f"{value:.{digits}g}") for key, value in values._asdict().items()}


def _figures(
    contender: Contender, buffers: Sequence[Inputs], taken: dict[str, list[float]], read: Sequence[float]
) -> dict[str, Any]:
    seconds = taken[contender.name]
    # Some results decide how much has to be read.
    traffic = round(statistics.fmean(contender.traffic(inputs) for inputs in buffers[:TRAFFIC_FROM]))
    entry: dict[str, Any] = {
        "microseconds": rounded(spread([1e6 * value for value in seconds])),
        "bytes": traffic,
        "gb_s": float(f"{traffic / spread(seconds).median / 1e9:.4g}"),
        # Of the bandwidth measured in the same round.
        "share_of_read_bandwidth": rounded(paired([traffic / value / 1e9 for value in seconds], read)),
    }
    if contender.resident is not None:
        entry["resident_bytes"] = contender.resident(buffers[0])
    return entry


def _compare(
    entry: dict[str, Any], ours: dict[str, Any], contender: Contender, theirs: Sequence[float], own: Sequence[float]
) -> None:
    entry["times_faster"] = rounded(paired(theirs, own))
    if contender.goal is not None:
        entry["goal"] = round(contender.goal, 4)
    if "resident_bytes" in ours and "resident_bytes" in entry:
        entry["share_of_its_memory"] = round(ours["resident_bytes"] / entry["resident_bytes"], 4)
    if contender.memory_goal is not None:
        entry["memory_goal"] = contender.memory_goal


def _buffers(case: Case) -> list[Inputs]:
    first = case.make(Draw(0))
    size = max(1, held_bytes(first))
    wanted = min(MOST, max(FEWEST, math.ceil(TIMES_CACHE * machine.last_level_cache() / size)))
    # Half of what is free: the baselines' own weights want room too.
    fits = max(1, machine.available_memory() // 2 // size)
    return [first, *(case.make(Draw(index)) for index in range(1, min(wanted, fits)))]


def _rotation(contender: Contender, shared: Rotation) -> Rotation:
    """The buffer sets of a contender: those of the case, or its own made from them."""
    if contender.prepare is None:
        return shared
    first = contender.prepare(shared.buffers[0])
    fits = max(1, machine.available_memory() // 2 // max(1, held_bytes(first)))
    count = min(len(shared.buffers), contender.buffers or len(shared.buffers), fits)
    return Rotation([first, *(contender.prepare(inputs) for inputs in shared.buffers[1:count])])
