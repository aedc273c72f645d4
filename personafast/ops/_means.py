"""How log density ratios are joined, rule by rule: the mathematics that `aggregate_logits` and `chunk_scores` share.

Each function takes the logs [N, B, x] of N members and weights [N, B, 1] whose sizes sum to 1, where a weight of zero
leaves its member out, and returns the log of the mean [B, x]. -inf is an impossible member; a NaN of a member that
takes part comes out again.
"""

from __future__ import annotations

import math
from collections.abc import Set

import torch
import torch.nn.functional as F

from personafast.ops._aggregator import Aggregator

# Exponents nearer to 0 give the geometric mean: there the two differ by less than float32 can tell.
SMALLEST_EXPONENT = 1e-9

# A difference of this share of what it is taken from is rounding, and counts as nothing.
CANCELLED = 1e-5

# Where every log ratio is above it, Jensen-Shannon is the harmonic mean up to rounding.
HARMONIC_LIMIT = 16.0


def normalised(weight: torch.Tensor) -> torch.Tensor:
    """The weights [N, ...] over the sum of their sizes, 0 where all of them are."""
    total = weight.abs().sum(0)
    return weight / torch.where(total == 0, 1.0, total)


def join(
    logs: torch.Tensor, weight: torch.Tensor, aggregator: torch.Tensor, p: torch.Tensor, rules: Set[int]
) -> torch.Tensor:
    """Each row's mean under its own rule; `aggregator` and `p` are [B], `rules` what some row may ask for.

    The geometric rule is none of them: its weights are not normalised.
    """
    joined = logs.new_full(logs.shape[1:], -math.inf)
    if logs.shape[0] == 0:
        return joined
    used = weight != 0
    means = {
        Aggregator.LINEAR: lambda: linear(logs, weight),
        Aggregator.POWER: lambda: power(logs, weight, p.float()[:, None]),
        Aggregator.JENSEN_SHANNON: lambda: jensen_shannon(logs, weight),
        Aggregator.MIN: lambda: torch.where(used, logs, math.inf).amin(0),
        Aggregator.MAX: lambda: torch.where(used, logs, -math.inf).amax(0),
    }
    for rule, mean in means.items():
        if rule in rules:
            joined = torch.where((aggregator == int(rule))[:, None], mean(), joined)
    return joined


def linear(logs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Log of (sum_i w_i e^logs_i)+, the members of negative weight subtracted from the others."""
    added = torch.where(weight == 0, -math.inf, weight.clamp(min=0).log() + logs)
    added = torch.where(weight < 0, -math.inf, added).logsumexp(0)
    if logs.device.type == "cpu" and not bool((weight < 0).any()):
        return added
    taken = torch.where(weight < 0, weight.abs().log() + logs, -math.inf).logsumexp(0)
    less = torch.where(taken == -math.inf, -math.inf, taken - added)
    rest = torch.where(less >= -CANCELLED, -math.inf, added + torch.log1p(-less.exp()))
    return torch.where(added.isnan() | taken.isnan(), math.nan, rest)


def power(logs: torch.Tensor, weight: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Log of (sum_i w_i e^(p logs_i))^(1/p), and sum_i w_i logs_i at p = 0; p is [B, 1].

    With t the term that counts most, this is t + log(1 + sum_i w_i (e^(p (logs_i - t)) - 1)) / p, which loses nothing
    however small p is.
    """
    used = weight != 0
    geometric = p.abs() < SMALLEST_EXPONENT
    top = torch.where(p > 0, torch.where(used, logs, -math.inf).amax(0), torch.where(used, logs, math.inf).amin(0))
    power_of = torch.where(used, p * (logs - top), 0.0)
    more = (weight * power_of.expm1()).sum(0)
    # Far from 1 the sum of what is added is the more exact one.
    log_sum = torch.where(more > -0.25, more.log1p(), (weight * power_of.exp()).sum(0).log())
    mean = top + log_sum / torch.where(geometric, 1.0, p)
    # Where every member is impossible, or with p < 0 one of them.
    mean = torch.where(top == -math.inf, -math.inf, mean)
    if logs.device.type == "cpu" and not bool(geometric.any()):
        return mean
    impossible = (used & (logs == -math.inf)).any(0)
    product = (weight * torch.where(used & ~impossible, logs, 0.0)).sum(0)
    return torch.where(geometric, torch.where(impossible, -math.inf, product), mean)


def jensen_shannon(logs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Log of s / (1 - s), log s = sum_i w_i log sigmoid(logs_i); for one member, or equal ones, logs_i itself.

    With u = -log s that is -log(e^u - 1) = -u - log(1 - e^-u). Where every ratio is large u is
    sum_i w_i e^-logs_i, and so is e^u - 1: this limit is taken by its logarithm, since u underflows.
    """
    used = weight != 0
    below = torch.where(used, logs, math.inf)
    u = torch.where(used, -weight * F.logsigmoid(below), 0.0).sum(0)
    mean = -u - torch.log(-torch.expm1(-u))
    least = below.amin(0)
    large = least > HARMONIC_LIMIT
    if logs.device.type == "cpu" and not bool(large.any()):
        return mean
    spread = torch.where(used, least - logs, -math.inf)
    return torch.where(large, least - (weight * spread.exp()).sum(0).log(), mean)
