"""pack_mask and unpack_mask on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from benchmarks.case import Contender, Inputs
from benchmarks.gpu.case import GpuCase, GpuDraw, Specimen, meta
from personafast import ops


def _weights(draw: GpuDraw, outputs: int, features: int) -> torch.Tensor:
    return draw.integers(0, 2, outputs, features).bool()


def _pack(outputs: int, features: int) -> GpuCase:
    def plain(inputs: Inputs) -> torch.Tensor:
        bits = inputs.mask.view(outputs, features // 32, 32).to(torch.int32)
        return (bits << torch.arange(32, dtype=torch.int32, device=bits.device)).sum(-1, dtype=torch.int32)

    def traffic(inputs: Inputs) -> int:
        return inputs.mask.numel() * 9 // 8

    return GpuCase(
        name=f"pack_mask-{outputs}x{features}",
        operator="pack_mask",
        shape={"O": outputs, "I": features},
        make=lambda draw: SimpleNamespace(mask=_weights(draw, outputs, features)),
        plain=plain,
        ours=Contender("ours", lambda inputs: ops.pack_mask(inputs.mask), traffic),
        baselines=(Contender("shift and sum in torch", plain, traffic),),
        launches=1,
    )


def _unpack(outputs: int, features: int) -> GpuCase:
    def plain(inputs: Inputs) -> torch.Tensor:
        octets = inputs.packed.view(torch.uint8)
        bits = octets[..., None] >> torch.arange(8, dtype=torch.uint8, device=octets.device)
        return (bits & 1).view(outputs, features).view(torch.bool)

    def traffic(inputs: Inputs) -> int:
        return outputs * features * 9 // 8

    return GpuCase(
        name=f"unpack_mask-{outputs}x{features}",
        operator="unpack_mask",
        shape={"O": outputs, "I": features},
        make=lambda draw: SimpleNamespace(packed=draw.mask_words(outputs, features // 32)),
        plain=plain,
        ours=Contender("ours", lambda inputs: ops.unpack_mask(inputs.packed, features), traffic),
        baselines=(Contender("shift and mask in torch", plain, traffic),),
        launches=1,
    )


def cases(tiny: bool = False) -> tuple[GpuCase, ...]:
    outputs, features = (3, 160) if tiny else (14336, 4096)
    return (_pack(outputs, features), _unpack(outputs, features))


def _specimens(outputs: int, features: int, listed: bool) -> tuple[Specimen, Specimen]:
    from personafast._triton import pack_mask, unpack_mask

    mask, packed = meta(outputs, features, dtype=torch.bool), meta(outputs, -(-features // 32), dtype=torch.int32)
    name, traffic = f"{outputs} x {features}", outputs * features * 9 // 8
    return (
        Specimen("pack_mask", name, lambda: pack_mask(mask), 1, traffic, listed=listed),
        Specimen("unpack_mask", name, lambda: unpack_mask(packed, features), 1, traffic, listed=listed),
    )


SPECIMENS = (*_specimens(14336, 4096, True), *_specimens(5, 99, False))
