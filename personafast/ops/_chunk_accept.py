"""chunk_accept: the longest prefix of a chunk that rejection sampling lets stand."""

from __future__ import annotations

import torch

from personafast.ops import _backend, _cuda
from personafast.ops._library import (
    FLOATS,
    check_devices,
    check_dims,
    check_dtype,
    check_float,
    check_no_grad,
    check_shape,
    register,
)

_OP = "chunk_accept"

# A program of the Triton kernels keeps a row in registers. An estimate: no GPU has measured it.
LIMIT = _backend.Limit(1 << 14, "numbers a row")

# A warp of the CUDA kernels takes a row, where Triton's programs grow with it. An estimate likewise.
CUDA_LIMIT = _backend.Limit(512, "numbers a row")


def validate(
    op: str, scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor
) -> None:
    """What `op`, which is `chunk_accept` or has it for its end, asks of these arguments."""
    # Checked in line and explained only when something is wrong: the checks are a good part of a call this small.
    if torch.is_grad_enabled():
        check_no_grad(op, scores, log_bound, log_u)
    if scores.dim() != 2:
        check_dims(op, "scores", scores, 2, "[B, k]")
    if scores.dtype not in FLOATS or log_bound.dtype not in FLOATS or log_u.dtype not in FLOATS:
        check_float(op, "scores", scores)
        check_float(op, "log_bound", log_bound)
        check_float(op, "log_u", log_u)
    shape = scores.shape
    if log_bound.shape != shape or log_u.shape != shape:
        check_shape(op, "log_bound", log_bound, tuple(shape), "[B, k]")
        check_shape(op, "log_u", log_u, tuple(shape), "[B, k]")
    if lengths.dtype != torch.int32 or lengths.shape != shape[:1]:
        check_dtype(op, "lengths", lengths, torch.int32)
        check_shape(op, "lengths", lengths, (shape[0],), "[B]")


def _wide(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Half precision compares in fp32; float64 anywhere, in float64."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return [tensor.double() if double else tensor.float() for tensor in tensors]


def reference(
    scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """The specification of `chunk_accept` in plain torch: the whole chunk first, then shorter and shorter prefixes."""
    scores, log_bound, log_u = _wide(scores, log_bound, log_u)
    accepted = torch.zeros_like(lengths)
    for row in range(scores.shape[0]):
        for j in range(min(int(lengths[row]), scores.shape[1]), 0, -1):
            if log_u[row, j - 1] < scores[row, j - 1] - log_bound[row, j - 1]:
                accepted[row] = j
                break
    return accepted


def _vectorised(
    scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    if scores.shape[1] == 0:
        return torch.zeros_like(lengths)
    scores, log_bound, log_u = _wide(scores, log_bound, log_u)
    count = torch.arange(1, scores.shape[1] + 1, dtype=torch.int32, device=scores.device)
    stands = (log_u < scores - log_bound) & (count <= lengths[:, None])
    return (stands * count).amax(1)


def _kernel_refuses(
    scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor
) -> str | None:
    if torch.float64 in (scores.dtype, log_bound.dtype, log_u.dtype):
        return "dtype torch.float64"
    if not (scores.is_cpu and log_bound.is_cpu and log_u.is_cpu and lengths.is_cpu):
        return "tensors of several devices"
    return None


def _cpp(scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    scores = scores.float().contiguous()
    log_bound = log_bound.float().contiguous()
    log_u = log_u.float().contiguous()
    lengths = lengths.contiguous()
    accepted = torch.empty_like(lengths)
    _backend.module("cpu").chunk_accept(
        accepted.data_ptr(),
        scores.data_ptr(),
        log_bound.data_ptr(),
        log_u.data_ptr(),
        lengths.data_ptr(),
        scores.shape[0],
        scores.shape[1],
    )
    return accepted


def cuda_refuses(*tensors: torch.Tensor | None) -> str | None:
    """Why the CUDA kernels cannot take these tensors, all of one device; None if they can."""
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.dtype not in (torch.float32, torch.int32):
            return f"dtype {tensor.dtype}"
        if not tensor.is_contiguous():
            return "a tensor that is not contiguous"
    return None


def _on_cuda(scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    accepted = torch.empty_like(lengths)
    _cuda.launch(
        "chunk_accept_cuda",
        scores.get_device(),
        accepted.data_ptr(),
        scores.data_ptr(),
        log_bound.data_ptr(),
        log_u.data_ptr(),
        lengths.data_ptr(),
        scores.shape[0],
        scores.shape[1],
    )
    return accepted


def run(
    op: str, scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """`chunk_accept` of valid arguments, on the backend that is picked for `op`."""
    backend = _backend.pick(op, scores.device.type, scores.shape[1])
    if backend == "cpu":
        why = _kernel_refuses(scores, log_bound, log_u, lengths)
        if why is None:
            return _cpp(scores, log_bound, log_u, lengths)
        _backend.refuse(op, why)
    elif backend in ("triton", "cuda"):
        check_devices(op, scores.device, log_bound=log_bound, log_u=log_u, lengths=lengths)
        if backend == "cuda":
            why = cuda_refuses(scores, log_bound, log_u, lengths)
            if why is None:
                return _on_cuda(scores, log_bound, log_u, lengths)
            backend = _backend.instead(op, scores.device.type, backend, why, scores.shape[1])
        if backend == "triton":
            return _backend.module("triton").chunk_accept(scores, log_bound, log_u, lengths)
    return (reference if backend == "reference" else _vectorised)(scores, log_bound, log_u, lengths)


def _run(scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    validate(_OP, scores, log_bound, log_u, lengths)
    return run(_OP, scores, log_bound, log_u, lengths)


def _fake(scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    validate(_OP, scores, log_bound, log_u, lengths)
    return lengths.new_empty(lengths.shape)


_op = register(
    "chunk_accept(Tensor scores, Tensor log_bound, Tensor log_u, Tensor lengths) -> Tensor",
    _run,
    _fake,
    kernels=("cpu", "triton", "cuda"),
    limits={"triton": LIMIT, "cuda": CUDA_LIMIT},
)


def chunk_accept(
    scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Length of the prefix that speculative chunk rejection accepts (MPG, arXiv 2511.01891, algorithm 1).

    The largest j <= lengths[b] with log_u[b, j - 1] < scores[b, j - 1] - log_bound[b, j - 1], or 0 if there is none:
    the whole chunk is tried first, then shorter prefixes. Compared in fp32, or in float64 if one of the three is. A
    comparison with NaN rejects; a bound of -inf accepts any score that is not -inf. On a GPU one launch, or none of its
    own in `chunk_scores_accept`.

    Args:
        scores: floating [B, k] from `chunk_scores`.
        log_bound: floating [B, k], log M of each prefix length.
        log_u: floating [B, k], logarithms of uniforms.
        lengths: int32 [B], how many of the k tokens count.

    Returns:
        int32 [B].

    Raises:
        PersonafastError: a shape or dtype does not fit, or an input requires a gradient.
    """
    return _op(scores, log_bound, log_u, lengths)
