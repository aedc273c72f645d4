"""Recording a piece of work once and replaying it: CUDA graphs, and what stands in for them elsewhere.

A recording knows addresses, not values: what it reads has to be updated in place, and Python's decisions are those of
the time of recording. `Tape`, the stand-in, replays the same operators on the same tensors, so that a loop which breaks
one of these rules goes wrong on a CPU too, where tests see it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn, Protocol

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from personafast.errors import PersonafastError

# Calls before a recording: kernels are compiled, workspaces made.
_WARM = 2

Work = Callable[[], torch.Tensor]


class GraphError(PersonafastError):
    """A piece of work cannot be recorded, or its recording is no longer valid."""


class Recording(Protocol):
    """A piece of work that can be done again."""

    output: torch.Tensor

    def replay(self) -> torch.Tensor:
        """Do it again on what its inputs hold now; the output, at the same address every time."""


class CudaGraph:
    """A recording as a CUDA graph.

    Args:
        work: reads and writes tensors that stay where they are; called a few times before it is recorded.
        inputs: what it reads, by name, and may change in place; they may not be rebound. After the recording they hold
            what they did before: the work is done by `replay` alone.
        pool: memory that recordings share, from `torch.cuda.graph_pool_handle()`.
    """

    def __init__(self, work: Work, inputs: Mapping[str, torch.Tensor], pool: Any = None) -> None:
        # They live as long as the graph, which knows their addresses only.
        self._inputs = dict(inputs)
        before = _copies(inputs)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                work()
                _restore(inputs, before)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, pool=pool):
                self.output = work()
        except RuntimeError as error:
            raise GraphError(f"graphs: this cannot be captured: {str(error).partition(chr(10))[0]}") from error

    def replay(self) -> torch.Tensor:
        """See `Recording.replay`."""
        self._graph.replay()
        return self.output


class Tape:
    """A recording as the list of operators that were called, for machines without a GPU.

    Replaying calls them again, on the same tensors, and writes each result where the first one was.

    Args:
        work: as for `CudaGraph`; called once before it is recorded.
        inputs: as for `CudaGraph`.
    """

    def __init__(self, work: Work, inputs: Mapping[str, torch.Tensor], pool: Any = None) -> None:
        self._inputs = dict(inputs)
        self._addresses = {name: tensor.data_ptr() for name, tensor in inputs.items()}
        before = _copies(inputs)
        work()
        _restore(inputs, before)
        recorder = _Recorder()
        with _NoPeeking(recorder), recorder:
            self.output = work()
        _restore(inputs, before)
        self._calls = recorder.calls

    def replay(self) -> torch.Tensor:
        """See `Recording.replay`.

        Raises:
            GraphError: an input is elsewhere now.
        """
        for name, tensor in self._inputs.items():
            if tensor.data_ptr() != self._addresses[name]:
                raise GraphError(f"graphs: `{name}` has moved since it was recorded; update it in place")
        for operator, args, kwargs, results in self._calls:
            found = operator(*args, **kwargs)
            for result, new in zip(results, _tensors(found), strict=True):
                # Views and what an operator changes in place are there already.
                if new.data_ptr() != result.data_ptr():
                    result.copy_(new)
        return self.output


class _Recorder(TorchDispatchMode):
    """Lists every operator that is called, and refuses those that tell Python a value."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []
        # Within an operator: on a CPU it may read what it checks, where on a GPU it would not.
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        # An index that is bool says how large the result is.
        by_bool = name.startswith("index") and any(part.dtype == torch.bool for part in _tensors(args[1:2]))
        if name in _READS or by_bool:
            _refuse(name)
        kwargs = kwargs or {}
        self.inside = True
        try:
            found = func(*args, **kwargs)
        finally:
            self.inside = False
        # Views share the address of what they are of, so that a replay sees through them; detached, since a later
        # operator may change a result's shape in place.
        self.calls.append((func, args, kwargs, [result.detach() for result in _tensors(found)]))
        return found


class _NoPeeking(TorchFunctionMode):
    """Refuses what reads a tensor's memory past every operator."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._recorder.inside and func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__):
            _refuse(func.__name__)
        return func(*args, **(kwargs or {}))


def _refuse(name: str) -> NoReturn:
    raise GraphError(
        f"graphs: {name.strip('_')} reads a tensor's value while a graph is captured; its replays would keep to what "
        "it was"
    )


# What .item(), bool(), nonzero(), unique() and the like come down to.
_READS = {"_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "unique_dim", "_unique2", "equal"}


def _copies(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in inputs.items()}


def _restore(inputs: Mapping[str, torch.Tensor], before: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in inputs.items():
        tensor.copy_(before[name])


def _tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, found.append, value)
    return found


def recorder(device: torch.device) -> type[CudaGraph] | type[Tape]:
    """What records on `device`."""
    return CudaGraph if device.type == "cuda" else Tape
