"""chunk_scores_accept: the scores of a chunk's prefixes and the prefix that stands, at once."""

from __future__ import annotations

import torch

from personafast.ops import _backend, _chunk_accept, _chunk_scores, _cuda
from personafast.ops._aggregator import rules_in_use
from personafast.ops._library import check_devices, register

_OP = "chunk_scores_accept"


def _validate(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    log_bound: torch.Tensor,
    log_u: torch.Tensor,
    lengths: torch.Tensor,
) -> None:
    _chunk_scores.validate(_OP, ref_logp, policy_logp, weights, carried, aggregator, p)
    _chunk_accept.validate(_OP, ref_logp, log_bound, log_u, lengths)


def reference(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    log_bound: torch.Tensor,
    log_u: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of `chunk_scores_accept`: one after the other."""
    scores = _chunk_scores.reference(ref_logp, policy_logp, weights, carried, aggregator, p)
    return scores, _chunk_accept.reference(scores, log_bound, log_u, lengths)


def _on_cuda(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    log_bound: torch.Tensor,
    log_u: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores, accepted = torch.empty_like(ref_logp), torch.empty_like(lengths)
    _cuda.launch(
        "chunk_scores_accept_cuda",
        scores.get_device(),
        scores.data_ptr(),
        accepted.data_ptr(),
        ref_logp.data_ptr(),
        policy_logp.data_ptr(),
        weights.data_ptr(),
        0 if carried is None else carried.data_ptr(),
        aggregator.data_ptr(),
        p.data_ptr(),
        log_bound.data_ptr(),
        log_u.data_ptr(),
        lengths.data_ptr(),
        scores.shape[0],
        policy_logp.shape[0],
        scores.shape[1],
    )
    return scores, accepted


def _run(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    log_bound: torch.Tensor,
    log_u: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    _validate(ref_logp, policy_logp, weights, carried, aggregator, p, log_bound, log_u, lengths)
    size = policy_logp.shape[0] * policy_logp.shape[2]
    backend = _backend.pick(_OP, ref_logp.device.type, size)
    if backend in ("triton", "cuda"):
        others = {"policy_logp": policy_logp, "weights": weights, "carried": carried, "aggregator": aggregator, "p": p}
        check_devices(_OP, ref_logp.device, **others, log_bound=log_bound, log_u=log_u, lengths=lengths)
        rules_in_use(_OP, aggregator, weights, p)
        if backend == "cuda":
            why = _chunk_scores.on_cuda_refuses(ref_logp, policy_logp, weights, carried, aggregator, p)
            why = why or _chunk_accept.cuda_refuses(log_bound, log_u, lengths)
            if why is None:
                return _on_cuda(ref_logp, policy_logp, weights, carried, aggregator, p, log_bound, log_u, lengths)
            backend = _backend.instead(_OP, ref_logp.device.type, backend, why, size)
        if backend == "triton":
            return _backend.module("triton").chunk_scores_accept(
                ref_logp, policy_logp, weights, carried, aggregator, p, log_bound, log_u, lengths
            )
    scores = _chunk_scores.run(_OP, ref_logp, policy_logp, weights, carried, aggregator, p)
    return scores, _chunk_accept.run(_OP, scores, log_bound, log_u, lengths)


def _fake(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    log_bound: torch.Tensor,
    log_u: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    _validate(ref_logp, policy_logp, weights, carried, aggregator, p, log_bound, log_u, lengths)
    return ref_logp.new_empty(ref_logp.shape, dtype=torch.float32), lengths.new_empty(lengths.shape)


_op = register(
    "chunk_scores_accept(Tensor ref_logp, Tensor policy_logp, Tensor weights, Tensor? carried, Tensor aggregator,"
    " Tensor p, Tensor log_bound, Tensor log_u, Tensor lengths) -> (Tensor, Tensor)",
    _run,
    _fake,
    kernels=("cpu", "triton", "cuda"),
    limits={"triton": _chunk_accept.LIMIT, "cuda": _chunk_accept.CUDA_LIMIT},
)


def chunk_scores_accept(
    ref_logp: torch.Tensor,
    policy_logp: torch.Tensor,
    weights: torch.Tensor,
    carried: torch.Tensor | None,
    aggregator: torch.Tensor,
    p: torch.Tensor,
    log_bound: torch.Tensor,
    log_u: torch.Tensor,
    lengths: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`chunk_scores`, and the prefix that `chunk_accept` makes of them, in one launch on a GPU.

    For bounds that do not depend on the scores of the round.

    Args:
        ref_logp: floating [B, k], the reference's log probability of each token.
        policy_logp: floating [N, B, k], each policy's; N may be 0.
        weights: floating [B, N], not normalised; negative only under the linear and the geometric rule.
        carried: floating [B, N] log ratios of the text before the chunk, or None for 0.
        aggregator: int32 [B] of `Aggregator` codes.
        p: floating [B], the exponent of POWER; the other rules have none.
        log_bound: floating [B, k], log M of each prefix length.
        log_u: floating [B, k], logarithms of uniforms.
        lengths: int32 [B], how many of the k tokens count.

    Returns:
        scores, float32 [B, k]; accepted, int32 [B].

    Raises:
        PersonafastError: as `chunk_scores` and `chunk_accept`.
    """
    return _op(ref_logp, policy_logp, weights, carried, aggregator, p, log_bound, log_u, lengths)
