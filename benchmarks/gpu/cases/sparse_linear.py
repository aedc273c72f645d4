"""compress and sparse_linear on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.case import Contender, Inputs, nbytes
from benchmarks.gpu.case import GpuCase, GpuDraw, Specimen, meta
from personafast import ops


def _case(outputs: int, features: int, rows: int, density: float = 0.5, goal: float | None = None) -> GpuCase:
    def make(draw: GpuDraw) -> Inputs:
        kept = draw.uniform(outputs, features) < density
        weight = draw.normal(outputs, features, scale=features**-0.5) * kept
        # As the library does once for a layer, and not what is timed here.
        with ops.use_backend("reference"):
            packed = ops.compress(weight, ops.pack_mask(kept))
        return SimpleNamespace(x=draw.normal(rows, features), weight=weight, packed=packed)

    def linear(inputs: Inputs) -> torch.Tensor:
        return F.linear(inputs.x, inputs.weight)

    return GpuCase(
        name=f"sparse_linear-{outputs}x{features}-{round(100 * density)}percent-rows{rows}",
        operator="sparse_linear",
        needs=("compress", "pack_mask"),
        shape={"O": outputs, "I": features, "T": rows},
        make=make,
        plain=linear,
        ours=Contender(
            "ours",
            lambda inputs: ops.sparse_linear(inputs.x, *inputs.packed),
            lambda inputs: nbytes(inputs.x, *inputs.packed) + inputs.x.element_size() * rows * outputs,
            resident=lambda inputs: nbytes(*inputs.packed),
        ),
        baselines=(
            Contender(
                "F.linear (cuBLAS), dense",
                linear,
                lambda inputs: nbytes(inputs.x, inputs.weight) + inputs.x.element_size() * rows * outputs,
                resident=lambda inputs: nbytes(inputs.weight),
                goal=goal,
            ),
        ),
        launches=1 if rows <= 48 else None,
    )


def cases(tiny: bool = False) -> tuple[GpuCase, ...]:
    if tiny:
        return (_case(6, 72, 1), _case(5, 40, 3, 0.3), _case(3, 45, 49), _case(9, 2060, 9, 0.6))
    return (
        _case(14336, 4096, 1, goal=1.4),
        _case(14336, 4096, 8),
        _case(14336, 4096, 32),
        _case(14336, 4096, 512),
        _case(14336, 4096, 1, 0.3),
        _case(14336, 4096, 1, 0.7),
        _case(896, 4864, 1),
        _case(4864, 896, 1),
    )


def _specimen(
    outputs: int, features: int, rows: int, dtype: torch.dtype = torch.bfloat16, biased: bool = False
) -> Specimen:
    from personafast._triton import sparse_linear

    count = outputs * features // 2
    words = (features + 31) // 32

    def call() -> None:
        sparse_linear(
            meta(rows, features, dtype=dtype),
            meta(count, dtype=dtype),
            meta(outputs, words, dtype=torch.int32),
            meta(outputs + 1, dtype=torch.int64),
            meta(outputs, dtype=dtype) if biased else None,
        )

    name = f"{str(dtype).removeprefix('torch.')}, {rows} rows x {outputs} x {features}" + (", bias" if biased else "")
    # Above 48 rows: the dense weight is written and read besides.
    traffic = count * dtype.itemsize + 4 * outputs * words + rows * (outputs + features) * dtype.itemsize
    traffic += 4 * count * dtype.itemsize if rows > 48 else 0
    return Specimen(
        "sparse_linear",
        name,
        call,
        1,
        traffic,
        listed=dtype == torch.bfloat16 and features % 8 == 0,
    )


def _preparation(outputs: int, features: int, dtype: torch.dtype) -> Specimen:
    from personafast._triton.compress import compress_bitmap, compress_values

    count = outputs * features // 2
    words = (features + 31) // 32

    def call() -> None:
        # Between the two the host reads how many values there are.
        bitmap, offsets = compress_bitmap(meta(outputs, words, dtype=torch.int32), features)
        compress_values(meta(outputs, features, dtype=dtype), bitmap, offsets, meta(count, dtype=dtype))

    name = f"{str(dtype).removeprefix('torch.')}, {outputs} x {features}"
    traffic = 3 * count * dtype.itemsize + 3 * 4 * outputs * words
    return Specimen("compress", name, call, 2, traffic, listed=dtype == torch.bfloat16)


SPECIMENS = (
    _preparation(14336, 4096, torch.bfloat16),
    _preparation(14336, 4096, torch.float32),
    _specimen(14336, 4096, 1),
    _specimen(14336, 4096, 1, torch.float16, True),
    _specimen(14336, 4096, 1, torch.float32, True),
    _specimen(14336, 4096, 8),
    _specimen(14336, 4096, 512),
    _specimen(896, 4864, 1),
    _specimen(4864, 896, 2, biased=True),
    _specimen(100, 45, 9),
    _specimen(100, 45, 49),
)
