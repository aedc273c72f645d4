"""Functions that Triton's language lacks, of basic operations alone, so that the interpreter runs them too.

A GPU's exponential and logarithm lose what lies near 0 and 1; these do not.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1(x):
    """e^x - 1: its series where the subtraction would cancel, whose next term is less than 2^-26 of it."""
    b_series = 1.0 / 5040 + x * (1.0 / 40320)
    b_series = 1.0 / 720 + x * b_series
    b_series = 1.0 / 120 + x * b_series
    b_series = 1.0 / 24 + x * b_series
    b_series = 1.0 / 6 + x * b_series
    b_series = 0.5 + x * b_series
    return tl.where(tl.abs(x) < 0.5, x + x * x * b_series, tl.exp(x) - 1)


@triton.jit
def log1p(x):
    """log(1 + x): the logarithm of the rounded sum, and to first order what the rounding took from it."""
    b_sum = 1 + x
    b_lost = x - (b_sum - 1)
    m_plain = (b_sum > 0) & (b_sum < float("inf"))
    return tl.log(b_sum) + tl.where(m_plain, b_lost / tl.where(m_plain, b_sum, 1.0), 0.0)


@triton.jit
def log_sigmoid(x):
    """-log(1 + e^-x)."""
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def tanh(x):
    """(e^2x - 1) / (e^2x + 1), on the side where the exponential is at most 1."""
    b_less = expm1(-2 * tl.abs(x))
    b_size = -b_less / (2 + b_less)
    return tl.where(x < 0, -b_size, b_size)
