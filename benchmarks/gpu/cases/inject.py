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


def _blocks(blocks: int, rows: int, hidden: int, fewer: tuple[int, ...]) -> GpuCase:
    """A step of decoding: every block with its own bank and hidden, every row of another persona.

    The baselines are the same calls with fewer distinct personas in the batch.
    """

    def make(draw: GpuDraw) -> Inputs:
        return SimpleNamespace(
            hidden=draw.normal(blocks, rows, hidden),
            bank=draw.normal(blocks, rows, hidden, scale=0.1),
            slots=torch.randperm(rows, generator=draw.generator, device=draw.device).int(),
            scale=0.5 + draw.uniform(rows),
        )

    def plain(inputs: Inputs) -> torch.Tensor:
        added = inputs.bank[:, inputs.slots].to(inputs.scale.dtype) * inputs.scale[:, None]
        return inputs.hidden.add_(added)

    def ours(inputs: Inputs) -> torch.Tensor:
        for block in range(blocks):
            ops.inject_(inputs.hidden[block], inputs.bank[block], inputs.slots, inputs.scale)
        return inputs.hidden

    def traffic(distinct: int, inputs: Inputs) -> int:
        return 2 * nbytes(inputs.hidden) + nbytes(inputs.bank) * distinct // rows

    def shared(distinct: int) -> Contender:
        return Contender(
            f"{distinct} distinct personas",
            ours,
            lambda inputs: traffic(distinct, inputs),
            prepare=lambda inputs: SimpleNamespace(**{**vars(inputs), "slots": inputs.slots % distinct}),
            goal=0.99,
            same=False,
        )

    return GpuCase(
        name=f"inject_-{blocks}-blocks-{rows}x{hidden}-personas",
        operator="inject_",
        shape={"T": rows, "H": hidden, "S": rows, "blocks": blocks},
        make=make,
        plain=plain,
        ours=Contender(f"{rows} distinct personas", ours, lambda inputs: traffic(rows, inputs)),
        baselines=tuple(shared(distinct) for distinct in fewer),
        mutates=("hidden",),
        launches=blocks,
    )


def cases(tiny: bool = False) -> tuple[GpuCase, ...]:
    if tiny:
        return (_prompt(5, 130, 3), _blocks(2, 4, 100, (1, 2)))
    return (
        _prompt(4096, 4096, 64),
        _prompt(16384, 4096, 64),
        # All banks at once in L2, and twice what L2 holds.
        _blocks(32, 256, 896, (1, 8, 64)),
        _blocks(32, 256, 4096, (1, 8, 64)),
    )


def _specimen(rows: int, hidden: int, dtype: torch.dtype, scaled: bool, bank: torch.dtype | None = None) -> Specimen:
    from personafast._triton import inject_

    bank = bank or dtype

    def call() -> None:
        scale = meta(rows, dtype=torch.float32) if scaled else None
        inject_(meta(rows, hidden, dtype=dtype), meta(64, hidden, dtype=bank), meta(rows, dtype=torch.int32), scale)

    name = f"{str(dtype).removeprefix('torch.')}, {rows} x {hidden}" + (", scaled" if scaled else "")
    if bank != dtype:
        name += f", bank of {str(bank).removeprefix('torch.')}"
    traffic = 2 * rows * hidden * dtype.itemsize + min(rows, 64) * hidden * bank.itemsize
    return Specimen("inject_", name, call, 1, traffic, listed=dtype == bank == torch.bfloat16)


SPECIMENS = (
    *(_specimen(4096, 4096, dtype, True) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    _specimen(4096, 4096, torch.bfloat16, True, torch.float32),
    _specimen(256, 4096, torch.bfloat16, True),
    _specimen(8, 896, torch.bfloat16, False),
    _specimen(8, 1536, torch.bfloat16, False),
)
