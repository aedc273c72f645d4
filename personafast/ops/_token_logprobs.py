"""token_logprobs: log probability of one given token a row, straight from the hidden states."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from personafast.ops import _backend
from personafast.ops._library import (
    check_devices,
    check_dims,
    check_dtype,
    check_float,
    check_no_grad,
    check_shape,
    fail,
    register,
)

_OP = "token_logprobs"

_KERNEL_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Up to here the C++ kernel, bound by reading the head, wins; above, the matrix product of the BLAS.
KERNEL_ROWS = 128

# Above, the products of cuBLAS should save more than stored logits cost: an estimate, which no GPU has measured yet.
TRITON_ROWS = 256

# Logits of the torch form alive at one time, in elements: 64 MiB of fp32.
BLOCK_LOGITS = 1 << 24


def _validate(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    softcap: float,
) -> None:
    check_no_grad(_OP, hidden, lm_head, temperature, bias)
    check_dims(_OP, "hidden", hidden, 2, "[T, H]")
    check_float(_OP, "hidden", hidden)
    rows, width = hidden.shape
    if lm_head.dim() != 2 or lm_head.shape[1] != width:
        fail(_OP, f"`lm_head` has shape {list(lm_head.shape)}, expected [V, H] with H = {width} as in `hidden`")
    check_dtype(_OP, "lm_head", lm_head, hidden.dtype)
    check_dtype(_OP, "tokens", tokens, torch.int64, torch.int32)
    check_shape(_OP, "tokens", tokens, (rows,), "[T]")
    if temperature is not None:
        check_dtype(_OP, "temperature", temperature, torch.float32)
        check_shape(_OP, "temperature", temperature, (rows,), "[T]")
    if bias is not None:
        check_dtype(_OP, "bias", bias, hidden.dtype)
        check_shape(_OP, "bias", bias, (lm_head.shape[0],), "[V]")
    check_devices(_OP, hidden.device, lm_head=lm_head, tokens=tokens, temperature=temperature, bias=bias)
    if not softcap >= 0:
        fail(_OP, f"`softcap` is {softcap:g}, expected 0 (none) or more")


def _check_values(lm_head: torch.Tensor, tokens: torch.Tensor, temperature: torch.Tensor | None) -> None:
    if tokens.device.type == "cpu" and tokens.numel():
        lowest, highest = (int(value) for value in tokens.aminmax())
        if lowest < 0 or highest >= lm_head.shape[0]:
            wrong = lowest if lowest < 0 else highest
            fail(_OP, f"`tokens` holds {wrong}, but `lm_head` has {lm_head.shape[0]} tokens")
        if temperature is not None and not bool((temperature > 0).all()):
            fail(_OP, f"`temperature` holds {float(temperature.amin()):g}, expected more than 0")


def _logp(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    logit_scale: float,
    softcap: float,
) -> torch.Tensor:
    if logit_scale != 1.0:
        logits = logits * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if temperature is not None:
        logits = logits / temperature[:, None]
    logp, index = logits.log_softmax(-1), tokens.long()[:, None]
    if tokens.device.type == "cpu":
        return logp.gather(1, index)[:, 0].float()
    # A token that is none would end the context there.
    known = (index >= 0) & (index < logp.shape[1])
    found = logp.gather(1, index.clamp(0, logp.shape[1] - 1))
    return torch.where(known, found, float("nan"))[:, 0].float()


def reference(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """The specification of `token_logprobs` in plain torch, in fp32 throughout."""
    _check_values(lm_head, tokens, temperature)
    wide = _backend.wide(hidden.dtype)
    logits = F.linear(hidden.to(wide), lm_head.to(wide), None if bias is None else bias.to(wide))
    return _logp(logits, tokens, temperature, logit_scale, softcap)


def _blocked(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float,
) -> torch.Tensor:
    _check_values(lm_head, tokens, temperature)
    wide = _backend.wide(hidden.dtype)
    rows = max(1, BLOCK_LOGITS // max(1, lm_head.shape[0]))
    out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    for start in range(0, hidden.shape[0], rows):
        block = slice(start, start + rows)
        logits = F.linear(hidden[block], lm_head, bias).to(wide)
        heat = None if temperature is None else temperature[block]
        out[block] = _logp(logits, tokens[block], heat, logit_scale, softcap)
    return out


def _kernel_refuses(hidden: torch.Tensor, lm_head: torch.Tensor) -> str | None:
    if hidden.dtype not in _KERNEL_DTYPES:
        return f"dtype {hidden.dtype}"
    if lm_head.stride(1) != 1 and lm_head.shape[1] > 1:
        return "an `lm_head` whose rows are not adjacent in memory (stride(1) must be 1)"
    return None


def _cpp(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None,
    bias: torch.Tensor | None,
    logit_scale: float,
    softcap: float,
) -> torch.Tensor:
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    index = tokens.long().contiguous()
    if temperature is not None:
        temperature = temperature.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    wrong = _backend.module("cpu").token_logprobs(
        out.data_ptr(),
        hidden.data_ptr(),
        hidden.stride(0),
        lm_head.data_ptr(),
        lm_head.stride(0),
        index.data_ptr(),
        0 if temperature is None else temperature.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        logit_scale,
        softcap,
        hidden.shape[0],
        lm_head.shape[0],
        hidden.shape[1],
        _KERNEL_DTYPES[hidden.dtype],
        torch.get_num_threads(),
    )
    if wrong >= 0:
        _check_values(lm_head, tokens, temperature)
    return out


def _run(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> torch.Tensor:
    _validate(hidden, lm_head, tokens, temperature, bias, softcap)
    backend = _backend.pick(_OP, hidden.device.type, hidden.shape[0])
    if backend == "cpu":
        why = _kernel_refuses(hidden, lm_head)
        if why is None:
            return _cpp(hidden, lm_head, tokens, temperature, bias, logit_scale, softcap)
        _backend.refuse(_OP, why)
    elif backend == "triton":
        why = _kernel_refuses(hidden, lm_head)
        if why is None:
            _check_values(lm_head, tokens, temperature)
            kernel = _backend.module("triton").token_logprobs
            return kernel(hidden, lm_head, tokens, temperature, bias, logit_scale, softcap)
        _backend.refuse(_OP, why)
    form = reference if backend == "reference" else _blocked
    return form(hidden, lm_head, tokens, temperature, bias, logit_scale, softcap)


def _fake(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> torch.Tensor:
    _validate(hidden, lm_head, tokens, temperature, bias, softcap)
    return hidden.new_empty((hidden.shape[0],), dtype=torch.float32)


_op = register(
    "token_logprobs(Tensor hidden, Tensor lm_head, Tensor tokens, Tensor? temperature=None, Tensor? bias=None,"
    " float logit_scale=1.0, float softcap=0.0) -> Tensor",
    _run,
    _fake,
    kernels=("cpu", "triton"),
    limits={"cpu": _backend.Limit(KERNEL_ROWS), "triton": _backend.Limit(TRITON_ROWS)},
)


def token_logprobs(
    hidden: torch.Tensor,
    lm_head: torch.Tensor,
    tokens: torch.Tensor,
    temperature: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float = 0.0,
) -> torch.Tensor:
    """Log probability of one token a row, without holding the [T, V] logits.

    l = logit_scale (lm_head hidden[t] + bias); l = softcap tanh(l / softcap) if softcap > 0; the result is
    log_softmax(l / temperature[t])[tokens[t]] in fp32. On a CPU and up to 128 rows a C++ kernel keeps a running maximum
    and sum of exponentials for each of 64 parts of the vocabulary: fp32 logits that are never stored, O(T) extra
    memory. On a GPU, up to 256 rows, a Triton kernel multiplies on the tensor cores and keeps maxima and sums of tiles
    of 128 tokens, V T / 64 numbers. More rows take a matrix product, with at most 64 MiB of logits alive at a time.

    Args:
        hidden: [T, H] float32, bfloat16, float16 or float64, after the final norm.
        lm_head: [V, H] in the dtype of `hidden`.
        tokens: int64 or int32 [T].
        temperature: float32 [T], more than 0, or None for 1.
        bias: [V] in the dtype of `hidden`, or None.
        logit_scale: factor on the logits (Cohere's logit_scale, one over Granite's logits_scaling).
        softcap: Gemma 2's final_logit_softcapping, or 0 for none.

    Returns:
        float32 [T].

    Raises:
        PersonafastError: a shape or dtype does not fit, an input requires a gradient, or (on a CPU) a token is outside
            [0, V) or a temperature not positive. On a GPU the result of such a token is NaN.
    """
    return _op(hidden, lm_head, tokens, temperature, bias, logit_scale, softcap)
