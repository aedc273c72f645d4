"""masked_linear on a GPU: a few rows of a batch that decodes, and prompts."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.case import Contender, Inputs, nbytes
from benchmarks.gpu.case import GpuCase, GpuDraw, Specimen, meta
from personafast import ops


def _masked(weight: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """`weight` where the packed mask has ones, else 0; independent of the operators that are measured."""
    kept = (words[..., None] >> torch.arange(32, dtype=torch.int32, device=words.device)) & 1
    return torch.where(kept.flatten(-2)[:, : weight.shape[1]] != 0, weight, weight.new_zeros(()))


def _dense_traffic(inputs: Inputs) -> int:
    return nbytes(inputs.weight, inputs.x) + inputs.x.shape[0] * inputs.weight.shape[0] * inputs.x.element_size()


def _over_copies(inputs: Inputs) -> torch.Tensor:
    out = inputs.x.new_empty((inputs.x.shape[0], inputs.copies[0].shape[0]))
    for rows, copy in zip(inputs.rows, inputs.copies, strict=True):
        out[rows] = F.linear(inputs.x[rows], copy)
    return out


def _case(outputs: int, features: int, rows: int, masks: int, goal: float | None, launches: int) -> GpuCase:
    """Row t has mask t mod `masks`."""

    def make(draw: GpuDraw) -> Inputs:
        return SimpleNamespace(
            x=draw.normal(rows, features),
            weight=draw.weight(outputs, features),
            masks=draw.mask_words(masks, outputs, -(-features // 32)),
            slots=torch.arange(rows, dtype=torch.int32, device=draw.device) % masks,
        )

    def plain(inputs: Inputs) -> torch.Tensor:
        out = inputs.x.new_empty((rows, outputs))
        for slot in range(masks):
            out[slot::masks] = F.linear(inputs.x[slot::masks], _masked(inputs.weight, inputs.masks[slot]))
        return out

    def prepare(inputs: Inputs) -> Inputs:
        return SimpleNamespace(
            x=inputs.x,
            rows=[slice(slot, None, masks) for slot in range(masks)],
            copies=[_masked(inputs.weight, inputs.masks[slot]) for slot in range(masks)],
        )

    def copies_traffic(inputs: Inputs) -> int:
        return nbytes(inputs.x, *inputs.copies) + rows * outputs * inputs.x.element_size()

    return GpuCase(
        name=f"masked_linear-{outputs}x{features}-rows{rows}-masks{masks}",
        operator="masked_linear",
        shape={"O": outputs, "I": features, "T": rows, "P": masks},
        make=make,
        plain=plain,
        ours=Contender(
            "ours",
            lambda i: ops.masked_linear(i.x, i.weight, i.masks, i.slots),
            lambda i: _dense_traffic(i) + nbytes(i.masks),
            resident=lambda i: nbytes(i.weight, i.masks),
        ),
        baselines=(
            Contender(
                "cuBLAS dense pass",
                lambda i: F.linear(i.x, i.weight),
                _dense_traffic,
                resident=lambda i: nbytes(i.weight),
                goal=goal,
                same=False,
            ),
            Contender(
                "one cuBLAS pass per mask",
                _over_copies,
                copies_traffic,
                prepare,
                resident=lambda i: nbytes(*i.copies),
                buffers=max(1, 4 // masks),
            ),
        ),
        launches=launches,
    )


def cases(tiny: bool = False) -> tuple[GpuCase, ...]:
    if tiny:
        return (_case(20, 300, 8, 8, None, 1), _case(40, 80, 40, 2, None, 2))
    return (
        _case(14336, 4096, 8, 8, 1 / 1.8, 1),
        _case(14336, 4096, 1, 1, None, 1),
        _case(14336, 4096, 8, 1, None, 1),
        _case(1024, 4096, 8, 8, None, 1),
        _case(14336, 4096, 2048, 4, None, 2),
    )


def _specimen(
    rows: int,
    masks: int,
    outputs: int,
    features: int,
    dtype: torch.dtype = torch.bfloat16,
    soft: bool = False,
    listed: bool = False,
) -> Specimen:
    from personafast._triton import masked_linear
    from personafast._triton.masked_linear import masked_linear_way

    words = -(-features // 32)
    many = masked_linear_way(rows, masks) == "many"

    def call() -> None:
        masked_linear(
            meta(rows, features, dtype=dtype),
            meta(outputs, features, dtype=dtype),
            meta(masks, outputs, words, dtype=torch.int32),
            meta(rows, dtype=torch.int32),
            meta(masks, dtype=torch.float32) if soft else None,
            None if soft else meta(outputs, dtype=dtype),
        )

    name = f"{str(dtype).removeprefix('torch.')}, {rows} rows, {masks} masks, {outputs} x {features}"
    traffic = (outputs * features + rows * (outputs + features)) * dtype.itemsize + 4 * masks * outputs * words
    return Specimen(
        "masked_linear",
        name + (", gamma" if soft else ""),
        call,
        2 if many else 1,
        traffic,
        ("masked_linear_many_kernel",) if many and dtype != torch.float32 else (),
        listed,
    )


SPECIMENS = (
    _specimen(8, 8, 14336, 4096, listed=True),
    _specimen(8, 8, 14336, 4096, torch.float32),
    _specimen(8, 8, 14336, 4096, soft=True),
    _specimen(1, 1, 14336, 4096, listed=True),
    _specimen(4, 2, 1024, 2880, torch.float16),
    _specimen(3, 2, 1001, 999),
    _specimen(2048, 4, 14336, 4096, listed=True),
    _specimen(2048, 4, 14336, 4096, torch.float16, soft=True),
    _specimen(64, 3, 1024, 2880, torch.float32),
    _specimen(64, 3, 1001, 999),
    _specimen(64, 1, 896, 4864),
)
