"""steer_: ablate, clamp, add with the norm kept, or replace, on each row of the residual stream, in place."""

from __future__ import annotations

import enum

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


class SteerMode(enum.IntEnum):
    """What a slot does to a row, as `steer_` numbers it; `steer_` has the formulas.

    ABLATE takes the direction out, CLAMP holds the coordinate along it in a range or at a target, NORM_PRESERVING adds
    it and keeps the length of the row, REPLACE puts it in the place of the row.
    """

    ABLATE = 0
    CLAMP = 1
    NORM_PRESERVING = 2
    REPLACE = 3


def _validate(
    hidden: torch.Tensor,
    directions: torch.Tensor,
    slots: torch.Tensor,
    mode: torch.Tensor,
    params: torch.Tensor,
    scale: torch.Tensor | None,
) -> None:
    check_no_grad("steer_", hidden, directions, params, scale)
    check_dims("steer_", "hidden", hidden, 2, "[T, H]")
    check_float("steer_", "hidden", hidden)
    rows, width = hidden.shape
    if directions.dim() != 2 or directions.shape[1] != width:
        expected = f"[S, H] with H = {width} as in `hidden`"
        fail("steer_", f"`directions` has shape {list(directions.shape)}, expected {expected}")
    if directions.dtype != hidden.dtype and directions.dtype != torch.float32:
        check_dtype("steer_", "directions", directions, hidden.dtype, torch.float32)
    count = directions.shape[0]
    check_slots("steer_", "slots", slots, rows)
    check_dtype("steer_", "mode", mode, torch.int8)
    check_shape("steer_", "mode", mode, (count,), "[S]")
    check_dtype("steer_", "params", params, torch.float32)
    check_shape("steer_", "params", params, (count, 2), "[S, 2]")
    if scale is not None:
        check_dtype("steer_", "scale", scale, torch.float32)
        check_shape("steer_", "scale", scale, (rows,), "[T]")
    check_devices("steer_", hidden.device, directions=directions, slots=slots, mode=mode, params=params, scale=scale)


def _check_modes(slots: torch.Tensor, mode: torch.Tensor) -> None:
    """Every slot in use must be of a known mode. Not looked at on a GPU, where that would wait for the device."""
    if slots.device.type != "cpu":
        return
    codes = mode.tolist()
    for slot in slots.tolist():
        if slot >= 0 and not 0 <= codes[slot] < len(SteerMode):
            known = ", ".join(f"{code.value} ({code.name.lower()})" for code in SteerMode)
            fail("steer_", f"`mode` of slot {slot} holds the unknown code {codes[slot]}: known are {known}")


def steered(
    hidden: torch.Tensor,
    directions: torch.Tensor,
    slots: torch.Tensor,
    mode: torch.Tensor,
    params: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `steer_` makes of `hidden` [T, H], out of place and differentiable: sums in fp32, one rounding."""
    count = directions.shape[0]
    if count == 0:
        return hidden
    wide = _backend.wide(hidden.dtype)
    row = slots.clamp(0, count - 1)
    code = mode.index_select(0, row)
    p0, p1 = params.index_select(0, row).to(wide).unbind(1)
    a = torch.ones_like(p0) if scale is None else scale.to(wide)
    h, d = hidden.to(wide), directions.index_select(0, row).to(wide)
    ablate, clamp = code == SteerMode.ABLATE, code == SteerMode.CLAMP
    preserve, replace = code == SteerMode.NORM_PRESERVING, code == SteerMode.REPLACE

    # The row becomes (keep h + add d) ratio.
    length = d.square().sum(1).sqrt()
    # A root of 0 or a quotient by it in a row that is left alone would still make its gradient NaN.
    divisor = torch.where(length == 0, 1, length)
    coordinate = (h * d).sum(1) / divisor
    change = torch.where(ablate, -a * p0 * coordinate, a * (torch.clamp(coordinate, p0, p1) - coordinate))
    add = torch.where(ablate | clamp, change / divisor, a * p0)
    keep = torch.where(replace, 1 - a, 1)
    moved = keep[:, None] * h + add[:, None] * d
    before, after = h.square().sum(1), moved.square().sum(1)
    scaled = preserve & (before != 0) & (after != 0)
    ratio = (torch.where(scaled, before, 1) / torch.where(scaled, after, 1)).sqrt()
    ratio = torch.where(preserve & (before == 0), 0, ratio)

    acting = (slots >= 0) & (slots < count) & (ablate | clamp | preserve | replace)
    unchanged = (keep == 1) & (add == 0) | (ablate | clamp) & (length == 0) | preserve & (after == 0)
    result = (moved * ratio[:, None]).to(hidden.dtype)
    return torch.where((acting & ~unchanged)[:, None], result, hidden)


def reference(
    hidden: torch.Tensor,
    directions: torch.Tensor,
    slots: torch.Tensor,
    mode: torch.Tensor,
    params: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> None:
    """The specification of `steer_` in plain torch: sums in fp32, one rounding to the dtype of `hidden`."""
    check_slot_range("steer_", "slots", slots, directions.shape[0])
    _check_modes(slots, mode)
    hidden.copy_(steered(hidden, directions, slots, mode, params, scale))


def _run(
    hidden: torch.Tensor,
    directions: torch.Tensor,
    slots: torch.Tensor,
    mode: torch.Tensor,
    params: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> None:
    _validate(hidden, directions, slots, mode, params, scale)
    check_rows_apart("steer_", "hidden", hidden)
    device = hidden.device
    backend = _backend.pick("steer_", device.type)
    if backend in ("cpu", "cuda"):
        kind = _KERNEL_DTYPES.get(hidden.dtype)
        if kind is None:
            backend = _backend.instead("steer_", device.type, backend, f"dtype {hidden.dtype}")
        elif hidden.stride(1) != 1 or directions.stride(1) != 1:
            why = "rows whose elements are not adjacent (stride(1) must be 1)"
            backend = _backend.instead("steer_", device.type, backend, why)
        else:
            slots = slots.contiguous()
            mode = mode.contiguous()
            params = params.contiguous()
            if scale is not None:
                scale = scale.contiguous()
            args = (
                hidden.data_ptr(),
                hidden.stride(0),
                kind,
                directions.data_ptr(),
                directions.stride(0),
                _KERNEL_DTYPES[directions.dtype],
                slots.data_ptr(),
                mode.data_ptr(),
                params.data_ptr(),
                0 if scale is None else scale.data_ptr(),
                hidden.shape[0],
                hidden.shape[1],
                directions.shape[0],
            )
            if backend == "cuda":
                _cuda.launch("steer_cuda", hidden.get_device(), *args)
                return
            wrong = _backend.module("cpu").steer_(*args, torch.get_num_threads())
            if wrong >= 0:
                check_slot_range("steer_", "slots", slots, directions.shape[0])
                _check_modes(slots, mode)
            return
    if backend == "triton":
        if hidden.dtype != torch.float64:
            _backend.module("triton").steer_(hidden, directions, slots, mode, params, scale)
            return
        _backend.refuse("steer_", "dtype torch.float64")
    reference(hidden, directions, slots, mode, params, scale)


def _fake(
    hidden: torch.Tensor,
    directions: torch.Tensor,
    slots: torch.Tensor,
    mode: torch.Tensor,
    params: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> None:
    _validate(hidden, directions, slots, mode, params, scale)


# `modes`, because torch.compile hands an in-place operator's arguments by name through a function whose own first
# argument is called `mode`.
_op = register(
    "steer_(Tensor(a!) hidden, Tensor directions, Tensor slots, Tensor modes, Tensor params, Tensor? scale=None) -> ()",
    _run,
    _fake,
    kernels=("cpu", "triton", "cuda"),
)


def steer_(
    hidden: torch.Tensor,
    directions: torch.Tensor,
    slots: torch.Tensor,
    mode: torch.Tensor,
    params: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Steer every row along the direction of its slot, by the operation of its slot, in place.

    With h = hidden[t], s = slots[t], d = directions[s], u = d / |d|, (p0, p1) = params[s] and a = scale[t]:

    - ABLATE (arXiv 2406.11717, section 2.4): h <- h - a p0 (h.u) u. a p0 = 1 takes the direction out.
    - CLAMP: h <- h + a (c - h.u) u with c = min(max(h.u, p0), p1). The coordinate is held in the range p0 to p1 (either
      may be infinite); p0 = p1 sets it to that target. p0 above p1 gives p1, as torch.clamp does.
    - NORM_PRESERVING: h <- m |h| / |m| with m = h + a p0 d, a vector added at its own length and the row brought back
      to its norm.
    - REPLACE: h <- (1 - a) h + a p0 d. The row becomes the vector, as in activation patching; the coordinate alone is
      set by CLAMP to a target.

    A row is left alone bit for bit where its slot is -1; where d = 0 under ABLATE and CLAMP; where m = 0 under
    NORM_PRESERVING; and where nothing is to be done, that is where the multiple of d to be added is 0 (and a = 0 under
    REPLACE), as for a coordinate within its range. A NaN in h spreads over the row, but stays where it is under
    REPLACE.

    Sums are in fp32 (float64 for float64) and so are the results until each element is rounded once. Squares must not
    leave the range of fp32: |d| and |h| between 1e-18 and 1e19; a shorter d counts as 0.

    On a GPU it is one launch of a Triton kernel, whatever modes are in use. Where a block hands on (hidden, residual),
    the row to steer is their sum.

    Args:
        hidden: [T, H] float32, bfloat16, float16 or float64; rows may be strided. Changed in place.
        directions: [S, H], in the dtype of `hidden` or float32; of any length.
        slots: int32 [T]; the slot of the row, or -1 to leave hidden[t] alone.
        mode: int8 [S], a `SteerMode` for each slot.
        params: float32 [S, 2], p0 and p1; p1 is read by CLAMP alone.
        scale: float32 [T] or None for 1. Schedules and position windows go here.

    Returns:
        `hidden` itself.

    Raises:
        PersonafastError: a shape or dtype does not fit, an input requires a gradient, or (on a CPU) a slot is outside
            [-1, S) or a slot in use is of an unknown mode; nothing has been written then. On a GPU such rows are left
            alone.
    """
    _op(hidden, directions, slots, mode, params, scale)
    return hidden
