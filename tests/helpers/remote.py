"""A device that is elsewhere, for machines without one: its tensors cannot be looked at without being seen to.

Its name is torch's "meta", but its tensors have values, in the host's memory, behind a wrapper. As on a GPU, operators
refuse tensors of both sides, and what tells the host a value is counted, with where it was asked for; and so are copies
for which the host would wait.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from personafast.ops import _verify_draft as verify_draft

DEVICE = torch.device("meta")
# What tells Python a value, or how large a result is.
_PEEKS = {"_local_scalar_dense", "is_nonzero", "item", "nonzero", "masked_select", "unique_dim", "_unique2", "equal"}
_COPIES = {"_to_copy", "copy_", "copy", "_copy_from"}


class Watch:
    """What was read of the device, and what the host waited for beside it.

    Attributes:
        reads: a line for every transfer to the host.
        peeks: a line for everything else that waits: values asked for, copies to the device that are not let go.
    """

    def __init__(self) -> None:
        self.reads: list[str] = []
        self.peeks: list[str] = []


_watch: Watch | None = None


@contextmanager
def watching() -> Iterator[Watch]:
    """Note what is read within the `with`."""
    global _watch
    before, _watch = _watch, Watch()
    try:
        yield _watch
    finally:
        _watch = before


class There(torch.Tensor):
    """A tensor of the device."""

    here: torch.Tensor
    # As for whoever asks whether a weight is in memory: it is.
    is_meta = False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        """Wrap a tensor of the host."""
        found = torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )
        found.here = here
        return found

    def data_ptr(self) -> int:
        """The address of the values."""
        return self.here.data_ptr()

    def tolist(self) -> Any:
        """As a tensor's."""
        _peek("tolist")
        return self.here.tolist()

    def __repr__(self, **_: Any) -> str:
        """Its values, for whoever debugs."""
        return f"There({self.here})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Outside of `device`."""
        return _run(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def device() -> Iterator[torch.device]:
    """The device, within the `with`."""
    with _Mode(), mock.patch.object(torch, "tensor", _tensor):
        yield DEVICE


def moved(model: nn.Module) -> nn.Module:
    """The model on the device."""
    for part in model.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(There(parameter.detach()), requires_grad=False)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = There(buffer)
    return model


_plain_tensor = torch.tensor


def _tensor(data: Any, **options: Any) -> torch.Tensor:
    """`torch.tensor`, which asks no mode before it makes a tensor of torch's own meta device."""
    goal = options.pop("device", None)
    found = _plain_tensor(data, **options)
    return found if goal is None else found.to(goal)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    given: list[torch.Tensor] = []
    _each(given.append, (args, kwargs))
    away = [tensor for tensor in given if isinstance(tensor, There)]
    asked = kwargs.get("device")
    there = bool(away)
    if asked is not None:
        there = torch.device(asked).type == DEVICE.type
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name in _COPIES:
        there = _copying(name, args, kwargs, there)
    elif away:
        _look(name, args, given)
    here_args, here_kwargs = _each(lambda tensor: getattr(tensor, "here", tensor), (args, kwargs))
    if name == "verify_draft":
        # It would raise for what it finds in a tensor; on a GPU it does not.
        with mock.patch.object(verify_draft, "_check_drawn", lambda *_: None):
            found = func(*here_args, **here_kwargs)
    else:
        found = func(*here_args, **here_kwargs)
    if isinstance(found, torch.Tensor) and any(found is tensor.here for tensor in away):
        return next(tensor for tensor in away if found is tensor.here)  # changed in place
    if name == "_to_copy" and not there:
        found = found.clone()
    return _each(There, found) if there else found


def _each(change: Callable[[torch.Tensor], Any], value: Any) -> Any:
    """Exchange the tensors in a value, in lists and the like too; what torch's trees do takes most of these tests."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_each(change, part) for part in value])
    if isinstance(value, dict):
        return {name: _each(change, part) for name, part in value.items()}
    return value


def _copying(name: str, args: Any, kwargs: dict[str, Any], there: bool) -> bool:
    """Whether a copy's result is on the device."""
    into = name == "copy_" or name == "copy"
    source, goal = (args[1], isinstance(args[0], There)) if into else (args[0], there)
    patient = not (kwargs.get("non_blocking") or (into and len(args) > 2 and args[2]))
    if isinstance(source, There) and not goal and _watch is not None:
        _watch.reads.append(_where(name))
    if not isinstance(source, There) and goal and patient:
        _peek(f"{name} to the device, which waits")
    return goal


def _look(name: str, args: Any, given: list[torch.Tensor]) -> None:
    """Note what an operator on the device's tensors tells the host, and refuse those of both sides."""
    if name in _PEEKS:
        _peek(name)
    if name.startswith("index") or name == "_index_put_impl_":
        indices = [index for index in args[1] if index is not None] if isinstance(args[1], (list, tuple)) else []
        if any(index.dtype == torch.bool for index in indices):
            _peek(f"{name} by flags")
        if any(not isinstance(index, There) for index in indices):
            _peek(f"{name} by the host's indices")
        if indices:
            given = [tensor for tensor in given if all(tensor is not index for index in indices)]
    strangers = [tensor for tensor in given if not isinstance(tensor, There) and tensor.dim() > 0]
    if strangers and any(isinstance(tensor, There) for tensor in given):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device; {_where(name)}")


def _peek(what: str) -> None:
    if _watch is not None:
        _watch.peeks.append(_where(what))


def _where(what: str) -> str:
    frames = [frame for frame in traceback.extract_stack() if "personafast/" in frame.filename]
    ours = [frame for frame in frames if "/tests/" not in frame.filename]
    return f"{what} at " + " < ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in ours[:-5:-1])
