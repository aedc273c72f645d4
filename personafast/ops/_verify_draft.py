"""verify_draft: how many drafted tokens stand, and the one token after them, drawn exactly from the target."""

from __future__ import annotations

import math
from typing import NoReturn

import torch

from personafast.ops import _backend, philox
from personafast.ops._library import (
    FLOATS,
    check_devices,
    check_dims,
    check_dtype,
    check_float,
    check_no_grad,
    check_shape,
    fail,
    register,
)

_OP = "verify_draft"

_KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Streams of `philox`, as `personafast.density.draws.Stream` numbers them.
SAMPLE, ACCEPT = 0, 2


def _validate(
    target_logp: torch.Tensor,
    draft_logp: torch.Tensor | None,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> None:
    # Checked in line and explained only when something is wrong: with few rows the checks are a good part of the call.
    if torch.is_grad_enabled():
        check_no_grad(_OP, target_logp, draft_logp)
    if tokens.dim() != 2 or tokens.dtype != torch.int64:
        check_dims(_OP, "tokens", tokens, 2, "[B, k]")
        check_dtype(_OP, "tokens", tokens, torch.int64)
    batch, chunk = tokens.shape
    if target_logp.dtype not in FLOATS:
        check_float(_OP, "target_logp", target_logp)
    shape = target_logp.shape
    if len(shape) != 3 or shape[0] != batch or shape[1] != chunk + 1:
        fail(_OP, f"`target_logp` has shape {list(shape)}, expected [B, k + 1, V] with B = {batch}, k = {chunk}")
    if draft_logp is not None and (draft_logp.dtype not in FLOATS or draft_logp.shape != (batch, chunk, shape[2])):
        check_float(_OP, "draft_logp", draft_logp)
        check_shape(_OP, "draft_logp", draft_logp, (batch, chunk, shape[2]), "[B, k, V]")
    if shape[2] == 0:
        fail(_OP, f"`target_logp` has shape {list(shape)}, expected at least one token")
    row = (batch,)
    if lengths.dtype != torch.int32 or lengths.shape != row:
        check_dtype(_OP, "lengths", lengths, torch.int32)
        check_shape(_OP, "lengths", lengths, row, "[B]")
    if seeds.dtype != torch.int64 or seeds.shape != row or positions.dtype != torch.int64 or positions.shape != row:
        for name, tensor in (("seeds", seeds), ("positions", positions)):
            check_dtype(_OP, name, tensor, torch.int64)
            check_shape(_OP, name, tensor, row, "[B]")


def _check_values(tokens: torch.Tensor, lengths: torch.Tensor, vocabulary: int) -> None:
    """On a CPU lengths outside [0, k], and tokens outside [0, V) that count, raise."""
    if tokens.device.type != "cpu":
        return
    chunk = tokens.shape[1]
    for row, (drafted, length) in enumerate(zip(tokens.tolist(), lengths.tolist(), strict=True)):
        if not 0 <= length <= chunk:
            fail(_OP, f"`lengths` of row {row} is {length}, expected 0 to {chunk}")
        for token in drafted[:length]:
            if not 0 <= token < vocabulary:
                fail(_OP, f"`tokens` of row {row} hold {token}, expected 0 to {vocabulary - 1}")


def _check_drawn(drawn: torch.Tensor, first: int = 0) -> None:
    """On a CPU a row that had nothing to draw, marked by a token of -1, raises; `first` is the index of drawn[0]."""
    if drawn.device.type == "cpu" and bool((drawn < 0).any()):
        _nothing_to_draw(first + int((drawn < 0).int().argmax()))


def _nothing_to_draw(row: int) -> NoReturn:
    fail(_OP, f"`target_logp` of row {row} leaves no token to draw: it is -inf everywhere, or not a number")


def _draw(weights: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulated weight exceeds u times the total, int64 [B]; -1 where the total is no number.

    A token of weight zero is never drawn: the sum does not grow there, and where rounding leaves u on the total the
    last token of any weight takes it.
    """
    cumulated = weights.cumsum(-1)
    total = cumulated[:, -1]
    token = torch.searchsorted(cumulated, (u * total)[:, None], right=True)[:, 0]
    last = weights.shape[1] - 1 - (weights.flip(1) > 0).int().argmax(1)
    return torch.where((total > 0) & (total < math.inf), torch.minimum(token, last), -1)


def reference(
    target_logp: torch.Tensor,
    draft_logp: torch.Tensor | None,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    block: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The specification of `verify_draft` in plain torch: row by row, in float64."""
    vocabulary = target_logp.shape[2]
    _check_values(tokens, lengths, vocabulary)
    out = tokens.new_full((tokens.shape[0], tokens.shape[1] + 1), -1)
    accepted = torch.zeros_like(lengths)
    for row in range(tokens.shape[0]):
        length = int(lengths[row])
        drafted = tokens[row, :length]
        q = target_logp[row].double().exp()  # [k + 1, V]
        if draft_logp is None:
            p = torch.nn.functional.one_hot(drafted, vocabulary).double()  # [length, V]
            log_p = torch.zeros(length, dtype=torch.float64)
        else:
            p = draft_logp[row, :length].double().exp()
            log_p = draft_logp[row, :length].double().gather(1, drafted[:, None])[:, 0].cpu()
        log_q = target_logp[row, :length].double().gather(1, drafted[:, None])[:, 0].cpu()
        ratios = torch.where(log_q == -math.inf, 0.0, (log_q - log_p).exp()).tolist()
        seed, position = seeds[row : row + 1], positions[row : row + 1]
        u = philox.uniform(seed, position, ACCEPT, length)[0].tolist()

        kept, scale = 0, 1.0
        if block:
            joint = 1.0
            for j in range(1, length + 1):
                joint = min(joint * ratios[j - 1], 1.0) if joint else 0.0
                share = joint
                if j < length and joint != 1:
                    mass = float((joint * q[j] - p[j]).clamp(min=0).sum())
                    share = mass / (mass + 1 - joint)
                if u[j - 1] < share:
                    kept, scale = j, joint
        else:
            while kept < length and u[kept] < ratios[kept]:
                kept += 1
        weights = q[kept]
        if kept < length:
            residual = (scale * q[kept] - p[kept]).clamp(min=0)
            # Nothing is left where target and draft agree up to rounding.
            weights = torch.where(residual.sum() == 0, weights, residual)
        drawn = _draw(weights[None], philox.uniform(seed, position + kept, SAMPLE)[:, 0])
        _check_drawn(drawn, row)
        out[row, :kept] = drafted[:kept]
        out[row, kept] = drawn[0]
        accepted[row] = kept
    return out, accepted


def _residual(logp: torch.Tensor, draft: torch.Tensor | None, token: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(scale q - p)+ of one position, float64 [B, V]: logp and draft [B, V]; draft None is certain of token, [B]."""
    scaled = scale[:, None] * logp.double().exp()
    if draft is None:
        return scaled.scatter(1, token[:, None], 0.0)
    return (scaled - draft.double().exp()).clamp(min=0)


def _vectorised(
    target_logp: torch.Tensor,
    draft_logp: torch.Tensor | None,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    block: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, chunk = tokens.shape
    vocabulary = target_logp.shape[2]
    _check_values(tokens, lengths, vocabulary)
    lengths = lengths.clamp(0, chunk)
    index = tokens.clamp(0, vocabulary - 1)
    log_q = target_logp[:, :chunk].gather(2, index[..., None])[..., 0].double()
    log_p = 0.0 if draft_logp is None else draft_logp.gather(2, index[..., None])[..., 0].double()
    ratios = torch.where(log_q == -math.inf, 0.0, (log_q - log_p).exp())
    u = philox.uniform(seeds, positions, ACCEPT, chunk)
    count = torch.arange(1, chunk + 1, dtype=torch.int32, device=tokens.device)
    within = count <= lengths[:, None]
    scale = torch.ones(batch, dtype=torch.float64, device=tokens.device)
    if block:
        joint, shares, joints = scale, [], [scale]
        for j in range(1, chunk + 1):
            joint = torch.where(joint == 0, 0.0, (joint * ratios[:, j - 1]).clamp(max=1))
            share = joint
            if j < chunk:
                draft = None if draft_logp is None else draft_logp[:, j]
                mass = _residual(target_logp[:, j], draft, index[:, j], joint).sum(1)
                share = torch.where((j < lengths) & (joint != 1), mass / (mass + 1 - joint), joint)
            shares.append(share)
            joints.append(joint)
        if shares:
            accepted = ((u < torch.stack(shares, 1)) & within).mul(count).amax(1)
        else:
            accepted = torch.zeros_like(lengths)
        scale = torch.stack(joints, 1).gather(1, accepted[:, None].long())[:, 0]
    else:
        accepted = ((u < ratios) & within).int().cumprod(1).sum(1, dtype=torch.int32)
    kept = accepted.long()
    rows = torch.arange(batch, device=tokens.device)
    logp = target_logp[rows, kept]
    weights = logp.double().exp()
    if chunk:
        inside = kept.clamp(max=chunk - 1)
        draft = None if draft_logp is None else draft_logp[rows, inside]
        residual = _residual(logp, draft, index[rows, inside], scale)
        # Nothing is left where target and draft agree up to rounding.
        whole = (accepted == lengths) | (residual.sum(1) == 0)
        weights = torch.where(whole[:, None], weights, residual)
    drawn = _draw(weights, philox.uniform(seeds, positions + kept, SAMPLE)[:, 0])
    _check_drawn(drawn)
    place = torch.arange(chunk + 1, device=tokens.device)
    padded = torch.nn.functional.pad(tokens, (0, 1))
    out = torch.where(place < kept[:, None], padded, -1)
    return torch.where(place == kept[:, None], drawn[:, None], out), accepted


def _kernel_refuses(
    target_logp: torch.Tensor,
    draft_logp: torch.Tensor | None,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
) -> str | None:
    if torch.float64 in (target_logp.dtype, None if draft_logp is None else draft_logp.dtype):
        return "dtype torch.float64"
    large = target_logp.is_cpu and (draft_logp is None or draft_logp.is_cpu)
    if not (large and tokens.is_cpu and lengths.is_cpu and seeds.is_cpu and positions.is_cpu):
        return "tensors of several devices"
    return None


def _cpp(
    target_logp: torch.Tensor,
    draft_logp: torch.Tensor | None,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    block: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if draft_logp is not None and draft_logp.dtype != target_logp.dtype:
        target_logp, draft_logp = target_logp.float(), draft_logp.float()
    if target_logp.stride(2) != 1:
        target_logp = target_logp.contiguous()
    if draft_logp is not None and draft_logp.stride(2) != 1:
        draft_logp = draft_logp.contiguous()
    tokens, lengths = tokens.contiguous(), lengths.contiguous()
    seeds, positions = seeds.contiguous(), positions.contiguous()
    batch, chunk = tokens.shape
    out = torch.empty((batch, chunk + 1), dtype=torch.int64)
    accepted = torch.empty_like(lengths)
    wrong = _backend.module("cpu").verify_draft(
        out.data_ptr(),
        accepted.data_ptr(),
        target_logp.data_ptr(),
        target_logp.stride(0),
        target_logp.stride(1),
        0 if draft_logp is None else draft_logp.data_ptr(),
        0 if draft_logp is None else draft_logp.stride(0),
        0 if draft_logp is None else draft_logp.stride(1),
        tokens.data_ptr(),
        lengths.data_ptr(),
        seeds.data_ptr(),
        positions.data_ptr(),
        ACCEPT,
        SAMPLE,
        batch,
        chunk,
        target_logp.shape[2],
        block,
        _KERNEL_DTYPES[target_logp.dtype],
        torch.get_num_threads(),
    )
    if wrong >= 0:
        _check_values(tokens, lengths, target_logp.shape[2])
        _nothing_to_draw(wrong)
    return out, accepted


def _triton(
    target_logp: torch.Tensor,
    draft_logp: torch.Tensor | None,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    block: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    others = {"draft_logp": draft_logp, "lengths": lengths, "seeds": seeds, "positions": positions}
    check_devices(_OP, target_logp.device, tokens=tokens, **others)
    _check_values(tokens, lengths, target_logp.shape[2])
    out, accepted = _backend.module("triton").verify_draft(
        target_logp, draft_logp, tokens, lengths, seeds, positions, block
    )
    if out.is_cpu:
        _check_drawn(out.gather(1, accepted[:, None].long())[:, 0])
    return out, accepted


def _run(
    target_logp: torch.Tensor,
    draft_logp: torch.Tensor | None,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    block: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _validate(target_logp, draft_logp, tokens, lengths, seeds, positions)
    backend = _backend.pick(_OP, tokens.device.type)
    if backend == "cpu":
        why = _kernel_refuses(target_logp, draft_logp, tokens, lengths, seeds, positions)
        if why is None:
            return _cpp(target_logp, draft_logp, tokens, lengths, seeds, positions, block)
        _backend.refuse(_OP, why)
    elif backend == "triton":
        if torch.float64 not in (target_logp.dtype, None if draft_logp is None else draft_logp.dtype):
            return _triton(target_logp, draft_logp, tokens, lengths, seeds, positions, block)
        _backend.refuse(_OP, "dtype torch.float64")
    form = reference if backend == "reference" else _vectorised
    return form(target_logp, draft_logp, tokens, lengths, seeds, positions, block)


def _fake(
    target_logp: torch.Tensor,
    draft_logp: torch.Tensor | None,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    block: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _validate(target_logp, draft_logp, tokens, lengths, seeds, positions)
    return tokens.new_empty((tokens.shape[0], tokens.shape[1] + 1)), lengths.new_empty(lengths.shape)


_op = register(
    "verify_draft(Tensor target_logp, Tensor? draft_logp, Tensor tokens, Tensor lengths, Tensor seeds,"
    " Tensor positions, bool block) -> (Tensor, Tensor)",
    _run,
    _fake,
    kernels=("cpu", "triton"),
)


def verify_draft(
    target_logp: torch.Tensor,
    draft_logp: torch.Tensor | None,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    block: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep as much of a draft as lets the text follow the target exactly, and draw the token after it.

    With x_1 ... x_L the drafted tokens of a row, L = lengths[b], q_j and p_j target and draft at the place of x_j, and
    independent uniforms u_j: token by token (Leviathan et al., arXiv 2211.17192, algorithm 1; Chen et al., arXiv
    2302.01318), x_j stands while u_j < q_j(x_j) / p_j(x_j), and where it does not, a token drawn from (q_j - p_j)+,
    normalised, takes its place. As a block (arXiv 2403.10444, algorithm 2), with c_0 = 1,
    c_j = min(1, c_(j-1) q_j(x_j) / p_j(x_j)), R_j the sum of (c_j q_(j+1) - p_(j+1))+ over the vocabulary,
    h_j = R_j / (R_j + 1 - c_j) for j < L and h_L = c_L: all up to the *last* j with u_j < h_j stand, none if there is
    no such j, and the next token is drawn from (c_j q_(j+1) - p_(j+1))+, normalised. Where all L stand, the next token
    is drawn from q_(L+1); for L = 0 that is a plain draw from q_1. A residual of which rounding leaves nothing gives
    way to q. A block keeps at least as many tokens on average.

    The draws of a row depend on its seed and on positions[b] alone. The u_j are the numbers of `philox.uniform` at
    stream 2 and positions[b], the place where the chunk begins: a block looks at every u_j, so those of a place that is
    drafted again in the next round must be new. The drawn token is that of stream 0 at its own place,
    positions[b] + accepted[b], as in the sampler `direct`; the draft itself must come from other streams. It is found
    by inverting the distribution function, and a token of probability zero is never drawn.

    On a GPU the Triton kernel takes two launches, and as a block leaves out places that cannot stand where the target's
    probabilities sum to less than 9/8.

    Args:
        target_logp: floating [B, k + 1, V] normalised log probabilities; -inf for a token that cannot be. That they are
            normalised is not checked, and the law of the result is exact for what is given, in the precision given.
        draft_logp: floating [B, k, V], those that the draft was sampled from; None for a draft that was certain of its
            tokens, whatever made it.
        tokens: int64 [B, k]; what lies beyond a row's length is not looked at.
        lengths: int32 [B], drafted tokens of each row, 0 to k.
        seeds: int64 [B], the rows' own seeds.
        positions: int64 [B], the place of tokens[b, 0] in the row's text.
        block: verify the chunk as a block.

    Returns:
        tokens, int64 [B, k + 1]: those kept, the one drawn, then -1; accepted, int32 [B]: how many were kept.

    Raises:
        PersonafastError: a shape or dtype does not fit, an input requires a gradient, or (on a CPU) a length is outside
            [0, k], a token that counts outside [0, V), or what a row has to draw from is -inf everywhere or not a
            number. On a GPU lengths and tokens are clamped, and such a row ends in -1 instead of a token.
    """
    return _op(target_logp, draft_logp, tokens, lengths, seeds, positions, block)
