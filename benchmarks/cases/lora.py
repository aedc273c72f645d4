"""A linear and the low-rank updates of its rows' adapters."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.case import Case, Contender, Draw, Inputs, nbytes
from benchmarks.cases.shapes import WEIGHTS, dense, linear_traffic
from personafast import ops


def lora_case(outputs: int, features: int, rows: int, adapters: int, rank: int, goal: float | None = None) -> Case:
    """Every row but the last has an adapter of its own, as the members of a density ratio have; the last has none."""

    def make(draw: Draw) -> Inputs:
        slots = torch.arange(rows, dtype=torch.int32)
        slots[slots >= adapters] = -1
        return SimpleNamespace(
            x=draw.normal(rows, features),
            weight=draw.weight(outputs, features),
            a=draw.normal(adapters, rank, features, scale=features**-0.5),
            # As `attach` stores it: a view of [M, R, O].
            b=draw.normal(adapters, rank, outputs).transpose(1, 2),
            slots=slots,
            scale=0.5 + draw.uniform(adapters),
            ranks=torch.full((adapters,), rank, dtype=torch.int32),
        )

    def loop(inputs: Inputs) -> torch.Tensor:
        out = F.linear(inputs.x, inputs.weight)
        for row, slot in enumerate(inputs.slots.tolist()):
            if slot >= 0:
                inner = inputs.scale[slot].to(inputs.x.dtype) * (inputs.x[row : row + 1] @ inputs.a[slot].T)
                out[row : row + 1].addmm_(inner, inputs.b[slot].T)
        return out

    def ours(inputs: Inputs) -> torch.Tensor:
        return ops.lora_delta_(dense(inputs), inputs.x, inputs.a, inputs.b, inputs.slots, inputs.scale, inputs.ranks)

    def traffic(inputs: Inputs) -> int:
        return linear_traffic(inputs) + nbytes(inputs.a, inputs.b)

    return Case(
        name=f"lora_delta-{outputs}x{features}-rows{rows}-adapters{adapters}-rank{rank}",
        operator="lora_delta_",
        needs=("linear",),
        shape={"O": outputs, "I": features, "T": rows, "M": adapters, "R": rank},
        make=make,
        plain=loop,
        ours=Contender("ours", ours, traffic),
        baselines=(
            Contender("F.linear and a loop over adapters", loop, traffic),
            Contender("our dense pass", dense, linear_traffic, goal=goal, same=False),
        ),
    )


CASES: tuple[Case, ...] = tuple(
    case
    for outputs, features in WEIGHTS
    for case in (
        lora_case(outputs, features, rows=17, adapters=16, rank=8, goal=1 / 1.3),
        lora_case(outputs, features, rows=1, adapters=1, rank=16),
    )
)
