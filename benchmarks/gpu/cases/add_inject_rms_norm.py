"""add_inject_rms_norm on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from benchmarks.case import Absent, Contender, Inputs, nbytes
from benchmarks.gpu.case import GpuCase, GpuDraw, Specimen, meta
from personafast import ops

EPS = 1e-6


def _liger(inputs: Inputs) -> Inputs:
    try:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    except ImportError as error:
        raise Absent("liger_kernel with its fused add and RMSNorm is not installed") from error
    return SimpleNamespace(**vars(inputs), fused=LigerFusedAddRMSNormFunction.apply)


def _case(rows: int, hidden: int, slots: int, copy_share: float | None = None) -> GpuCase:
    def make(draw: GpuDraw) -> Inputs:
        return SimpleNamespace(
            update=draw.normal(rows, hidden),
            residual=draw.normal(rows, hidden),
            bank=draw.normal(slots, hidden, scale=0.1),
            slots=draw.integers(0, slots, rows),
            scale=0.5 + draw.uniform(rows),
            weight=1 + draw.normal(hidden, scale=0.1),
        )

    def plain(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        added = inputs.bank[inputs.slots].to(inputs.scale.dtype) * inputs.scale[:, None]
        residual = (inputs.update + inputs.residual).add_(added)
        return torch.nn.functional.rms_norm(residual, (hidden,), inputs.weight, EPS), residual

    def ours(i: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.add_inject_rms_norm(i.update, i.residual, i.bank, i.slots, i.scale, i.weight, EPS)

    def without(inputs: Inputs) -> int:
        return 4 * nbytes(inputs.update) + nbytes(inputs.weight)

    def traffic(inputs: Inputs) -> int:
        return without(inputs) + nbytes(inputs.bank) * min(rows, slots) // slots + nbytes(inputs.slots, inputs.scale)

    return GpuCase(
        name=f"add_inject_rms_norm-{rows}x{hidden}",
        operator="add_inject_rms_norm",
        shape={"T": rows, "H": hidden, "S": slots},
        make=make,
        plain=plain,
        ours=Contender("ours", ours, traffic),
        baselines=(
            Contender("add, gather, scale, add and rms_norm in torch", plain, traffic),
            Contender(
                "Liger's fused add and RMSNorm, which injects nothing",
                lambda i: i.fused(i.update, i.residual, i.weight, EPS),
                without,
                prepare=_liger,
                same=False,
            ),
        ),
        copy_share=copy_share,
        launches=1,
    )


def cases(tiny: bool = False) -> tuple[GpuCase, ...]:
    if tiny:
        return (_case(5, 130, 3),)
    return (_case(4096, 4096, 64, copy_share=0.85), _case(256, 4096, 64))


def _specimen(rows: int, hidden: int, dtype: torch.dtype, scaled: bool, other: torch.dtype | None = None) -> Specimen:
    """`other` is the dtype of bank and weight."""
    from personafast._triton import add_inject_rms_norm

    other = other or dtype

    def call() -> None:
        add_inject_rms_norm(
            meta(rows, hidden, dtype=dtype),
            meta(rows, hidden, dtype=dtype),
            meta(64, hidden, dtype=other),
            meta(rows, dtype=torch.int32),
            meta(rows, dtype=torch.float32) if scaled else None,
            meta(hidden, dtype=other),
            EPS,
        )

    name = f"{str(dtype).removeprefix('torch.')}, {rows} x {hidden}" + (", scaled" if scaled else "")
    if other != dtype:
        name += f", bank and weight of {str(other).removeprefix('torch.')}"
    traffic = 4 * rows * hidden * dtype.itemsize + (min(rows, 64) + 1) * hidden * other.itemsize
    return Specimen("add_inject_rms_norm", name, call, 1, traffic, listed=dtype == other == torch.bfloat16)


SPECIMENS = (
    *(_specimen(4096, 4096, dtype, True) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    _specimen(4096, 8192, torch.bfloat16, True, torch.float32),
    _specimen(8, 896, torch.bfloat16, False),
    _specimen(8, 5120, torch.bfloat16, True),
    _specimen(4096, 24576, torch.bfloat16, True),
)
