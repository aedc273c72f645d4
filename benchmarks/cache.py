"""What a cache of fixed size costs a decoding step on a CPU: `python -m benchmarks.cache`.

The same attached model decodes the same tokens over transformers' `DynamicCache` and over `RowCache`, a step of each in
turn, from the same length on; with rows of one length, and with rows of several. Writes
benchmarks/results/cache.json.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import personafast as pf
from benchmarks import machine
from benchmarks.decode import SHAPES, drawn
from benchmarks.measure import rounded
from benchmarks.sampler import interleave, paired, spread
from personafast._io import write_json
from personafast.models.cache import RowCache
from personafast.models.row_attention import attending

PAGE = machine.ROOT / "benchmarks" / "results" / "cache.json"
LENGTHS, ROWS, SECONDS = (64, 512), (1, 8), 30.0
# How much slower a step over the fixed cache may be.
GOAL = 1.05


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGE, help="the file to write")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each case")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    options = parser.parse_args(arguments)
    machine.require_passive_waiting()
    net = drawn(SHAPES[0])
    records = []
    with pf.attach(net), torch.no_grad():
        for rows in ROWS:
            for length in LENGTHS:
                records.append(compare(net, rows, length, options.seconds))
                if not options.json:
                    print(line(records[-1]), flush=True)
    report = {"hardware": machine.hardware(), "versions": machine.versions(), "model": SHAPES[0].name}
    report |= {"date": machine.today(), "commit": machine.commit(), "goal": GOAL, "records": records}
    write_json(options.out, report)
    if options.json:
        print(json.dumps(report, indent=2))
    return 0


def compare(net: Any, rows: int, length: int, seconds: float) -> dict[str, Any]:
    """Milliseconds a step and their ratio, rows of one length and rows that differ by one token each."""
    steps = {
        "dynamic": _dynamic(net, rows, length),
        "fixed": _fixed(net, rows, length, ragged=False),
        "fixed, ragged rows": _fixed(net, rows, length, ragged=True),
    }
    taken = interleave(steps, seconds)
    found: dict[str, Any] = {"rows": rows, "length": length, "rounds": len(taken["dynamic"])}
    for name, times in taken.items():
        found[name] = {"ms": rounded(spread([1e3 * value for value in times]))}
        if name != "dynamic":
            found[name]["times_slower"] = rounded(paired(times, taken["dynamic"]))
    return found


def line(record: dict[str, Any]) -> str:
    even, ragged = record["fixed"]["times_slower"], record["fixed, ragged rows"]["times_slower"]
    return (
        f"{record['rows']} rows of {record['length']}: DynamicCache {record['dynamic']['ms']['median']:.2f} ms a step, "
        f"RowCache {even['median']:.3f}x [{even['low']:.3f}, {even['high']:.3f}], "
        f"ragged {ragged['median']:.3f}x [{ragged['low']:.3f}, {ragged['high']:.3f}]"
    )


def _dynamic(net: Any, rows: int, length: int) -> Callable[[], float]:
    from transformers import DynamicCache

    cache = DynamicCache()
    net(torch.ones(rows, length, dtype=torch.long), past_key_values=cache, use_cache=True, logits_to_keep=1)
    token = torch.ones(rows, 1, dtype=torch.long)

    def step() -> float:
        began = time.perf_counter()
        net(token, past_key_values=cache, use_cache=True)
        taken = time.perf_counter() - began
        # Back to the length of the other contenders.
        cache.crop(-1)
        return taken

    return step


def _fixed(net: Any, rows: int, length: int, ragged: bool) -> Callable[[], float]:
    cache = RowCache(net.config.num_hidden_layers, rows, length + 64, torch.device("cpu"))

    def run(tokens: torch.Tensor) -> None:
        plan = cache.begin(tokens.shape[1])
        with attending(net):
            net(tokens, position_ids=plan.positions, past_key_values=cache, use_cache=True, logits_to_keep=1)

    run(torch.ones(rows, length, dtype=torch.long))
    cache.advance(length - torch.arange(rows) % 5 if ragged else length)
    token = torch.ones(rows, 1, dtype=torch.long)

    def step() -> float:
        began = time.perf_counter()
        run(token)
        return time.perf_counter() - began

    return step


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
