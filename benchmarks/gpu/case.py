"""What the cases of the GPU suite add to those of the CPU: a device, goals on a GPU, and launches to be looked at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.case import Case, Draw


@dataclass(frozen=True)
class GpuCase(Case):
    """A case of the GPU suite.

    Attributes:
        copy_share: share of the measured copy bandwidth that ours has to reach.
        launches: launches that a call of ours may take at most.
    """

    copy_share: float | None = None
    launches: int | None = None


class GpuDraw(Draw):
    """Random tensors on a device, in one dtype unless another is asked for.

    Weights are shared by the cases of a shape, as those of `Draw` are.
    """

    def __init__(self, index: int, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> None:
        self.index, self.device, self.dtype = index, device, dtype
        self.generator = torch.Generator(device).manual_seed(index)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> torch.Tensor:
        drawn = torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        return drawn.normal_(0, scale, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=dtype, device=self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def weight(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return super().weight(*shape, dtype=dtype or self.dtype)


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without memory: reading a value of it on the host, which would wait for the GPU, raises."""
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass(frozen=True)
class Specimen:
    """A call to be compiled for GPUs that are not here.

    Attributes:
        operator: its name in `personafast.ops`.
        name: what tells it from the operator's other specimens, as "bf16, 8 rows x 4096".
        call: calls the Triton launcher (not the operator) on `meta` tensors.
        launches: how many launches that takes.
        traffic: bytes that the call cannot avoid to move.
        tensor_cores: kernels that have to multiply on tensor cores.
        listed: whether the table of `docs/kernels.md` has it.
    """

    operator: str
    name: str
    call: Callable[[], Any]
    launches: int
    traffic: int
    tensor_cores: tuple[str, ...] = ()
    listed: bool = True

    def __str__(self) -> str:
        return f"{self.operator}: {self.name}"
