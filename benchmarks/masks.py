"""What personas by mask cost on a CPU beside the linears' time: `python -m benchmarks.masks`.

Eight masks over the 0.5 B shape of `decode` in bf16: bytes in memory, the time to let another mask speak, the time of a
decoding step of eight rows with hard masks, soft masks and mixtures, and what turning a transposed weight in memory
saves. Writes benchmarks/results/masks.json.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

import personafast as pf
from benchmarks import machine
from benchmarks.decode import SHAPES, drawn, random_mask
from benchmarks.measure import rounded
from benchmarks.memory import resident
from benchmarks.sampler import Rotation, interleave, paired, spread, timed_calls
from personafast import ops
from personafast._io import write_json
from personafast.models.anatomy import anatomy

PAGE = machine.ROOT / "benchmarks" / "results" / "masks.json"
MASKS, SECONDS = 8, 40.0
# Memory of eight personas in one batch, in models; eight models otherwise.
GOAL = 1.6


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGE, help="the file to write")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each comparison of times")
    options = parser.parse_args(arguments)
    machine.require_passive_waiting()
    report = {"hardware": machine.hardware(), "versions": machine.versions(), "model": SHAPES[0].name}
    report |= {"date": machine.today(), "commit": machine.commit()}
    with torch.no_grad():
        net = drawn(SHAPES[0])
        report["memory"], handle = memory(net)
        report["switching"] = switching(handle, options.seconds)
        report["decoding"] = decoding(handle, options.seconds)
        handle.detach()
        report["transposed"] = transposed(options.seconds / 4)
    write_json(options.out, report)
    print(json.dumps({key: report[key] for key in ("memory", "switching", "decoding", "transposed")}, indent=2))
    return 0


def memory(net: Any) -> tuple[dict[str, Any], pf.PersonaHandle]:
    """Bytes of the model alone, and with eight masks attached and the library that holds them; the handle."""
    alone, before = held(net.parameters()), _settled()
    masked = held(linear.weight for linear in anatomy(net).linears.values())
    handle = pf.attach(net, library(net))
    bank = handle.cast.patch.masks
    words = [word for mask in handle.library.masks.values() for word in mask.words.values()]
    together = held([*net.parameters(), *words, *bank.tensors.values()])
    return {
        "masks": MASKS,
        "model_bytes": alone,
        "masked_weight_bytes": masked,
        "with_masks_bytes": together,
        "models": round(together / alone, 4),
        "bytes_a_masked_weight": round((together - alone + masked) / (masked / 2), 4),
        # By what the process has grown since the model was all it held.
        "resident_models": round(1 + (_settled() - before) / alone, 4) if before else None,
        "goal": GOAL,
    }, handle


def library(net: Any) -> pf.PersonaLibrary:
    """Masks that keep half of the weights each."""
    found = pf.PersonaLibrary()
    for seed in range(MASKS):
        found.add_mask(f"mask{seed}", random_mask(net, seed))
    return found


def held(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages under some tensors, each once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def switching(handle: pf.PersonaHandle, seconds: float) -> dict[str, Any]:
    """Microseconds to let others speak, and to multiply a mask into the weights instead."""
    names = itertools.cycle(handle.library.masks)
    # More than there are slots for: each is a new one.
    shares = itertools.cycle(index / 500 for index in range(1, 500))

    def using(rows: int, make: Callable[[], pf.Persona]) -> None:
        with handle.using([make() for _ in range(rows)]):
            pass

    def alone() -> pf.Persona:
        return pf.Persona(mask=next(names))

    def mixed() -> pf.Persona:
        return pf.Persona(mask={"mask0": next(shares), "mask1": 1.0})

    def rows() -> None:
        given = handle.cast.spread([alone() for _ in range(MASKS)], MASKS)
        handle.cast.rows(given, [[1, 2, 3]] * MASKS, "direct", "auto")

    linears = anatomy(handle.model).linears
    weights = {path: linear.weight.detach() for path, linear in linears.items()}
    # One byte a weight, as the authors store them; the dense weights have to be kept for the next persona.
    mask = handle.library.masks["mask0"]
    byte_masks = {path: mask.dense(path) for path in weights}
    scratch = {path: weight.clone() for path, weight in weights.items()}

    def multiplied() -> None:
        for path, own in scratch.items():
            own.copy_(weights[path]).mul_(byte_masks[path])

    ways = {
        "multiplied into the weights": multiplied,
        "using, one row": functools.partial(using, 1, alone),
        "using, eight rows": functools.partial(using, MASKS, alone),
        "using, one row, a new mixture of two": functools.partial(using, 1, mixed),
        "generate, eight rows": rows,
    }
    return _compare(ways, seconds, "multiplied into the weights", "us", 1e6)


def decoding(handle: pf.PersonaHandle, seconds: float) -> dict[str, Any]:
    """Milliseconds of a pass of eight rows and one token each."""
    for name in ("mask0", "mask1"):
        handle.library.add_mask(f"soft-{name}", handle.library.masks[name].with_metadata(gamma=0.2))
    model: Any = handle.model
    token = torch.randint(5, model.config.vocab_size, (MASKS, 1), generator=torch.Generator().manual_seed(1))
    kinds: dict[str, list[pf.Persona | None]] = {
        "no persona": [None] * MASKS,
        "eight hard masks": [pf.Persona(mask=f"mask{index}") for index in range(MASKS)],
        "one hard mask": [pf.Persona(mask="mask0")] * MASKS,
        "one soft mask": [pf.Persona(mask="soft-mask0")] * MASKS,
        "one mixture of two": [pf.Persona(mask={"mask0": 0.7, "mask1": 0.3})] * MASKS,
    }

    def step(personas: Sequence[pf.Persona | None]) -> None:
        model(token, personas=personas, use_cache=False)

    ways = {name: functools.partial(step, personas) for name, personas in kinds.items()}
    return _compare(ways, seconds, "eight hard masks", "ms", 1e3)


def transposed(seconds: float) -> dict[str, Any]:
    """Milliseconds of one masked linear whose weight lies as [in, out], as it is and turned in memory."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(2))
    stored = draw(768, 3072).bfloat16()
    turned = stored.t().contiguous()
    x, slots = draw(8, 768).bfloat16(), torch.arange(8, dtype=torch.int32)
    words = torch.randint(-(2**31), 2**31, (8, 3072, 24), dtype=torch.int32)
    ways = {
        "as stored": lambda: ops.masked_linear(x, stored.t(), words, slots),
        "turned": lambda: ops.masked_linear(x, turned, words, slots),
    }
    return _compare(ways, seconds, "as stored", "ms", 1e3)


def _compare(
    ways: dict[str, Callable[[], Any]], seconds: float, baseline: str, unit: str, scale: float
) -> dict[str, Any]:
    samples = {name: timed_calls(lambda way: way(), Rotation([way])) for name, way in ways.items()}
    taken = interleave(samples, seconds)
    found: dict[str, Any] = {"baseline": baseline, "rounds": len(taken[baseline])}
    for name, times in taken.items():
        found[name] = {unit: rounded(spread([scale * value for value in times]))}
        if name != baseline:
            found[name]["times_faster"] = rounded(paired(taken[baseline], times))
    return found


def _settled() -> int:
    gc.collect()
    # glibc keeps what was freed for later; a process that needs it elsewhere would not.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return resident()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
