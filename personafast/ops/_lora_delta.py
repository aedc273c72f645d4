"""lora_delta_: every row of the batch through its own low-rank adapter, without a loop over adapters."""

from __future__ import annotations

import torch

from personafast.ops import _backend, _cuda
from personafast.ops._groups import Groups, row_groups
from personafast.ops._library import (
    PLAIN,
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
    wants_gradient,
    watched,
)

_KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Rows times R up to which the C++ kernel takes a call, where the outputs of B are adjacent and where they are not. Its
# time grows with the rows, that of the BLAS's matrix products starts at some 60 us an adapter: up to here the kernel
# was nowhere clearly the slower one (docs/kernels.md).
KERNEL_WORK, STRIDED_WORK = 1024, 256

# The CUDA kernel is for the few rows of a step of decoding: a tile of 8 reads its factors for itself, and what it does
# without tensor cores grows with the rows. An estimate until a GPU has measured it. It has room for so many ranks.
CUDA_ROWS, CUDA_RANK = 16, 64

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
    # Checked in line and explained only when something is wrong: at one row the checks are a good part of the call.
    op = "lora_delta_"
    if torch.is_grad_enabled():
        check_no_grad(op, out, x, A, B, scale)
    if x.dim() != 2 or out.dim() != 2:
        check_dims(op, "x", x, 2, "[T, I]")
        check_dims(op, "out", out, 2, "[T, O]")
    dtype = x.dtype
    check_float(op, "x", x)
    rows, features = x.shape
    out_rows, outputs = out.shape
    if out_rows != rows:
        fail(op, f"`out` has shape {list(out.shape)}, expected [T, O] with T = {rows} as in `x`")
    if A.dim() != 3 or A.shape[2] != features:
        fail(op, f"`A` has shape {list(A.shape)}, expected [M, R, I] with I = {features} as in `x`")
    adapters, rank, _ = A.shape
    if B.shape != (adapters, outputs, rank):
        check_shape(op, "B", B, (adapters, outputs, rank), "[M, O, R]")
    if out.dtype != dtype or A.dtype != dtype or B.dtype != dtype:
        for name, tensor in (("out", out), ("A", A), ("B", B)):
            check_dtype(op, name, tensor, dtype)
    if slots.dtype != torch.int32 or slots.shape != (rows,):
        check_slots(op, "slots", slots, rows)
    if scale.dtype != torch.float32 or scale.shape != (adapters,):
        check_dtype(op, "scale", scale, torch.float32)
        check_shape(op, "scale", scale, (adapters,), "[M]")
    if ranks.dtype != torch.int32 or ranks.shape != (adapters,):
        check_dtype(op, "ranks", ranks, torch.int32)
        check_shape(op, "ranks", ranks, (adapters,), "[M]")
    check_devices(op, x.device, out=out, A=A, B=B, slots=slots, scale=scale, ranks=ranks)


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


def _kernel_refuses(out: torch.Tensor, x: torch.Tensor, A: torch.Tensor, backend: str) -> str | None:
    if x.dtype not in _KERNEL_DTYPES:
        return f"dtype {x.dtype}"
    if backend == "cuda" and A.shape[1] > CUDA_RANK:
        return f"a rank of {A.shape[1]} (at most {CUDA_RANK})"
    if out.stride(1) != 1 and out.shape[1] > 1:
        return "an `out` whose rows are not adjacent in memory (stride(1) must be 1)"
    if A.stride(2) != 1 and A.shape[2] > 1:
        return "an `A` whose rows are not adjacent in memory (stride(2) must be 1)"
    return None


def _narrow(A: torch.Tensor, B: torch.Tensor) -> bool:
    """Whether the CUDA kernel would take the factors number by number."""
    chunk = 16 // A.element_size()
    return A.shape[2] % chunk != 0 or B.shape[1] % chunk != 0 or B.stride(1) != 1


def _inner(rows: int, rank: int, device: torch.device, index: int) -> torch.Tensor | None:
    """Memory for the sums of A x, which two launches of the CUDA kernel need where there are no clusters."""
    if _cuda.has_clusters(index):
        return None
    return torch.empty(-(-rows // 8) * 64 * rank, dtype=torch.float32, device=device)


def _cpp(
    out: torch.Tensor,
    x: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    slots: torch.Tensor,
    scale: torch.Tensor,
    ranks: torch.Tensor,
    backend: str,
) -> None:
    if x.stride(1) != 1:
        x = x.contiguous()
    slots = slots.contiguous()
    scale = scale.contiguous()
    ranks = ranks.contiguous()
    rows, features = x.shape
    adapters, outputs, rank = B.shape
    a_stride_m, a_stride_r, _ = A.stride()
    args = (
        out.data_ptr(),
        out.stride(0),
        x.data_ptr(),
        x.stride(0),
        A.data_ptr(),
        a_stride_m,
        a_stride_r,
        B.data_ptr(),
        *B.stride(),
        slots.data_ptr(),
        scale.data_ptr(),
        ranks.data_ptr(),
        rows,
        outputs,
        features,
        adapters,
        rank,
        _KERNEL_DTYPES[x.dtype],
    )
    if backend == "cuda":
        inner = _inner(rows, rank, x.device, x.get_device())
        _cuda.launch("lora_delta_cuda", x.get_device(), *args, 0 if inner is None else inner.data_ptr())
        return
    wrong = _backend.module("cpu").lora_delta_(*args, torch.get_num_threads())
    if wrong >= 0:
        check_slot_range("lora_delta_", "slots", slots, adapters)


class BoundDelta:
    """`lora_delta_` with factors that stay: what is known of them is checked once, and no dispatcher is passed through.

    At one token a row that is half of the call. It is a helper of the models, which have checked the shapes that their
    linears give.
    """

    def __init__(self, A: torch.Tensor, B: torch.Tensor, scale: torch.Tensor, ranks: torch.Tensor) -> None:
        self._factors = (A, B, scale, ranks)
        adapters, self._outputs, rank = B.shape
        self._features, self._dtype = A.shape[2], A.dtype
        # The kernel of the factors' device, by that device's name.
        self._backend, self._index = ("cpu", -1) if A.is_cpu else ("cuda", A.get_device() if A.is_cuda else 0)
        plain = all(type(tensor) in PLAIN and tensor.device == A.device for tensor in self._factors)
        dense = A.stride(2) == 1 and B.stride(1) == 1 and scale.is_contiguous() and ranks.is_contiguous()
        grows = A.requires_grad or B.requires_grad or scale.requires_grad
        fits = plain and dense and not grows and A.dtype in _KERNEL_DTYPES and rank > 0
        most = KERNEL_WORK // max(rank, 1)
        if self._backend == "cuda":
            most = CUDA_ROWS if A.is_cuda and rank <= CUDA_RANK and not _narrow(A, B) else 0
        self._rows = most if fits else 0
        # No addresses: with a deep copy of the model its banks are copied, and this with them.
        self._a_strides, self._b_strides = A.stride()[:2], B.stride()
        self._sizes = (self._outputs, self._features, adapters, rank, _KERNEL_DTYPES.get(A.dtype, 0))

    def add_(self, out: torch.Tensor, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """`out` [..., O], with the updates of `x` [..., I]; slots int32, one for each row of both."""
        rows = slots.numel()
        if (
            rows <= self._rows
            and out.is_contiguous()
            and x.is_contiguous()
            and x.dtype == out.dtype == self._dtype
            and out.numel() == rows * self._outputs
            and x.numel() == rows * self._features
            and type(x) is type(out) is torch.Tensor
            and slots.dtype == torch.int32
            and slots.is_contiguous()
            and (slots.is_cpu and x.is_cpu and out.is_cpu if self._index < 0 else self._on_gpu(out, x, slots))
            and not watched()
            and not wants_gradient(out, x)
            and _backend.pick("lora_delta_", self._backend) == self._backend
        ):
            A, B, scale, ranks = self._factors
            args = (
                out.data_ptr(),
                self._outputs,
                x.data_ptr(),
                self._features,
                A.data_ptr(),
                *self._a_strides,
                B.data_ptr(),
                *self._b_strides,
                slots.data_ptr(),
                scale.data_ptr(),
                ranks.data_ptr(),
                rows,
                *self._sizes,
            )
            if self._backend == "cuda":
                inner = _inner(rows, A.shape[1], x.device, self._index)
                _cuda.launch("lora_delta_cuda", self._index, *args, 0 if inner is None else inner.data_ptr())
                return out
            wrong = _backend.module("cpu").lora_delta_(*args, torch.get_num_threads())
            if wrong >= 0:
                check_slot_range("lora_delta_", "slots", slots, A.shape[0])
            return out
        flat = out.reshape(-1, out.shape[-1])
        A, B, scale, ranks = self._factors
        lora_delta_(flat, x.reshape(-1, x.shape[-1]), A, B, slots, scale, ranks)
        return flat.view(out.shape)

    def _on_gpu(self, *tensors: torch.Tensor) -> bool:
        return all(tensor.is_cuda and tensor.get_device() == self._index for tensor in tensors)


def _size(x: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> int:
    """The size of a call in the unit of the limit on its device."""
    if not x.is_cpu:
        return x.shape[0]
    return x.shape[0] * A.shape[1] * (1 if B.stride(1) == 1 else KERNEL_WORK // STRIDED_WORK)


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
    check_rows_apart("lora_delta_", "out", out)
    size = _size(x, A, B)
    backend = _backend.pick("lora_delta_", x.device.type, size)
    if backend == "reference":
        reference(out, x, A, B, slots, scale, ranks)
        return
    if backend == "cuda":
        why = _kernel_refuses(out, x, A, backend)
        if why is None and _backend.forced() is None and _narrow(A, B):
            why = "rows that 16 bytes do not divide"
        if why is None:
            _cpp(out, x, A, B, slots, scale, ranks, backend)
            return
        backend = _backend.instead("lora_delta_", x.device.type, backend, why, size)
    if backend == "triton":
        if x.dtype in _KERNEL_DTYPES:
            _backend.module("triton").lora_delta_(out, x, A, B, slots, scale, ranks)
            return
        _backend.refuse("lora_delta_", f"dtype {x.dtype}")
    if backend == "cpu":
        why = _kernel_refuses(out, x, A, backend)
        if why is None:
            _cpp(out, x, A, B, slots, scale, ranks, backend)
            return
        _backend.refuse("lora_delta_", why)
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
    kernels=("cpu", "triton", "cuda"),
    limits={"cpu": _backend.Limit(KERNEL_WORK, "rows times rank"), "cuda": _backend.Limit(CUDA_ROWS)},
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
    Rows of different adapters may come in any order. On a CPU a C++ kernel takes up to T R = 1024, both sums in fp32
    and one rounding, if B is stored as the transposed view of an [M, R, O] tensor; stored otherwise, up to 256. Beyond,
    up to 32 rows and M R = 256 all adapters are one pair of matrix products; above there is one pair for each adapter
    in use, without copies where its rows lie side by side. On a GPU one launch of CUDA C++ takes up to 16 rows of up to
    rank 64 where it was built, if features and outputs are whole multiples of 16 bytes and B is stored as that view;
    Triton kernels take every size, two launches or, above 256 rows, four; float64 is one pair of matrix products over
    all adapters.

    Args:
        out: [T, O] in the dtype of `x`; rows may be strided. Changed in place.
        x: [T, I] float32, bfloat16, float16 or float64.
        A: [M, R, I] in the dtype of `x`; M may be 0.
        B: [M, O, R] in the dtype of `x`.
        slots: int32 [T]; the adapter of the row, or -1.
        scale: float32 [M], usually lora_alpha / r.
        ranks: int32 [M], 0 to R. What A and B hold beyond is ignored but has to be finite.

    Returns:
        `out` itself.

    Raises:
        PersonafastError: a shape or dtype does not fit, an input requires a gradient, or (on a CPU) a slot is outside
            [-1, M). On a GPU the row of such a slot is left alone.
    """
    _op(out, x, A, B, slots, scale, ranks)
    return out
