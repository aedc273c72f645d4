"""Linears: dense, masked and compressed."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks import quantised
from benchmarks.case import Case, Contender, Draw, Inputs, nbytes
from benchmarks.cases.shapes import WEIGHTS, dense, linear, linear_traffic, masked, weight_bytes
from personafast import ops

DENSE_ROWS = (1, 2, 4, 5, 8, 16, 17, 24, 32)
MASKED_ROWS = (1, 4, 8, 16)
SPARSE_ROWS = (1, 4, 8)

DENSE_GOALS = {1: 1.8, 5: 1.2, 17: 1.2}


def dense_case(outputs: int, features: int, rows: int) -> Case:
    def make(draw: Draw) -> Inputs:
        return SimpleNamespace(
            x=draw.normal(rows, features),
            weight=draw.weight(outputs, features),
            none=torch.zeros(0, outputs, features // 32, dtype=torch.int32),
            nobody=torch.full((rows,), -1, dtype=torch.int32),
        )

    def without_masks(inputs: Inputs) -> torch.Tensor:
        return ops.masked_linear(inputs.x, inputs.weight, inputs.none, inputs.nobody)

    return Case(
        name=f"linear-{outputs}x{features}-rows{rows}",
        operator="linear",
        needs=("masked_linear",),
        shape={"O": outputs, "I": features, "T": rows},
        make=make,
        plain=linear,
        ours=Contender("ours", dense, linear_traffic, resident=weight_bytes),
        baselines=(
            Contender("F.linear", linear, linear_traffic, resident=weight_bytes, goal=DENSE_GOALS.get(rows)),
            Contender("masked_linear, every slot -1", without_masks, linear_traffic, resident=weight_bytes),
            *(quantised.baselines() if rows == 1 else ()),
        ),
    )


def masked_case(outputs: int, features: int, rows: int) -> Case:
    """Every row has a mask of its own."""

    def make(draw: Draw) -> Inputs:
        return SimpleNamespace(
            x=draw.normal(rows, features),
            weight=draw.weight(outputs, features),
            masks=draw.mask_words(rows, outputs, features // 32),
            slots=torch.randperm(rows, generator=draw.generator).to(torch.int32),
        )

    def plain(inputs: Inputs) -> torch.Tensor:
        passes = [
            F.linear(inputs.x[row : row + 1], masked(inputs.weight, inputs.masks[slot]))
            for row, slot in enumerate(inputs.slots.tolist())
        ]
        return torch.cat(passes)

    def prepare(inputs: Inputs) -> Inputs:
        copies = [masked(inputs.weight, inputs.masks[slot]) for slot in inputs.slots.tolist()]
        return SimpleNamespace(x=inputs.x, copies=copies)

    return Case(
        name=f"masked_linear-{outputs}x{features}-rows{rows}-masks{rows}",
        operator="masked_linear",
        needs=("linear",),
        shape={"O": outputs, "I": features, "T": rows, "P": rows},
        make=make,
        plain=plain,
        ours=Contender(
            "ours",
            lambda inputs: ops.masked_linear(inputs.x, inputs.weight, inputs.masks, inputs.slots),
            lambda inputs: linear_traffic(inputs) + nbytes(inputs.masks),
            resident=lambda inputs: nbytes(inputs.weight, inputs.masks),
        ),
        baselines=(
            Contender(
                f"F.linear over {rows} masked copies" if rows > 1 else "F.linear over the masked copy",
                _over_copies,
                lambda inputs: nbytes(inputs.x, *inputs.copies) + 2 * rows * outputs,
                prepare,
                lambda inputs: nbytes(*inputs.copies),
                goal={8: 6.0}.get(rows),
                memory_goal={8: 0.19}.get(rows),
                buffers=max(1, 4 // rows),
            ),
            Contender(
                "our dense pass", dense, linear_traffic, resident=weight_bytes, goal={4: 1 / 1.6}.get(rows), same=False
            ),
        ),
    )


def _over_copies(inputs: Inputs) -> torch.Tensor:
    return torch.cat([F.linear(inputs.x[row : row + 1], copy) for row, copy in enumerate(inputs.copies)])


def sparse_case(outputs: int, features: int, rows: int) -> Case:
    """One mask that keeps half of the weights."""

    def make(draw: Draw) -> Inputs:
        return SimpleNamespace(
            x=draw.normal(rows, features),
            weight=draw.weight(outputs, features),
            mask=draw.mask_words(outputs, features // 32),
        )

    def half(inputs: Inputs) -> Inputs:
        weight = masked(inputs.weight, inputs.mask)
        return SimpleNamespace(x=inputs.x, weight=weight)

    def compress(inputs: Inputs) -> Inputs:
        return SimpleNamespace(x=inputs.x, packed=ops.compress(inputs.weight, inputs.mask))

    return Case(
        name=f"sparse_linear-{outputs}x{features}-half-rows{rows}",
        operator="sparse_linear",
        needs=("compress", "linear"),
        shape={"O": outputs, "I": features, "T": rows},
        make=make,
        plain=lambda inputs: linear(half(inputs)),
        ours=Contender(
            "ours",
            lambda inputs: ops.sparse_linear(inputs.x, *inputs.packed),
            lambda inputs: nbytes(inputs.x, *inputs.packed) + 2 * rows * outputs,
            compress,
            lambda inputs: nbytes(*inputs.packed),
        ),
        baselines=(
            Contender("F.linear, dense", linear, linear_traffic, half, weight_bytes, goal={1: 3.0}.get(rows)),
            Contender("our dense pass", dense, linear_traffic, half, weight_bytes, goal={1: 1.4}.get(rows)),
            *(quantised.baselines(half) if rows == 1 else ()),
        ),
    )


CASES: tuple[Case, ...] = tuple(
    case
    for outputs, features in WEIGHTS
    for case in (
        *(dense_case(outputs, features, rows) for rows in DENSE_ROWS),
        *(masked_case(outputs, features, rows) for rows in MASKED_ROWS),
        *(sparse_case(outputs, features, rows) for rows in SPARSE_ROWS),
    )
)
