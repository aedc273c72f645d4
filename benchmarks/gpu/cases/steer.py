"""steer_ on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from benchmarks.case import Contender, Inputs, nbytes
from benchmarks.gpu.case import GpuCase, GpuDraw, Specimen, meta
from personafast import ops


def _mixed(rows: int, hidden: int, slots: int, copy_share: float | None = None) -> GpuCase:
    """The four modes by turns."""

    def make(draw: GpuDraw) -> Inputs:
        return SimpleNamespace(
            hidden=draw.normal(rows, hidden),
            directions=draw.normal(slots, hidden),
            slots=draw.integers(0, slots, rows),
            mode=(torch.arange(slots, device=draw.device) % 4).to(torch.int8),
            params=torch.stack([-0.5 - draw.uniform(slots), 0.5 + draw.uniform(slots)], 1),
            scale=0.5 + 0.5 * draw.uniform(rows),
        )

    def plain(inputs: Inputs) -> torch.Tensor:
        """Every mode for every row, and of each row the one that it wants: no row waits for the host."""
        wide = inputs.scale.dtype
        h, d = inputs.hidden.to(wide), inputs.directions[inputs.slots].to(wide)
        a, (p0, p1) = inputs.scale[:, None], inputs.params[inputs.slots, :, None].unbind(1)
        mode = inputs.mode[inputs.slots, None]
        length = d.norm(dim=1, keepdim=True)
        u = d / length
        along = (h * u).sum(1, keepdim=True)
        moved = h + a * p0 * d
        kept = moved * (h.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True))
        ablated, clamped = h - a * p0 * along * u, h + a * (along.clamp(p0, p1) - along) * u
        steered = torch.where(mode == 0, ablated, torch.where(mode == 1, clamped, kept))
        return inputs.hidden.copy_(torch.where(mode == 3, (1 - a) * h + a * p0 * d, steered))

    def ours(inputs: Inputs) -> torch.Tensor:
        return ops.steer_(inputs.hidden, inputs.directions, inputs.slots, inputs.mode, inputs.params, inputs.scale)

    def traffic(inputs: Inputs) -> int:
        small = nbytes(inputs.slots, inputs.scale)
        return 2 * nbytes(inputs.hidden) + nbytes(inputs.directions) * min(rows, slots) // slots + small

    return GpuCase(
        name=f"steer_-{rows}x{hidden}",
        operator="steer_",
        shape={"T": rows, "H": hidden, "S": slots},
        make=make,
        plain=plain,
        ours=Contender("ours", ours, traffic),
        baselines=(Contender("all four modes in torch", plain, traffic),),
        mutates=("hidden",),
        copy_share=copy_share,
        launches=1,
    )


def cases(tiny: bool = False) -> tuple[GpuCase, ...]:
    if tiny:
        return (_mixed(8, 130, 5),)
    return (_mixed(4096, 4096, 64, copy_share=0.85), _mixed(256, 4096, 64))


def _specimen(
    rows: int, hidden: int, dtype: torch.dtype, scaled: bool, directions: torch.dtype | None = None
) -> Specimen:
    from personafast._triton import steer_

    directions = directions or dtype

    def call() -> None:
        steer_(
            meta(rows, hidden, dtype=dtype),
            meta(64, hidden, dtype=directions),
            meta(rows, dtype=torch.int32),
            meta(64, dtype=torch.int8),
            meta(64, 2, dtype=torch.float32),
            meta(rows, dtype=torch.float32) if scaled else None,
        )

    name = f"{str(dtype).removeprefix('torch.')}, {rows} x {hidden}" + (", scaled" if scaled else "")
    if directions != dtype:
        name += f", directions of {str(directions).removeprefix('torch.')}"
    traffic = 2 * rows * hidden * dtype.itemsize + min(rows, 64) * hidden * directions.itemsize
    return Specimen("steer_", name, call, 1, traffic, listed=dtype == directions == torch.bfloat16)


SPECIMENS = (
    *(_specimen(4096, 4096, dtype, True) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    _specimen(4096, 8192, torch.bfloat16, True, torch.float32),
    _specimen(8, 896, torch.bfloat16, False),
    _specimen(8, 5120, torch.bfloat16, True),
    _specimen(4096, 24576, torch.bfloat16, True),
)
