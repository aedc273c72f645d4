"""inject_ on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from benchmarks.case import Contender, Inputs, nbytes
from benchmarks.gpu.case import GpuCase, GpuDraw, Specimen, meta
from personafast import ops


def _prompt(rows: int, hidden: int, slots: int) -> GpuCase:
    """Many rows, each of another persona: what memory allows."""

    def make(draw: GpuDraw) -> Inputs:
        return SimpleNamespace(
            hidden=draw.normal(rows, hidden),
            bank=draw.normal(slots, hidden, scale=0.1),
            slots=draw.integers(0, slots, rows),
            scale=0.5 + draw.uniform(rows),
        )

    def plain(inputs: Inputs) -> torch.Tensor:
        added = inputs.bank[inputs.slots].to(inputs.scale.dtype) * inputs.scale[:, None]
        return inputs.hidden.add_(added)

    def traffic(inputs: Inputs) -> int:
        return 2 * nbytes(inputs.hidden) + nbytes(inputs.slots, inputs.scale, inputs.bank)

    return GpuCase(
        name=f"inject_-{rows}x{hidden}",
        operator="inject_",
        shape={"T": rows, "H": hidden, "S": slots},
        make=make,
        plain=plain,
        ours=Contender("ours", lambda i: ops.inject_(i.hidden, i.bank, i.slots, i.scale), traffic),
        baselines=(Contender("gather, scale and add in torch", plain, traffic),),
        mutates=("hidden",),
        copy_share=0.85,
        launches=1,
    )


def cases(tiny: bool = False) -> tuple[GpuCase, ...]:
    if tiny:
        return (_prompt(5, 130, 3),)
    return (_prompt(4096, 4096, 64), _prompt(16384, 4096, 64))


def _specimen(rows: int, hidden: int, dtype: torch.dtype, scaled: bool) -> Specimen:
    from personafast._triton import inject_

    def call() -> None:
        scale = meta(rows, dtype=torch.float32) if scaled else None
        inject_(meta(rows, hidden, dtype=dtype), meta(64, hidden, dtype=dtype), meta(rows, dtype=torch.int32), scale)

    name = f"{str(dtype).removeprefix('torch.')}, {rows} x {hidden}" + (", scaled" if scaled else "")
    traffic = 2 * rows * hidden * dtype.itemsize + min(rows, 64) * hidden * dtype.itemsize
    return Specimen("inject_", name, call, 1, traffic, listed=dtype == torch.bfloat16)


SPECIMENS = (
    *(_specimen(4096, 4096, dtype, True) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    _specimen(8, 896, torch.bfloat16, False),
)
