"""Registration and the argument checks all operators share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch.autograd import forward_ad

from personafast.errors import PersonafastError
from personafast.ops import _backend

# A module-level Library lives as long as the process. Not torch.library.custom_op: that costs 15 to 60 us a call.
_LIBRARY = torch.library.Library("personafast", "DEF")

# Of any other class the bytes at data_ptr() are not the tensor: quantised weights (torchao), DTensor, fake tensors.
PLAIN = (torch.Tensor, torch.nn.Parameter)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def register(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    kernels: tuple[str, ...] = (),
    limits: Mapping[str, _backend.Limit] | None = None,
) -> Callable[..., Any]:
    """Define `torch.ops.personafast.<name>` and return its default overload.

    Args:
        schema: name and signature in torch's schema language.
        kernel: runs on CPU and CUDA tensors.
        fake: the shapes and dtypes of the results, for tracing.
        kernels: the backends that have a kernel of their own for this operator.
        limits: the sizes up to which the automatic choice takes them, by backend.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, kernel, key)
    torch.library.register_fake(f"personafast::{name}", fake, lib=_LIBRARY)
    _backend.KERNELS[name] = kernels
    _backend.LIMITS.update({(name, backend): limit for backend, limit in (limits or {}).items()})
    return getattr(torch.ops.personafast, name).default


def fail(op: str, message: str) -> NoReturn:
    """Raise the one-line error of `op`."""
    raise PersonafastError(f"{op}: {message}")


def check_no_grad(op: str, *tensors: torch.Tensor | None) -> None:
    """Refuse to be differentiated: there is no backward, and a missing one would be silently wrong."""
    if wants_gradient(*tensors):
        fail(op, "has no gradient, but an input requires one: use torch.no_grad() or detach the input")


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether gradients are on and one of `tensors` requires one."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def watched() -> bool:
    """Whether somebody has to see an operator of torch: what the kernel writes through a pointer, nobody does.

    That is torch.compile, autocast, tracing (torch.jit.trace, make_fx), counting FLOPs, torch.func and forward-mode
    gradients.
    """
    return (
        torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._is_tracing()
    )


def check_shape(op: str, name: str, tensor: torch.Tensor, shape: Sequence[Any], meaning: str) -> None:
    """`tensor` must have exactly `shape`; `meaning` spells the shape in letters, as "[T, H]"."""
    if tuple(tensor.shape) != tuple(shape):
        fail(op, f"`{name}` has shape {list(tensor.shape)}, expected {meaning} = {list(shape)}")


def check_dims(op: str, name: str, tensor: torch.Tensor, dims: int, meaning: str) -> None:
    """`tensor` must have `dims` dimensions."""
    if tensor.dim() != dims:
        fail(op, f"`{name}` has shape {list(tensor.shape)}, expected {meaning}")


def check_dtype(op: str, name: str, tensor: torch.Tensor, *allowed: torch.dtype) -> None:
    """`tensor` must have one of the `allowed` dtypes."""
    if tensor.dtype not in allowed:
        choices = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        fail(op, f"`{name}` has dtype {str(tensor.dtype).removeprefix('torch.')}, expected {choices}")


def check_float(op: str, name: str, tensor: torch.Tensor) -> None:
    """`tensor` must be of a floating dtype that the operators know."""
    if tensor.dtype not in FLOATS:
        check_dtype(op, name, tensor, *FLOATS)


def check_device(op: str, name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """`tensor` must be on `device`, where the first argument is."""
    if tensor.device != device:
        fail(op, f"`{name}` is on {tensor.device}, expected {device} as the first argument")


def check_devices(op: str, device: torch.device, **tensors: torch.Tensor | None) -> None:
    """Every one of `tensors` must be on `device`: a kernel would take an address of another one for its own."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            check_device(op, name, tensor, device)


def check_rows_apart(op: str, name: str, tensor: torch.Tensor) -> None:
    """The rows of a matrix that is written must not share memory, as those of an expanded one do."""
    rows, width = tensor.shape
    if rows > 1 and width > 0 and tensor.stride(0) < width and tensor.stride(1) <= 1:
        fail(op, f"`{name}` has rows that overlap in memory (strides {list(tensor.stride())}); clone it first")


def check_slots(op: str, name: str, slots: torch.Tensor, rows: Any) -> None:
    """`slots` must be int32 [T]."""
    check_dtype(op, name, slots, torch.int32)
    check_shape(op, name, slots, (rows,), "[T]")


def check_slot_range(op: str, name: str, slots: torch.Tensor, count: int) -> list[int] | None:
    """The values of `slots` as a list, each checked to lie in [-1, count).

    None on a GPU: reading the values would wait for the device, so there the kernels leave a row of a wrong slot alone.
    """
    if slots.device.type != "cpu":
        return None
    values: list[int] = slots.tolist()
    if values and not (-1 <= min(values) and max(values) < count):
        wrong = next(value for value in values if not -1 <= value < count)
        fail(op, f"`{name}` holds {wrong}, but there are {count} slots: valid are -1 to {count - 1}")
    return values
