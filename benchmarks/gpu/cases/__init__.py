"""The registry of the GPU suite: an operator a module, each with `cases(tiny)` and `SPECIMENS`."""

from __future__ import annotations

from benchmarks.gpu.case import GpuCase, Specimen
from benchmarks.gpu.cases import (
    add_inject_rms_norm,
    aggregate_logits,
    chunk_scores,
    inject,
    lora_delta,
    mask_bits,
    masked_linear,
    sparse_linear,
    steer,
    token_logprobs,
    verify_draft,
)

_MODULES = (
    add_inject_rms_norm,
    aggregate_logits,
    chunk_scores,
    inject,
    lora_delta,
    mask_bits,
    masked_linear,
    sparse_linear,
    steer,
    token_logprobs,
    verify_draft,
)

SPECIMENS: tuple[Specimen, ...] = tuple(specimen for module in _MODULES for specimen in module.SPECIMENS)


def cases(tiny: bool = False) -> tuple[GpuCase, ...]:
    """Every case, at the sizes of real models, or so small that the interpreter runs them."""
    return tuple(case for module in _MODULES for case in module.cases(tiny))
