"""What a call allocates beyond its inputs: the growth of a process' largest resident set, C++ and torch alike.

    python -m benchmarks.memory CASE

prints it as JSON. It wants a process of its own: the allocator must hand back what is freed, from the start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.machine import ROOT, require_passive_waiting

if TYPE_CHECKING:
    from benchmarks.case import Case

# Blocks from 64 KiB on are mapped one by one and unmapped when freed; nothing is kept for later.
_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}


def extra_memory(name: str) -> dict[str, int]:
    """Bytes one call of each contender of the case `name` allocates at its peak; empty where there is no Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return {}
    environment = {**os.environ, **_ALLOCATOR}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", name],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{name}: memory was not measured: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, int] = json.loads(done.stdout)
    return found


def resident() -> int:
    """Bytes of this process that are in memory now; 0 where there is no Linux to ask."""
    return _status("VmRSS") if Path("/proc/self/status").exists() else 0


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/self/status has no {key}")


def peaks(case: Case) -> dict[str, int]:
    """What `extra_memory` gives, measured in this process."""
    import torch

    from benchmarks.case import Absent, Draw

    inputs = case.make(Draw(0))
    grown = {}
    with torch.no_grad():
        for contender in case.contenders:
            try:
                own = inputs if contender.prepare is None else contender.prepare(inputs)
            except Absent:
                continue
            # What the first calls set up for good is not a call's own.
            for _ in range(2):
                contender.run(own)
            # "5" sets the peak back to what is resident now.
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            contender.run(own)
            grown[contender.name] = max(0, _status("VmHWM") - before)
    return grown


if __name__ == "__main__":
    require_passive_waiting()
    from benchmarks.cases import CASES

    print(json.dumps(next(peaks(case) for case in CASES if case.name == sys.argv[1])))
