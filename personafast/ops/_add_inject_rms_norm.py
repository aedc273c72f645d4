"""add_inject_rms_norm: residual add, injection and the next RMSNorm in one pass."""

from __future__ import annotations

import torch

from personafast.ops import _backend, _cuda
from personafast.ops._library import (
    check_devices,
    check_dims,
    check_dtype,
    check_float,
    check_no_grad,
    check_shape,
    check_slot_range,
    check_slots,
    fail,
    register,
)

_KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _validate(
    update: torch.Tensor,
    residual: torch.Tensor,
    bank: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> None:
    op = "add_inject_rms_norm"
    check_no_grad(op, update, residual, bank, scale, weight)
    check_dims(op, "update", update, 2, "[T, H]")
    check_float(op, "update", update)
    rows, width = update.shape
    if residual.dtype != update.dtype:
        check_dtype(op, "residual", residual, update.dtype)
    check_shape(op, "residual", residual, (rows, width), "[T, H]")
    if bank.dim() != 2 or bank.shape[1] != width:
        fail(op, f"`bank` has shape {list(bank.shape)}, expected [S, H] with H = {width} as in `update`")
    if bank.dtype != update.dtype and bank.dtype != torch.float32:
        check_dtype(op, "bank", bank, update.dtype, torch.float32)
    check_slots(op, "slots", slots, rows)
    if scale is not None:
        check_dtype(op, "scale", scale, torch.float32)
        check_shape(op, "scale", scale, (rows,), "[T]")
    if weight.dtype != update.dtype and weight.dtype != torch.float32:
        check_dtype(op, "weight", weight, update.dtype, torch.float32)
    check_shape(op, "weight", weight, (width,), "[H]")
    check_devices(op, update.device, residual=residual, bank=bank, slots=slots, scale=scale, weight=weight)
    if not eps >= 0:
        fail(op, f"`eps` is {eps}, expected 0 or more")


def reference(
    update: torch.Tensor,
    residual: torch.Tensor,
    bank: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of `add_inject_rms_norm` in plain torch: sums in fp32, each result rounded once."""
    count = bank.shape[0]
    check_slot_range("add_inject_rms_norm", "slots", slots, count)
    wide = _backend.wide(update.dtype)
    total = (update.to(wide) + residual.to(wide)).contiguous()
    if count:
        added = bank.index_select(0, slots.clamp(0, count - 1)).to(wide)
        if scale is not None:
            added = added * scale.to(wide)[:, None]
        steered = (slots >= 0) & (slots < count)
        total = torch.where(steered[:, None], total + added, total)
    residual_out = total.to(update.dtype)
    x = residual_out.to(wide)
    unit = x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps)
    return (unit * weight.to(wide)).to(update.dtype), residual_out


def _run(
    update: torch.Tensor,
    residual: torch.Tensor,
    bank: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    op = "add_inject_rms_norm"
    _validate(update, residual, bank, slots, scale, weight, eps)
    device = update.device
    backend = _backend.pick(op, device.type)
    if backend in ("cpu", "cuda"):
        kind = _KERNEL_DTYPES.get(update.dtype)
        if kind is None:
            backend = _backend.instead(op, device.type, backend, f"dtype {update.dtype}")
        elif bank.stride(1) != 1:
            why = "a bank whose rows are not adjacent in memory (stride(1) must be 1)"
            backend = _backend.instead(op, device.type, backend, why)
        else:
            if update.stride(1) != 1:
                update = update.contiguous()
            if residual.stride(1) != 1:
                residual = residual.contiguous()
            slots = slots.contiguous()
            if scale is not None:
                scale = scale.contiguous()
            weight = weight.contiguous()
            normed = torch.empty_like(update, memory_format=torch.contiguous_format)
            residual_out = torch.empty_like(normed)
            args = (
                normed.data_ptr(),
                residual_out.data_ptr(),
                update.data_ptr(),
                update.stride(0),
                residual.data_ptr(),
                residual.stride(0),
                kind,
                bank.data_ptr(),
                bank.stride(0),
                _KERNEL_DTYPES[bank.dtype],
                slots.data_ptr(),
                0 if scale is None else scale.data_ptr(),
                weight.data_ptr(),
                _KERNEL_DTYPES[weight.dtype],
                eps,
                update.shape[0],
                update.shape[1],
                bank.shape[0],
            )
            if backend == "cuda":
                _cuda.launch("add_inject_rms_norm_cuda", update.get_device(), *args)
                return normed, residual_out
            wrong = _backend.module("cpu").add_inject_rms_norm(*args, torch.get_num_threads())
            if wrong >= 0:
                check_slot_range(op, "slots", slots, bank.shape[0])
            return normed, residual_out
    if backend == "triton":
        if update.dtype != torch.float64:
            fused: tuple[torch.Tensor, torch.Tensor] = _backend.module("triton").add_inject_rms_norm(
                update, residual, bank, slots, scale, weight, eps
            )
            return fused
        _backend.refuse(op, "dtype torch.float64")
    return reference(update, residual, bank, slots, scale, weight, eps)


def _fake(
    update: torch.Tensor,
    residual: torch.Tensor,
    bank: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    _validate(update, residual, bank, slots, scale, weight, eps)
    return update.new_empty(update.shape), update.new_empty(update.shape)


_op = register(
    "add_inject_rms_norm(Tensor update, Tensor residual, Tensor bank, Tensor slots, Tensor? scale, Tensor weight,"
    " float eps) -> (Tensor, Tensor)",
    _run,
    _fake,
    kernels=("cpu", "triton", "cuda"),
)


def add_inject_rms_norm(
    update: torch.Tensor,
    residual: torch.Tensor,
    bank: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Close one block and open the next where an engine hands on (hidden, residual) as vLLM does, in one pass.

    residual_out[t] = (update[t] + residual[t]) + scale[t] * bank[slots[t]]
    normed[t] = residual_out[t] / sqrt(mean(residual_out[t]^2) + eps) * weight

    Where roundings happen: the two sums are formed in fp32 (float64 for float64) and `residual_out` is rounded once to
    its dtype. The norm is that of the *rounded* `residual_out`, as the next layer would read it from memory; mean, root
    and both products are in fp32 and `normed` is rounded once. Against the sequence of three operators this saves the
    rounding between the addition and the injection; engines that round before they multiply by the weight (Hugging
    Face's Llama, vLLM) round `normed` once more.

    On a GPU it is one launch of a Triton kernel, which reads each row once and writes it twice.

    The weight multiplies as it is: for Gemma's norm, whose factor is 1 + weight, hand in 1 + weight, best in float32.

    Args:
        update: [T, H] float32, bfloat16, float16 or float64; what the block adds to the residual stream.
        residual: [T, H] in the dtype of `update`; the residual stream before the block. Rows of both may be strided.
        bank: [S, H], in the dtype of `update` or float32.
        slots: int32 [T]; the row of the bank, or -1 to inject nothing.
        scale: float32 [T] or None for 1.
        weight: [H], in the dtype of `update` or float32.
        eps: 0 or more.

    Returns:
        normed, residual_out: [T, H] in the dtype of `update`, dense; the inputs are not changed.

    Raises:
        PersonafastError: a shape or dtype does not fit, eps is negative, an input requires a gradient, or (on a CPU) a
            slot is outside [-1, S). On a GPU nothing is injected into the row of such a slot.
    """
    return _op(update, residual, bank, slots, scale, weight, eps)
