"""Packing, unpacking and applying masks, once a model rather than once a token; and random numbers."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from benchmarks.case import Case, Contender, Draw, Inputs, nbytes
from benchmarks.cases.shapes import unpack
from personafast import ops
from personafast.ops import philox

OUTPUTS, FEATURES = 4096, 4096


def _pack_case() -> Case:
    def make(draw: Draw) -> Inputs:
        return SimpleNamespace(mask=draw.uniform(OUTPUTS, FEATURES) < 0.5)

    def plain(inputs: Inputs) -> torch.Tensor:
        powers = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
        octets = (inputs.mask.view(OUTPUTS, -1, 8) * powers).sum(-1, dtype=torch.uint8)
        return octets.view(torch.int32)

    def traffic(inputs: Inputs) -> int:
        return nbytes(inputs.mask) * 9 // 8

    return Case(
        name=f"pack_mask-{OUTPUTS}x{FEATURES}",
        operator="pack_mask",
        shape={"O": OUTPUTS, "I": FEATURES},
        make=make,
        plain=plain,
        ours=Contender("ours", lambda inputs: ops.pack_mask(inputs.mask), traffic),
        baselines=(Contender("weighted sums of bytes in torch", plain, traffic),),
    )


def _unpack_case() -> Case:
    def make(draw: Draw) -> Inputs:
        return SimpleNamespace(words=draw.mask_words(OUTPUTS, FEATURES // 32))

    def plain(inputs: Inputs) -> torch.Tensor:
        octets = inputs.words.view(torch.uint8)
        return ((octets[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().view(OUTPUTS, FEATURES)

    def traffic(inputs: Inputs) -> int:
        return nbytes(inputs.words) * 9

    return Case(
        name=f"unpack_mask-{OUTPUTS}x{FEATURES}",
        operator="unpack_mask",
        shape={"O": OUTPUTS, "I": FEATURES},
        make=make,
        plain=plain,
        ours=Contender("ours", lambda inputs: ops.unpack_mask(inputs.words, FEATURES), traffic),
        baselines=(Contender("shifts of bytes in torch", plain, traffic),),
    )


def _compress_case() -> Case:
    def make(draw: Draw) -> Inputs:
        return SimpleNamespace(
            weight=draw.weight(OUTPUTS, FEATURES),
            mask=draw.mask_words(OUTPUTS, FEATURES // 32),
            x=draw.normal(1, FEATURES),
        )

    def kept(inputs: Inputs) -> torch.Tensor:
        return inputs.weight * unpack(inputs.mask, FEATURES)

    def observe(inputs: Inputs, result: tuple[torch.Tensor, ...]) -> torch.Tensor:
        # How values are laid out is the operator's own affair; that every one is at its place shows in a product.
        if len(result) == 3:
            return ops.sparse_linear(inputs.x, *result)
        dense = torch.zeros_like(inputs.weight)
        dense[unpack(result[1], FEATURES)] = result[0]
        return torch.nn.functional.linear(inputs.x, dense)

    def traffic(inputs: Inputs) -> int:
        return nbytes(inputs.weight, inputs.mask, inputs.mask) + nbytes(inputs.weight) // 2

    return Case(
        name=f"compress-{OUTPUTS}x{FEATURES}-half",
        operator="compress",
        needs=("sparse_linear",),
        shape={"O": OUTPUTS, "I": FEATURES},
        make=make,
        plain=lambda inputs: torch.nn.functional.linear(inputs.x, kept(inputs)),
        ours=Contender("ours", lambda inputs: ops.compress(inputs.weight, inputs.mask), traffic),
        baselines=(
            Contender(
                "weight[mask] in torch",
                lambda inputs: (inputs.weight[unpack(inputs.mask, FEATURES)], inputs.mask),
                traffic,
            ),
        ),
        observe=observe,
    )


def _philox_case(rows: int, numbers: int) -> Case:
    def make(draw: Draw) -> Inputs:
        return SimpleNamespace(
            seeds=draw.integers(-(2**62), 2**62, rows, dtype=torch.int64),
            positions=draw.integers(0, 2**40, rows, dtype=torch.int64),
        )

    def plain(inputs: Inputs) -> torch.Tensor:
        return philox.reference(inputs.seeds, inputs.positions, 1, numbers)

    def traffic(inputs: Inputs) -> int:
        return nbytes(inputs.seeds, inputs.positions) + 8 * rows * numbers

    return Case(
        name=f"philox.uniform-rows{rows}-numbers{numbers}",
        operator="philox.uniform",
        shape={"B": rows, "n": numbers},
        make=make,
        plain=plain,
        ours=Contender("ours", lambda inputs: philox.uniform(inputs.seeds, inputs.positions, 1, numbers), traffic),
        baselines=(
            Contender("the same in int64 torch", plain, traffic),
            Contender(
                "torch.rand, one generator for all rows",
                lambda inputs: torch.rand(rows, numbers, dtype=torch.float64),
                traffic,
                same=False,
            ),
        ),
    )


CASES: tuple[Case, ...] = (_pack_case(), _unpack_case(), _compress_case(), _philox_case(8, 1), _philox_case(64, 64))
