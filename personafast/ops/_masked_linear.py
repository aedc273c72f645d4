"""masked_linear: one dense weight, another bit mask for every row of the batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from personafast.ops import _backend, _cuda
from personafast.ops._groups import Groups, row_groups
from personafast.ops._library import (
    PLAIN,
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
    wants_gradient,
    watched,
)
from personafast.ops._mask_bits import unpack, unpack_reference, words

_KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Up to here the C++ kernel wins even where all rows have one mask (docs/kernels.md); above, the matrix product of the
# BLAS makes up for unpacking the mask.
KERNEL_ROWS = 512

# The CUDA kernel's time grows with every 8 rows, Triton's for many rows with the masks in use. An estimate until a GPU
# has measured it.
CUDA_ROWS = 16


def _validate(
    x: torch.Tensor,
    weight: torch.Tensor,
    masks: torch.Tensor,
    slots: torch.Tensor,
    gamma: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    op = "masked_linear"
    check_no_grad(op, x, weight, gamma, bias)
    check_dims(op, "x", x, 2, "[T, I]")
    check_float(op, "x", x)
    rows, features = x.shape
    if weight.dim() != 2 or weight.shape[1] != features:
        fail(op, f"`weight` has shape {list(weight.shape)}, expected [O, I] with I = {features} as in `x`")
    if weight.dtype != x.dtype:
        check_dtype(op, "weight", weight, x.dtype)
    if masks.dim() != 3 or masks.shape[1] != weight.shape[0] or masks.shape[2] != words(features):
        expected = f"[P, {weight.shape[0]}, {words(features)}]"
        fail(op, f"`masks` has shape {list(masks.shape)}, expected [P, O, ceil(I / 32)] = {expected}")
    check_dtype(op, "masks", masks, torch.int32)
    check_slots(op, "slots", slots, rows)
    if gamma is not None:
        check_dtype(op, "gamma", gamma, torch.float32)
        check_shape(op, "gamma", gamma, (masks.shape[0],), "[P]")
    if bias is not None:
        check_dtype(op, "bias", bias, x.dtype)
        check_shape(op, "bias", bias, (weight.shape[0],), "[O]")
    check_devices(op, x.device, weight=weight, masks=masks, slots=slots, gamma=gamma, bias=bias)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    masks: torch.Tensor,
    slots: torch.Tensor,
    gamma: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of `masked_linear` in plain torch: dense rows are F.linear, masked rows are summed in fp32."""
    check_slot_range("masked_linear", "slots", slots, masks.shape[0])
    wide = _backend.wide(x.dtype)
    out = F.linear(x, weight, bias)
    for slot in range(masks.shape[0]):
        rows = (slots == slot).nonzero()[:, 0]
        if rows.numel():
            kept = unpack_reference(masks[slot], x.shape[1])
            full = weight.to(wide)
            left = full.new_zeros(()) if gamma is None else full * gamma[slot].to(wide)
            masked = torch.where(kept, full, left)
            y = F.linear(x[rows].to(wide), masked, None if bias is None else bias.to(wide))
            out[rows] = y.to(x.dtype)
    return out


def _grouped(
    x: torch.Tensor,
    weight: torch.Tensor,
    masks: torch.Tensor,
    slots: torch.Tensor,
    gamma: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """One F.linear for each distinct slot in use, with its mask unpacked and multiplied in once."""
    groups: Groups
    if slots.device.type == "cpu":
        groups = row_groups("masked_linear", slots, masks.shape[0])
    else:
        groups = [(slot, (slots == slot).nonzero()[:, 0]) for slot in slots.unique().tolist()]
    out = x.new_empty((x.shape[0], weight.shape[0]))
    for slot, rows in groups:
        masked = weight
        if 0 <= slot < masks.shape[0]:
            kept = unpack(masks[slot], x.shape[1])
            if gamma is None:
                masked = torch.where(kept, weight, weight.new_zeros(()))
            else:
                masked = torch.where(kept, weight, (weight * gamma[slot]).to(weight.dtype))
        if len(groups) == 1:
            return F.linear(x, masked, bias)
        out[rows] = F.linear(x[rows], masked, bias)
    return out


def _kernel_refuses(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    if x.dtype not in _KERNEL_DTYPES:
        return f"dtype {x.dtype}"
    if weight.stride(1) != 1 and weight.shape[1] > 1:
        return "a weight whose rows are not adjacent in memory (stride(1) must be 1)"
    return None


def _serves(
    x: torch.Tensor,
    weight: torch.Tensor,
    masks: torch.Tensor,
    slots: torch.Tensor,
    gamma: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> bool:
    """Whether the kernel can be called at once: all that the checks would find is right, and nobody traces the call.

    The dispatcher and the checks one by one take as long as a small layer.
    """
    if type(x) is not torch.Tensor or type(weight) not in PLAIN or type(bias) not in (*PLAIN, type(None)) or watched():
        return False
    shape = masks.shape
    return (
        x.is_cpu
        and weight.is_cpu
        and masks.is_cpu
        and slots.is_cpu
        and x.dim() == 2
        and x.dtype in _KERNEL_DTYPES
        and weight.dtype == x.dtype
        and weight.dim() == 2
        and weight.shape[1] == x.shape[1]
        and len(shape) == 3
        and shape[1] == weight.shape[0]
        and shape[2] == words(x.shape[1])
        and masks.dtype == torch.int32
        and slots.dtype == torch.int32
        and slots.shape == x.shape[:1]
        and _kernel_refuses(x, weight) is None
        and (gamma is None or (gamma.is_cpu and gamma.dtype == torch.float32 and gamma.shape == shape[:1]))
        and (bias is None or (bias.is_cpu and bias.dtype == x.dtype and bias.shape == shape[1:2]))
        and not wants_gradient(x, weight, gamma, bias)
        and _backend.pick("masked_linear", "cpu", x.shape[0]) == "cpu"
    )


def _run(
    x: torch.Tensor,
    weight: torch.Tensor,
    masks: torch.Tensor,
    slots: torch.Tensor,
    gamma: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    _validate(x, weight, masks, slots, gamma, bias)
    backend = _backend.pick("masked_linear", x.device.type, x.shape[0])
    if backend == "reference":
        return reference(x, weight, masks, slots, gamma, bias)
    if backend == "cuda" and weight.shape[1] % 8 and _backend.forced() is None:
        # The CUDA kernel takes such rows number by number.
        narrow = "rows that are no multiple of 8"
        backend = _backend.instead("masked_linear", x.device.type, backend, narrow, x.shape[0])
    why = _kernel_refuses(x, weight)
    if why is not None and backend in ("cpu", "triton", "cuda"):
        _backend.refuse("masked_linear", why)
    elif backend in ("cpu", "cuda"):
        return _cpp(x, weight, masks, slots, gamma, bias, backend)
    elif backend == "triton":
        return _backend.module("triton").masked_linear(x, weight, masks, slots, gamma, bias)
    return _grouped(x, weight, masks, slots, gamma, bias)


def _cpp(
    x: torch.Tensor,
    weight: torch.Tensor,
    masks: torch.Tensor,
    slots: torch.Tensor,
    gamma: torch.Tensor | None,
    bias: torch.Tensor | None,
    backend: str = "cpu",
) -> torch.Tensor:
    if x.stride(1) != 1:
        x = x.contiguous()
    if not masks.is_contiguous():
        masks = masks.contiguous()
    slots = slots.contiguous()
    gamma = None if gamma is None else gamma.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty((x.shape[0], weight.shape[0]))
    args = (
        out.data_ptr(),
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        masks.data_ptr(),
        slots.data_ptr(),
        0 if gamma is None else gamma.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        x.shape[0],
        weight.shape[0],
        x.shape[1],
        masks.shape[0],
        _KERNEL_DTYPES[x.dtype],
    )
    if backend == "cuda":
        _cuda.launch("masked_linear_cuda", x.get_device(), *args)
        return out
    wrong = _backend.module("cpu").masked_linear(*args, torch.get_num_threads())
    if wrong >= 0:
        check_slot_range("masked_linear", "slots", slots, masks.shape[0])
    return out


def _fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    masks: torch.Tensor,
    slots: torch.Tensor,
    gamma: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    _validate(x, weight, masks, slots, gamma, bias)
    return x.new_empty((x.shape[0], weight.shape[0]))


_op = register(
    "masked_linear(Tensor x, Tensor weight, Tensor masks, Tensor slots, Tensor? gamma=None, Tensor? bias=None)"
    " -> Tensor",
    _run,
    _fake,
    kernels=("cpu", "triton", "cuda"),
    limits={"cpu": _backend.Limit(KERNEL_ROWS), "cuda": _backend.Limit(CUDA_ROWS)},
)


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    masks: torch.Tensor,
    slots: torch.Tensor,
    gamma: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer in which every row of the batch sees its own persona's subnetwork (arXiv 2602.07164).

    y[t] = (weight * (m + gamma[s] (1 - m))) x[t] + bias with s = slots[t] and m = masks[s]; s = -1 is the dense layer.
    Without gamma a masked-out weight takes no part at all: it may be infinite or NaN. Sums are in fp32 and rounded
    once. Up to 512 rows a C++ kernel reads the shared weight once and one bit a weight and persona; more rows are
    grouped by mask, one matrix product a distinct mask. On a GPU few rows take one pass over the weight for every 8,
    in a kernel of CUDA C++ up to 16 where it was built, and many rows are grouped by mask on the device, which the host
    does not wait for, and go to the tensor cores.

    Args:
        x: [T, I] float32, bfloat16, float16 or float64.
        weight: [O, I] in the dtype of `x`, never changed.
        masks: int32 [P, O, ceil(I / 32)] as `pack_mask` makes them; bits beyond I are ignored.
        slots: int32 [T]; the mask of the row, or -1 for the dense weight.
        gamma: float32 [P], what is left of a masked weight, or None for 0.
        bias: [O] in the dtype of `x`, or None.

    Returns:
        [T, O] in the dtype of `x`.

    Raises:
        PersonafastError: a shape or dtype does not fit, an input requires a gradient, or (on a CPU) a slot is outside
            [-1, P). On a GPU the row of such a slot is dense.
    """
    if _serves(x, weight, masks, slots, gamma, bias):
        return _cpp(x, weight, masks, slots, gamma, bias)
    return _op(x, weight, masks, slots, gamma, bias)
