"""How log density ratios are joined, rule by rule: `personafast.ops._means` in Triton.

Logs are a block [N, X], a member a row; weights are [N, 1], and a weight of zero leaves its member out (which is how a
count of members that is no power of two is padded). The results are [X]. -inf is an impossible member; a NaN of a
member that takes part comes out again. The members of a column lie in one thread if its warps cover X, so that sums
over them are in order and cost no exchange.
"""

from __future__ import annotations

import triton
import triton.language as tl
from personafast._triton.elementary import expm1, log1p, log_sigmoid

# The codes of `personafast.ops.Aggregator`.
LINEAR = tl.constexpr(0)
GEOMETRIC = tl.constexpr(1)
POWER = tl.constexpr(2)
JENSEN_SHANNON = tl.constexpr(3)
MIN = tl.constexpr(4)
MAX = tl.constexpr(5)

# As in `personafast.ops._means`.
SMALLEST_EXPONENT = tl.constexpr(1e-9)
CANCELLED = tl.constexpr(1e-5)
HARMONIC_LIMIT = tl.constexpr(16.0)


@triton.jit
def at_fault(b_rule, b_weight, b_p):
    """Whether a CPU would refuse the row: an unknown code, a weight it has no use for, an exponent without end.

    Every rule but the linear and the geometric one needs weights of 0 or more. `b_weight` is as it was given: its
    sign is asked for before any rounding.
    """
    b_negative = tl.sum((b_weight < 0).to(tl.int32)) > 0
    b_endless = ~(tl.abs(b_p) < float("inf"))
    b_unsigned = b_negative & (b_rule != LINEAR) & (b_rule != GEOMETRIC)
    return (b_rule < LINEAR) | (b_rule > MAX) | b_unsigned | (b_endless & (b_rule == POWER))


@triton.jit
def least(b_logs, b_weight):
    """The least log of the members that take part."""
    return tl.min(tl.where(b_weight != 0, b_logs, float("inf")), 0)


@triton.jit
def greatest(b_logs, b_weight):
    """The greatest log of the members that take part."""
    return tl.max(tl.where(b_weight != 0, b_logs, -float("inf")), 0)


@triton.jit
def product(b_logs, b_weight):
    """sum_i w_i logs_i, of any weights; -inf where one of the members is impossible, whatever its weight's sign."""
    m_impossible = (b_weight != 0) & (b_logs == -float("inf"))
    b_terms = tl.where((b_weight == 0) | m_impossible, 0.0, b_weight * b_logs)
    return tl.where(tl.max(m_impossible.to(tl.int32), 0) > 0, -float("inf"), tl.sum(b_terms, 0))


@triton.jit
def linear(b_logs, b_weight):
    """Log of (sum_i w_i e^logs_i)+, where a rest that is rounding counts as nothing."""
    m_used = b_weight != 0
    b_terms = tl.where(m_used, tl.log(tl.where(m_used, tl.abs(b_weight), 1.0)) + b_logs, -float("inf"))
    b_top = tl.max(b_terms, 0)
    # Infinite, it would make NaN of what is infinite too.
    b_top = tl.where(tl.abs(b_top) < float("inf"), b_top, 0.0)
    b_sizes = tl.exp(b_terms - b_top[None, :])
    b_added = tl.sum(tl.where(b_weight > 0, b_sizes, 0.0), 0)
    b_taken = tl.sum(tl.where(b_weight < 0, b_sizes, 0.0), 0)
    b_rest = b_added - b_taken
    m_left = (b_taken == 0) | ~(b_rest <= b_added * CANCELLED)
    m_left = m_left & (b_rest != 0)
    return tl.where(m_left, b_top + tl.log(tl.where(m_left, b_rest, 1.0)), -float("inf"))


@triton.jit
def power(b_logs, b_weight, b_p):
    """Log of (sum_i w_i e^(p logs_i))^(1/p), t + log(1 + sum_i w_i (e^(p (logs_i - t)) - 1)) / p; the product at p = 0.

    t is the term that counts most. Far from 1 the sum itself is more exact than what it adds to 1.
    """
    if tl.abs(b_p) < SMALLEST_EXPONENT:
        b_mean = product(b_logs, b_weight)
    else:
        if b_p > 0:
            b_top = greatest(b_logs, b_weight)
        else:
            b_top = least(b_logs, b_weight)
        m_some = b_top != -float("inf")
        b_powers = tl.where((b_weight != 0) & m_some[None, :], b_p * (b_logs - b_top[None, :]), 0.0)
        b_more = tl.sum(b_weight * expm1(b_powers), 0)
        m_near = b_more > -0.25
        b_sum = tl.sum(b_weight * tl.exp(b_powers), 0)
        b_log_sum = tl.where(m_near, log1p(tl.where(m_near, b_more, 0.0)), tl.log(b_sum))
        b_mean = tl.where(m_some, b_top + b_log_sum / b_p, -float("inf"))
    return b_mean


@triton.jit
def jensen_shannon(b_logs, b_weight):
    """Log of s / (1 - s), log s = sum_i w_i log sigmoid(logs_i): with u = -log s, -u - log(1 - e^-u).

    Where every log is large u underflows, and s / (1 - s) is the harmonic mean.
    """
    m_used = b_weight != 0
    b_least = least(b_logs, b_weight)
    m_large = b_least > HARMONIC_LIMIT
    b_u = tl.sum(tl.where(m_used, -b_weight * log_sigmoid(b_logs), 0.0), 0)
    b_log_rest = tl.log(tl.where(m_large, 1.0, -expm1(-b_u)))
    b_harmonic = tl.sum(tl.where(m_used, b_weight * tl.exp(b_least[None, :] - b_logs), 0.0), 0)
    # An impossible member: there the distance to the least is no number.
    b_harmonic = tl.where(m_large, b_harmonic, 1.0)
    return tl.where(m_large, b_least - tl.log(b_harmonic), -b_u - b_log_rest)


@triton.jit
def join(b_logs, b_weight, b_rule, b_p):
    """The mean under the row's rule; the sizes of the weights sum to 1, and one of them at least is not 0.

    The geometric rule is none of them: its weights are not normalised, so it takes `product` itself.
    """
    # The least and the greatest of values pass over NaN.
    m_nan = (b_weight != b_weight) | ((b_weight != 0) & (b_logs != b_logs))
    m_nan = tl.max(m_nan.to(tl.int32), 0) > 0
    if b_rule == LINEAR:
        b_joined = linear(b_logs, b_weight)
    elif b_rule == POWER:
        b_joined = power(b_logs, b_weight, b_p)
    elif b_rule == JENSEN_SHANNON:
        b_joined = jensen_shannon(b_logs, b_weight)
    elif b_rule == MIN:
        b_joined = least(b_logs, b_weight)
    else:
        b_joined = greatest(b_logs, b_weight)
    return tl.where(m_nan, float("nan"), b_joined)
