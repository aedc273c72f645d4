"""A case: one operator at one shape, what it has to equal, and what it is measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from personafast import ops

# The tensors of one call, by name.
Inputs = SimpleNamespace


class Absent(Exception):
    """What is missing for a case or a baseline to run here; the report names it."""


class Draw:
    """Random tensors for one of the buffer sets that a case rotates through.

    Weights are drawn once for each shape, dtype and index, and shared by the cases of that shape: nothing may write
    to them.
    """

    _weights: dict[tuple[tuple[int, ...], torch.dtype, int], torch.Tensor] = {}

    def __init__(self, index: int) -> None:
        self.index = index
        self.generator = torch.Generator().manual_seed(index)

    def normal(self, *shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(shape).normal_(0, scale, generator=self.generator).to(dtype)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.generator, dtype=dtype)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)

    def mask_words(self, *shape: int) -> torch.Tensor:
        """Packed masks that keep each weight with probability one half: every bit of every word is random."""
        return self.integers(-(2**31), 2**31, *shape)

    def weight(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        key = (shape, dtype, self.index)
        if key not in self._weights:
            if any(other[:2] != key[:2] for other in self._weights):
                self._weights.clear()
            self._weights[key] = self.normal(*shape, dtype=dtype, scale=shape[-1] ** -0.5)
        return self._weights[key]


@dataclass(frozen=True)
class Contender:
    """One way to run a case: ours, or a baseline.

    Attributes:
        name: what the report calls it.
        run: computes the result from one buffer set.
        traffic: the bytes that a call cannot avoid to read and write.
        prepare: makes the buffer set of `run` from that of the case, before anything is timed; may raise `Absent`.
        resident: the bytes that stay in memory between calls, where that is what is compared.
        goal: how many times faster than this baseline ours has to be (below 1: how much slower it may be).
        memory_goal: the share of this baseline's resident bytes that ours may take.
        approximate: relative root mean square error that is allowed, for quantised weights. None: the error rule.
        same: False for a yardstick that computes something else and is not checked here.
        buffers: buffer sets to prepare, if one holds several weights already; None for as many as the case has.
    """

    name: str
    run: Callable[[Inputs], Any]
    traffic: Callable[[Inputs], int]
    prepare: Callable[[Inputs], Inputs] | None = None
    resident: Callable[[Inputs], int] | None = None
    goal: float | None = None
    memory_goal: float | None = None
    approximate: float | None = None
    same: bool = True
    buffers: int | None = None


@dataclass(frozen=True)
class Case:
    """One operator at one shape.

    Attributes:
        name: operator, shape and rows; what `-k` selects by.
        operator: the name in `personafast.ops`.
        shape: what the letters of the operator's contract stand for here.
        make: the inputs of one call.
        plain: the same in plain torch, for any dtype. In float64 it is what every contender is judged by; in the
            case's own dtype it sets how large an error may be.
        ours: the operator.
        baselines: what it is measured against.
        exact: `plain` in float64, where converting all the inputs at once would not fit.
        mutates: names of the inputs that a call changes.
        observe: makes tensors that can be compared of a contender's result.
        extra_memory: also measure what a call allocates.
        needs: further operators that `ours` or a baseline calls.
    """

    name: str
    operator: str
    shape: dict[str, int]
    make: Callable[[Draw], Inputs]
    plain: Callable[[Inputs], Any]
    ours: Contender
    baselines: tuple[Contender, ...]
    exact: Callable[[Inputs], Any] | None = None
    mutates: tuple[str, ...] = ()
    observe: Callable[[Inputs, Any], Any] | None = None
    extra_memory: bool = False
    needs: tuple[str, ...] = field(default=())

    @property
    def contenders(self) -> tuple[Contender, ...]:
        return (self.ours, *self.baselines)

    def missing(self) -> str | None:
        """Why the case cannot run here at all, or None."""
        for name in (self.operator, *self.needs):
            if not has_operator(name):
                return f"personafast.ops has no {name} yet"
        return None


def has_operator(name: str) -> bool:
    """Whether `personafast.ops` offers `name`, as "inject_" or "philox.uniform"."""
    owner: Any = ops
    for part in name.split("."):
        owner = getattr(owner, part, None)
    return callable(owner)


def nbytes(*tensors: torch.Tensor) -> int:
    """Bytes of the elements of `tensors`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def held_bytes(inputs: Inputs) -> int:
    """Bytes of the distinct storages that a buffer set holds, lists of tensors included."""
    storages: dict[int, int] = {}

    def visit(value: Any) -> None:
        # A subclass, as quantisers make, may have no storage of its own to ask for.
        if type(value) is torch.Tensor:
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, torch.Tensor):
            storages[id(value)] = nbytes(value)
        elif isinstance(value, (list, tuple)):
            for part in value:
                visit(part)

    for value in vars(inputs).values():
        visit(value)
    return sum(storages.values())
