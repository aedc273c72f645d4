"""The registry of cases, a module for each kind of operator."""

from benchmarks.case import Case
from benchmarks.cases import blocks, density, linears, logprobs, lora, masks, residual

# Cases of one weight shape follow each other, since they share their weights.
CASES: tuple[Case, ...] = (
    *linears.CASES,
    *lora.CASES,
    *masks.CASES,
    *residual.CASES,
    *blocks.CASES,
    *density.CASES,
    *logprobs.CASES,
)
