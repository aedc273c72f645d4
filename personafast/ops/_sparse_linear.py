"""compress and sparse_linear: one persona's subnetwork without the weights it does not use."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from personafast.ops import _backend, _cuda
from personafast.ops._library import (
    PLAIN,
    check_device,
    check_dims,
    check_dtype,
    check_float,
    check_no_grad,
    check_shape,
    fail,
    register,
    wants_gradient,
    watched,
)
from personafast.ops._mask_bits import unpack_reference, words

_KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# The CUDA kernel decodes the weight once for every 8 rows, Triton's, above 48, once for all. An estimate until a GPU
# has measured it.
CUDA_ROWS = 16


def _validate_compress(weight: torch.Tensor, mask: torch.Tensor) -> None:
    op = "compress"
    check_no_grad(op, weight)
    check_dims(op, "weight", weight, 2, "[O, I]")
    check_float(op, "weight", weight)
    outputs, features = weight.shape
    check_dtype(op, "mask", mask, torch.int32)
    check_shape(op, "mask", mask, (outputs, words(features)), "[O, ceil(I / 32)]")
    check_device(op, "mask", mask, weight.device)


def compress_reference(weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The specification of `compress` in plain torch."""
    features = weight.shape[1]
    kept = unpack_reference(mask, features)
    bitmap = mask.clone(memory_format=torch.contiguous_format)
    if features % 32:
        bitmap[:, -1] &= (1 << features % 32) - 1
    offsets = torch.zeros(weight.shape[0] + 1, dtype=torch.int64, device=weight.device)
    offsets[1:] = kept.sum(1).cumsum(0)
    return weight[kept], bitmap, offsets


def _compress_cpp(weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    outputs, features = weight.shape
    bitmap = mask.clone(memory_format=torch.contiguous_format)
    if features % 32:
        bitmap[:, -1] &= (1 << features % 32) - 1
    offsets = torch.empty(outputs + 1, dtype=torch.int64)
    core = _backend.module("cpu")
    layout = (outputs, features, _KERNEL_DTYPES[weight.dtype])
    core.compress(weight.data_ptr(), weight.stride(0), bitmap.data_ptr(), offsets.data_ptr(), 0, *layout, False)
    values = weight.new_empty(int(offsets[-1]))
    core.compress(
        weight.data_ptr(), weight.stride(0), bitmap.data_ptr(), offsets.data_ptr(), values.data_ptr(), *layout, True
    )
    return values, bitmap, offsets


def _run_compress(weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _validate_compress(weight, mask)
    backend = _backend.pick("compress", weight.device.type)
    if backend == "triton":
        return _backend.module("triton").compress(weight, mask)
    if backend == "cpu":
        if weight.dtype not in _KERNEL_DTYPES:
            _backend.refuse("compress", f"dtype {weight.dtype}")
        elif weight.stride(1) != 1 and weight.shape[1] > 1:
            _backend.refuse("compress", "a weight whose rows are not adjacent in memory (stride(1) must be 1)")
        else:
            return _compress_cpp(weight, mask)
    return compress_reference(weight, mask)


def _fake_compress(weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _validate_compress(weight, mask)
    kept = torch.library.get_ctx().new_dynamic_size()
    offsets = mask.new_empty((weight.shape[0] + 1,), dtype=torch.int64)
    return weight.new_empty((kept,)), mask.new_empty(mask.shape), offsets


def _validate(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmap: torch.Tensor,
    row_offsets: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    op = "sparse_linear"
    if torch.is_grad_enabled():
        check_no_grad(op, x, values, bias)
    check_dims(op, "x", x, 2, "[T, I]")
    check_float(op, "x", x)
    check_dims(op, "values", values, 1, "[nnz]")
    check_dims(op, "bitmap", bitmap, 2, "[O, ceil(I / 32)]")
    outputs, features = bitmap.shape[0], x.shape[1]
    if values.dtype != x.dtype:
        check_dtype(op, "values", values, x.dtype)
    check_dtype(op, "bitmap", bitmap, torch.int32)
    if bitmap.shape[1] != words(features):
        check_shape(op, "bitmap", bitmap, (outputs, words(features)), "[O, ceil(I / 32)]")
    check_dtype(op, "row_offsets", row_offsets, torch.int64)
    if row_offsets.shape != (outputs + 1,):
        check_shape(op, "row_offsets", row_offsets, (outputs + 1,), "[O + 1]")
    if bias is not None:
        check_dtype(op, "bias", bias, x.dtype)
        check_shape(op, "bias", bias, (outputs,), "[O]")
    for name, tensor in (("values", values), ("bitmap", bitmap), ("row_offsets", row_offsets), ("bias", bias)):
        if tensor is not None:
            check_device(op, name, tensor, x.device)


def _check_offsets(row_offsets: torch.Tensor, count: int) -> None:
    """On a CPU, `row_offsets` must rise from 0 or more to at most `count`."""
    if row_offsets.device.type != "cpu":
        return
    wrong = (row_offsets[:-1] < 0) | (row_offsets[1:] < row_offsets[:-1]) | (row_offsets[1:] > count)
    if bool(wrong.any()):
        row = int(wrong.int().argmax())
        span = row_offsets[row : row + 2].tolist()
        fail("sparse_linear", f"`row_offsets` of output {row} are {span}, but there are {count} values; use compress")


def _dense(
    values: torch.Tensor, bitmap: torch.Tensor, row_offsets: torch.Tensor, features: int, dtype: torch.dtype
) -> torch.Tensor:
    kept = unpack_reference(bitmap, features)
    place = row_offsets[:-1, None] + kept.cumsum(1) - 1
    if values.numel() == 0:
        return torch.zeros(kept.shape, dtype=dtype, device=values.device)
    # A bitmap that is not of these values: nothing beyond them is read.
    within = kept & (place < values.numel())
    found = values.to(dtype)[place.clamp(0, values.numel() - 1)]
    return torch.where(within, found, torch.zeros((), dtype=dtype, device=values.device))


def reference(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmap: torch.Tensor,
    row_offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification of `sparse_linear` in plain torch: the dense weight put together again, sums in fp32."""
    _check_offsets(row_offsets, values.numel())
    wide = _backend.wide(x.dtype)
    weight = _dense(values, bitmap, row_offsets, x.shape[1], wide)
    return F.linear(x.to(wide), weight, None if bias is None else bias.to(wide)).to(x.dtype)


def _kernel_refuses(values: torch.Tensor, bitmap: torch.Tensor, row_offsets: torch.Tensor) -> str | None:
    if values.dtype not in _KERNEL_DTYPES:
        return f"dtype {values.dtype}"
    if not (values.is_contiguous() and bitmap.is_contiguous() and row_offsets.is_contiguous()):
        return "compressed weights that are not contiguous"
    return None


def _cpp(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmap: torch.Tensor,
    row_offsets: torch.Tensor,
    bias: torch.Tensor | None,
    backend: str = "cpu",
) -> torch.Tensor:
    if x.stride(1) != 1:
        x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    rows, features = x.shape
    outputs = bitmap.shape[0]
    out = x.new_empty((rows, outputs))
    args = (
        out.data_ptr(),
        x.data_ptr(),
        x.stride(0),
        values.data_ptr(),
        bitmap.data_ptr(),
        row_offsets.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        values.shape[0],
        rows,
        outputs,
        features,
        _KERNEL_DTYPES[x.dtype],
    )
    if backend == "cuda":
        _cuda.launch("sparse_linear_cuda", x.get_device(), *args)
        return out
    wrong = _backend.module("cpu").sparse_linear(*args, torch.get_num_threads())
    if wrong >= 0:
        _check_offsets(row_offsets, values.shape[0])
    return out


def _serves(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmap: torch.Tensor,
    row_offsets: torch.Tensor,
    bias: torch.Tensor | None,
) -> bool:
    """Whether the kernel can be called at once: all that the checks would find is right, and nobody traces the call.

    The dispatcher and the checks one by one take as long as a small layer.
    """
    if type(x) is not torch.Tensor or type(values) not in PLAIN or type(bias) not in (*PLAIN, type(None)) or watched():
        return False
    shape = bitmap.shape
    return (
        x.is_cpu
        and values.is_cpu
        and bitmap.is_cpu
        and row_offsets.is_cpu
        and x.dim() == 2
        and len(shape) == 2
        and shape[1] == words(x.shape[1])
        and x.dtype in _KERNEL_DTYPES
        and values.dtype == x.dtype
        and bitmap.dtype == torch.int32
        and row_offsets.dtype == torch.int64
        and row_offsets.shape == (shape[0] + 1,)
        and values.dim() == 1
        and _kernel_refuses(values, bitmap, row_offsets) is None
        and (bias is None or (bias.is_cpu and bias.dtype == x.dtype and bias.shape == (shape[0],)))
        and not wants_gradient(x, values, bias)
        and _backend.pick("sparse_linear", "cpu") == "cpu"
    )


class BoundSparse:
    """`sparse_linear` with weights that stay: what is known of them is checked once, and no dispatcher is passed.

    At one token a row of a small layer that is half of the call. It is a helper of the models, as `BoundDelta`.
    """

    def __init__(self, values: torch.Tensor, bitmap: torch.Tensor, row_offsets: torch.Tensor) -> None:
        self._weights = values, bitmap, row_offsets
        self._outputs, self._words = bitmap.shape
        self._count = values.shape[0]
        plain = all(type(tensor) in PLAIN and tensor.is_cpu for tensor in self._weights)
        dense = self._words > 0 and _kernel_refuses(values, bitmap, row_offsets) is None
        fits = plain and dense and not values.requires_grad
        # What the kernel multiplies with these weights: nothing if it does not take them.
        self._dtype = values.dtype if fits else None
        self._kind = _KERNEL_DTYPES.get(values.dtype, 0)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x [..., I] -> [..., O]."""
        values, bitmap, row_offsets = self._weights
        shape = x.shape
        if (
            x.dtype != self._dtype
            or type(x) is not torch.Tensor
            or not (x.is_cpu and shape and (shape[-1] + 31) // 32 == self._words and x.is_contiguous())
            or (bias is not None and not self._takes(bias))
            or watched()
            or wants_gradient(x, bias)
            or _backend.pick("sparse_linear", "cpu") != "cpu"
        ):
            flat = sparse_linear(x.reshape(-1, shape[-1]), values, bitmap, row_offsets, bias)
            return flat.view(*shape[:-1], self._outputs)
        features = shape[-1]
        out = x.new_empty((*shape[:-1], self._outputs))
        # No address is kept: with a deep copy of the model its weights are copied, and this with them.
        wrong = _backend.module("cpu").sparse_linear(
            out.data_ptr(),
            x.data_ptr(),
            features,
            values.data_ptr(),
            bitmap.data_ptr(),
            row_offsets.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            self._count,
            x.numel() // features,
            self._outputs,
            features,
            self._kind,
            torch.get_num_threads(),
        )
        if wrong >= 0:
            _check_offsets(row_offsets, self._count)
        return out

    def _takes(self, bias: torch.Tensor) -> bool:
        plain = type(bias) in PLAIN and bias.is_cpu and bias.is_contiguous()
        return plain and bias.dtype == self._dtype and bias.shape == (self._outputs,)


def _run(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmap: torch.Tensor,
    row_offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    _validate(x, values, bitmap, row_offsets, bias)
    backend = _backend.pick("sparse_linear", x.device.type, x.shape[0])
    if backend == "reference":
        return reference(x, values, bitmap, row_offsets, bias)
    why = _kernel_refuses(values, bitmap, row_offsets)
    if backend == "cuda" and why is not None:
        backend = _backend.instead("sparse_linear", x.device.type, backend, why, x.shape[0])
    if backend in ("cpu", "cuda"):
        if why is None:
            return _cpp(x, values, bitmap, row_offsets, bias, backend)
        _backend.refuse("sparse_linear", why)
    elif backend == "triton":
        if values.dtype in _KERNEL_DTYPES:
            _check_offsets(row_offsets, values.numel())
            return _backend.module("triton").sparse_linear(x, values, bitmap, row_offsets, bias)
        _backend.refuse("sparse_linear", f"dtype {values.dtype}")
    _check_offsets(row_offsets, values.numel())
    return F.linear(x, _dense(values, bitmap, row_offsets, x.shape[1], x.dtype), bias)


def _fake(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmap: torch.Tensor,
    row_offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    _validate(x, values, bitmap, row_offsets, bias)
    return x.new_empty((x.shape[0], bitmap.shape[0]))


_compress = register(
    "compress(Tensor weight, Tensor mask) -> (Tensor, Tensor, Tensor)",
    _run_compress,
    _fake_compress,
    kernels=("cpu", "triton"),
)
_sparse = register(
    "sparse_linear(Tensor x, Tensor values, Tensor bitmap, Tensor row_offsets, Tensor? bias=None) -> Tensor",
    _run,
    _fake,
    kernels=("cpu", "triton", "cuda"),
    limits={"cuda": _backend.Limit(CUDA_ROWS)},
)


def compress(weight: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weights a mask keeps, and where they stood: 9 bits a weight at 16 bit and 50 %.

    On a GPU the host waits for the number of values: this prepares a layer, and cannot be captured in a graph.

    Args:
        weight: [O, I] float32, bfloat16, float16 or float64.
        mask: int32 [O, ceil(I / 32)] as `pack_mask` makes it; bits beyond I are ignored.

    Returns:
        (values, bitmap, row_offsets): the kept weights row by row in the dtype of `weight`, [nnz]; the mask without
        bits beyond I, int32 [O, ceil(I / 32)]; where each row begins in `values`, and their number, int64 [O + 1].

    Raises:
        PersonafastError: a shape, dtype or device does not fit, or `weight` requires a gradient.
    """
    return _compress(weight, mask)


def sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    bitmap: torch.Tensor,
    row_offsets: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """A linear layer that reads only the weights of one persona's subnetwork (arXiv 2602.07164).

    y[t] = (weight * mask) x[t] + bias with (values, bitmap, row_offsets) = compress(weight, mask). Sums are in fp32 and
    rounded once. On a CPU a C++ kernel reads 16 bits a kept weight and one a weight, for 64 rows at a time. On a GPU
    the same is read for 8 rows at a time, up to 16 rows by a kernel of CUDA C++ where it was built, else by a Triton
    kernel; above 48 rows the dense weight is put together in memory for the call.

    Args:
        x: [T, I] float32, bfloat16, float16 or float64.
        values: [nnz] in the dtype of `x`.
        bitmap: int32 [O, ceil(I / 32)]; bits beyond I are ignored.
        row_offsets: int64 [O + 1], rising from 0 or more to at most nnz.
        bias: [O] in the dtype of `x`, or None.

    Returns:
        [T, O] in the dtype of `x`.

    Raises:
        PersonafastError: a shape, dtype or device does not fit, an input requires a gradient, or (on a CPU)
            `row_offsets` fall or leave `values`. A bitmap that keeps more than its row of `values` has, and on a GPU
            wrong `row_offsets`, give a wrong result, but nothing outside `values` is read.
    """
    if _serves(x, values, bitmap, row_offsets, bias):
        return _cpp(x, values, bitmap, row_offsets, bias)
    return _sparse(x, values, bitmap, row_offsets, bias)
