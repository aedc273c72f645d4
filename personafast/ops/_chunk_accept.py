"""chunk_accept: the longest prefix of a chunk that rejection sampling lets stand."""

from __future__ import annotations

import torch

from personafast.ops import _backend
from personafast.ops._library import check_dims, check_dtype, check_float, check_no_grad, check_shape, register

_OP = "chunk_accept"


def _validate(scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor) -> None:
    check_no_grad(_OP, scores, log_bound, log_u)
    check_dims(_OP, "scores", scores, 2, "[B, k]")
    check_float(_OP, "scores", scores)
    check_float(_OP, "log_bound", log_bound)
    check_float(_OP, "log_u", log_u)
    check_shape(_OP, "log_bound", log_bound, tuple(scores.shape), "[B, k]")
    check_shape(_OP, "log_u", log_u, tuple(scores.shape), "[B, k]")
    check_dtype(_OP, "lengths", lengths, torch.int32)
    check_shape(_OP, "lengths", lengths, (scores.shape[0],), "[B]")


def reference(
    scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """The specification of `chunk_accept` in plain torch: the whole chunk first, then shorter and shorter prefixes."""
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
    count = torch.arange(1, scores.shape[1] + 1, dtype=torch.int32, device=scores.device)
    stands = (log_u < scores - log_bound) & (count <= lengths[:, None])
    return (stands * count).amax(1)


def _run(scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    _validate(scores, log_bound, log_u, lengths)
    slow = _backend.pick(_OP, scores.device.type) == "reference"
    return (reference if slow else _vectorised)(scores, log_bound, log_u, lengths)


def _fake(scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    _validate(scores, log_bound, log_u, lengths)
    return lengths.new_empty(lengths.shape)


_op = register(
    "chunk_accept(Tensor scores, Tensor log_bound, Tensor log_u, Tensor lengths) -> Tensor",
    _run,
    _fake,
)


def chunk_accept(
    scores: torch.Tensor, log_bound: torch.Tensor, log_u: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Length of the prefix that speculative chunk rejection accepts (MPG, arXiv 2511.01891, algorithm 1).

    The largest j <= lengths[b] with log_u[b, j - 1] < scores[b, j - 1] - log_bound[b, j - 1], or 0 if there is none:
    the whole chunk is tried first, then shorter prefixes. A comparison with NaN rejects; a bound of -inf accepts any
    score that is not -inf.

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
