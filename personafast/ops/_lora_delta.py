"""lora_delta_: every row of the batch through its own low-rank adapter, without a loop over adapters."""

from __future__ import annotations

import torch

from personafast.ops import _backend
from personafast.ops._groups import Groups, row_groups
from personafast.ops._library import (
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

# Projecting every row on all adapters (M * R rows of A) costs less than one pair of products an adapter as long as both
# the rows and the stacked ranks are few.
STACKED_ROWS, STACKED_RANKS = 32, 256


def _validate(
    out: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor,
    ranks: torch.Tensor,
) -> None:
    op = "lora_delta_"
    check_no_grad(op, out, x, A, B, scale)
    check_dims(op, "x", x, 2, "[T, I]")
    check_float(op, "x", x)
    check_dims(op, "out", out, 2, "[T, O]")
    rows, features = x.shape
    if out.shape[0] != rows:
        fail(op, f"`out` has shape {list(out.shape)}, expected [T, O] with T = {rows} as in `x`")
    if A.dim() != 3 or A.shape[2] != features:
        fail(op, f"`A` has shape {list(A.shape)}, expected [M, R, I] with I = {features} as in `x`")
    check_shape(op, "B", B, (A.shape[0], out.shape[1], A.shape[1]), "[M, O, R]")
    for name, tensor in (("out", out), ("A", A), ("B", B)):
        if tensor.dtype != x.dtype:
            check_dtype(op, name, tensor, x.dtype)
    check_slots(op, "slots", slots, rows)
    check_dtype(op, "scale", scale, torch.float32)
    check_shape(op, "scale", scale, (A.shape[0],), "[M]")
    check_dtype(op, "ranks", ranks, torch.int32)
    check_shape(op, "ranks", ranks, (A.shape[0],), "[M]")


def reference(
    out: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor,
    ranks: torch.Tensor,
) -> None:
    """The specification of `lora_delta_` in plain torch: adapter by adapter, sums in fp32, one rounding."""
    check_slot_range("lora_delta_", "slots", slots, A.shape[0])
    wide = _backend.wide(x.dtype)
    for adapter in range(A.shape[0]):
        rows = (slots == adapter).nonzero()[:, 0]
        if rows.numel():
            rank = int(ranks[adapter])
            inner = x[rows].to(wide) @ A[adapter, :rank].to(wide).T
            delta = scale[adapter].to(wide) * (inner @ B[adapter, :, :rank].to(wide).T)
            out[rows] = (out[rows].to(wide) + delta).to(out.dtype)


def _stacked(
    out: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor,
    ranks: torch.Tensor,
) -> None:
    """Two matrix products over all adapters at once; what is not the row's own adapter is zeroed between them."""
    adapters, rank, _ = A.shape
    inner = (x @ A.flatten(0, 1).T).view(-1, adapters, rank)  # [T, M, R]
    index = torch.arange(max(adapters, rank), dtype=torch.int32, device=x.device)
    own = (slots[:, None] == index[:adapters])[:, :, None] & (index[:rank] < ranks[:, None])
    inner = torch.where(own, inner * scale[:, None], 0.0).to(x.dtype)
    out.addmm_(inner.flatten(1), B.transpose(1, 2).reshape(adapters * rank, -1))


def _grouped(
    out: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    groups: Groups,
    scale: torch.Tensor,
    ranks: torch.Tensor,
) -> None:
    """Two matrix products for each distinct adapter in use."""
    sizes = ranks.tolist()
    for adapter, rows in groups:
        if adapter >= 0:
            rank = sizes[adapter]
            inner = ((x[rows] @ A[adapter, :rank].T) * scale[adapter]).to(x.dtype)
            b = B[adapter, :, :rank].T
            if isinstance(rows, slice):
                out[rows].addmm_(inner, b)
            else:
                out.index_copy_(0, rows, torch.addmm(out[rows], inner, b))


def _run(
    out: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor,
    ranks: torch.Tensor,
) -> None:
    _validate(out, x, A, B, slots, scale, ranks)
    if _backend.pick("lora_delta_", x.device.type) == "reference":
        reference(out, x, A, B, slots, scale, ranks)
        return
    groups = row_groups("lora_delta_", slots, A.shape[0]) if x.device.type == "cpu" else None
    if A.shape[0] == 0 or x.shape[0] == 0:
        return
    few = x.shape[0] <= STACKED_ROWS and A.shape[0] * A.shape[1] <= STACKED_RANKS
    if groups is None or (few and len(groups) > 2):
        _stacked(out, x, A, B, slots, scale, ranks)
    else:
        _grouped(out, x, A, B, groups, scale, ranks)


def _fake(
    out: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor,
    ranks: torch.Tensor,
) -> None:
    _validate(out, x, A, B, slots, scale, ranks)


_op = register(
    "lora_delta_(Tensor(a!) out, Tensor x, Tensor A, Tensor B, Tensor slots, Tensor scale, Tensor ranks) -> ()",
    _run,
    _fake,
)


def lora_delta_(
    out: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor,
    ranks: torch.Tensor,
) -> torch.Tensor:
    """Add each row's own low-rank update to the output of a linear layer, in place (LoRA, arXiv 2106.09685, eq. 3).

    out[t] += scale[m] * B[m, :, :r] A[m, :r] x[t] with m = slots[t] and r = ranks[m]; m = -1 leaves the row alone.
    Rows of different adapters may come in any order. Up to 32 rows and M R = 256 all adapters are one pair of matrix
    products; above there is one pair for each adapter in use, without copies where its rows lie side by side. A B
    stored as the transposed view of an [M, R, O] tensor is read as it is.

    Args:
        out: [T, O] in the dtype of `x`; rows may be strided. Changed in place.
        x: [T, I] float32, bfloat16, float16 or float64.
        A: [M, R, I] in the dtype of `x`; M may be 0.
        B: [M, O, R] in the dtype of `x`.
        slots: int32 [T]; the adapter of the row, or -1.
        scale: float32 [M], usually lora_alpha / r.
        ranks: int32 [M]. What A and B hold beyond is ignored but has to be finite.

    Returns:
        `out` itself.

    Raises:
        PersonafastError: a shape or dtype does not fit, an input requires a gradient, or (on a CPU) a slot is outside
            [-1, M). On a GPU the row of such a slot is left alone.
    """
    _op(out, x, A, B, slots, scale, ranks)
    return out
