"""inject_: add one row of a bank to each row of the residual stream, in place."""

from __future__ import annotations

import torch

from personafast.ops import _backend, _cuda
from personafast.ops._library import (
    check_devices,
    check_dims,
    check_dtype,
    check_float,
    check_no_grad,
    check_rows_apart,
    check_shape,
    check_slot_range,
    check_slots,
    fail,
    register,
)

_KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _validate(hidden: torch.Tensor, bank: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor | None) -> None:
    check_no_grad("inject_", hidden, bank, scale)
    check_dims("inject_", "hidden", hidden, 2, "[T, H]")
    check_float("inject_", "hidden", hidden)
    rows, width = hidden.shape
    if bank.dim() != 2 or bank.shape[1] != width:
        fail("inject_", f"`bank` has shape {list(bank.shape)}, expected [S, H] with H = {width} as in `hidden`")
    if bank.dtype != hidden.dtype and bank.dtype != torch.float32:
        check_dtype("inject_", "bank", bank, hidden.dtype, torch.float32)
    check_slots("inject_", "slots", slots, rows)
    if scale is not None:
        check_dtype("inject_", "scale", scale, torch.float32)
        check_shape("inject_", "scale", scale, (rows,), "[T]")
    check_devices("inject_", hidden.device, bank=bank, slots=slots, scale=scale)


def injected(
    hidden: torch.Tensor, bank: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """What `inject_` makes of `hidden` [T, H], out of place and differentiable: sums in fp32, one rounding."""
    if bank.shape[0] == 0:
        return hidden
    wide = _backend.wide(hidden.dtype)
    added = bank.index_select(0, slots.clamp(0, bank.shape[0] - 1)).to(wide)
    if scale is not None:
        added = added * scale.to(wide)[:, None]
    steered = (slots >= 0) & (slots < bank.shape[0])
    return torch.where(steered[:, None], (hidden.to(wide) + added).to(hidden.dtype), hidden)


def reference(hidden: torch.Tensor, bank: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    """The specification of `inject_` in plain torch: sums in fp32, one rounding to the dtype of `hidden`."""
    check_slot_range("inject_", "slots", slots, bank.shape[0])
    hidden.copy_(injected(hidden, bank, slots, scale))


def _run(hidden: torch.Tensor, bank: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    _validate(hidden, bank, slots, scale)
    check_rows_apart("inject_", "hidden", hidden)
    device = hidden.device
    backend = _backend.pick("inject_", device.type)
    if backend in ("cpu", "cuda"):
        kind = _KERNEL_DTYPES.get(hidden.dtype)
        if kind is None:
            backend = _backend.instead("inject_", device.type, backend, f"dtype {hidden.dtype}")
        elif hidden.stride(1) != 1 or bank.stride(1) != 1:
            why = "rows whose elements are not adjacent (stride(1) must be 1)"
            backend = _backend.instead("inject_", device.type, backend, why)
        else:
            slots = slots.contiguous()
            if scale is not None:
                scale = scale.contiguous()
            args = (
                hidden.data_ptr(),
                hidden.stride(0),
                kind,
                bank.data_ptr(),
                bank.stride(0),
                _KERNEL_DTYPES[bank.dtype],
                slots.data_ptr(),
                0 if scale is None else scale.data_ptr(),
                hidden.shape[0],
                hidden.shape[1],
                bank.shape[0],
            )
            if backend == "cuda":
                _cuda.launch("inject_cuda", hidden.get_device(), *args)
                return
            wrong = _backend.module("cpu").inject_(*args, torch.get_num_threads())
            if wrong >= 0:
                check_slot_range("inject_", "slots", slots, bank.shape[0])
            return
    if backend == "triton":
        if hidden.dtype != torch.float64:
            _backend.module("triton").inject_(hidden, bank, slots, scale)
            return
        _backend.refuse("inject_", "dtype torch.float64")
    reference(hidden, bank, slots, scale)


def _fake(hidden: torch.Tensor, bank: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor | None = None) -> None:
    _validate(hidden, bank, slots, scale)


_op = register(
    "inject_(Tensor(a!) hidden, Tensor bank, Tensor slots, Tensor? scale=None) -> ()",
    _run,
    _fake,
    kernels=("cpu", "triton", "cuda"),
)


def inject_(
    hidden: torch.Tensor, bank: torch.Tensor, slots: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Add a persona's vector to every row that carries one, in place (BILLY, arXiv 2510.10157, section 3).

    hidden[t] += scale[t] * bank[slots[t]], summed in fp32 and rounded once. A linear blend of vectors is one row of
    the bank, so the cost depends neither on how many vectors a persona blends nor on how many personas share a batch.
    On a GPU it is one launch of a Triton kernel.

    Args:
        hidden: [T, H] float32, bfloat16, float16 or float64; rows may be strided. Changed in place.
        bank: [S, H], in the dtype of `hidden` or float32.
        slots: int32 [T]; the row of the bank, or -1 to leave hidden[t] alone bit for bit.
        scale: float32 [T] or None for 1. Schedules, coefficients and position windows go here, never into the bank.

    Returns:
        `hidden` itself.

    Raises:
        PersonafastError: a shape or dtype does not fit, an input requires a gradient, or (on a CPU) a slot is outside
            [-1, S). On a GPU the row of such a slot is left alone.
    """
    _op(hidden, bank, slots, scale)
    return hidden
