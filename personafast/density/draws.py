"""Random draws that belong to a row, not to a batch: Philox keyed by the row's seed and its position."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NoReturn

import torch

from personafast import ops
from personafast.density.host import Host, judge, send
from personafast.errors import PersonafastError
from personafast.ops import philox

_MIX = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio: splitmix64's increment
_MASK = (1 << 64) - 1


class Stream(IntEnum):
    """What a uniform is for; two purposes at one position never share a draw."""

    SAMPLE = 0
    PROPOSE = 1
    ACCEPT = 2
    RETRY = 3
    EXACT = 4
    MEMBER = 5


def row_seed(seed: int, row: int) -> int:
    """A 63-bit seed for one row of a call, by splitmix64 of the call's seed and the row's index."""
    state = (seed + (row + 1) * _MIX) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return (state ^ (state >> 31)) >> 1


class Draws:
    """Uniforms of B rows, made on the CPU, as all devices would make them.

    Args:
        seeds: int64 [B] on the CPU, the rows' own seeds.
    """

    def __init__(self, seeds: torch.Tensor) -> None:
        self._seeds = seeds

    @property
    def seeds(self) -> torch.Tensor:
        """The rows' own seeds, int64 [B]."""
        return self._seeds

    def uniform(self, stream: Stream, positions: torch.Tensor, n: int = 1) -> torch.Tensor:
        """float64 [B, n] in (0, 1) for the rows' positions, int64 [B]; all on the CPU."""
        return philox.uniform(self._seeds, positions, int(stream), n)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only."""
        self._seeds = self._seeds[rows]


def nothing_left(rows: Sequence[int]) -> NoReturn:
    """Refuse to go on: the targets of these rows leave nothing to draw."""
    raise PersonafastError(
        f"target: row {rows[0]} of the batch has no token left or its logits are not numbers; use smaller weights, "
        "a wider dtype or fewer logits processors"
    )


def check_target(values: torch.Tensor, host: Host | None = None) -> None:
    """Raise `PersonafastError` if what stands for a row's target, [B], is not a number or the logarithm of nothing.

    With a host, and where the models are elsewhere, that is found out when it reads next.
    """
    wrong = ~(values > -torch.inf)
    if host is None:
        judge(wrong, nothing_left)
    else:
        host.expect(wrong, nothing_left)


def settle(target: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
    """A target [B, ...] with something to draw in the rows that have ended, whatever became of theirs.

    Until they leave the batch such rows take part in every call, and nothing that is drawn for them is kept.

    Args:
        target: where the models are.
        ended: bool [B] on the CPU.
    """
    if not bool(ended.any()):
        return target
    ended = send(ended, target.device)
    return torch.where(ended.view(-1, *[1] * (target.dim() - 1)), 0.0, target)


def choose(logp: torch.Tensor, u: torch.Tensor, host: Host | None = None) -> torch.Tensor:
    """Invert the distribution function: the first token whose cumulated probability exceeds u.

    Args:
        logp: [B, V] log-probabilities up to a constant; -inf for tokens that cannot be drawn.
        u: float64 [B] or [B, n] in (0, 1).
        host: as for `check_target`.

    Returns:
        int64, of the shape of u.

    Raises:
        PersonafastError: a row holds NaN, or no token that can be drawn.
    """
    p = torch.softmax(logp.double(), dim=-1)
    cumulated = p.cumsum(dim=-1)
    check_target(cumulated[:, -1], host)
    token = torch.searchsorted(cumulated, u.view(u.shape[0], -1) * cumulated[:, -1:], right=True)
    # Rounding may leave the product on the total: the last token that can be drawn takes it.
    last = p.shape[1] - 1 - (p.flip(1) > 0).int().argmax(dim=1)
    return torch.minimum(token, last[:, None]).view(u.shape)


def next_token(logp: torch.Tensor, draws: Draws | None, positions: torch.Tensor, host: Host) -> torch.Tensor:
    """The token that follows every row's text, int64 [B] where the models are.

    Args:
        logp: [B, V] log-probabilities up to a constant, where the models are.
        draws: uniforms; None takes the most probable token.
        positions: int64 [B] on the CPU, the rows' lengths.
        host: finds out, now or when it reads next, about rows without a token.
    """
    if draws is None:
        token = logp.argmax(dim=-1)
        check_target(logp.gather(1, token[:, None]).squeeze(1), host)
        return token
    if not host.remote:
        return choose(logp, draws.uniform(Stream.SAMPLE, positions)[:, 0])
    # The same draw in one kernel: a draft of no tokens.
    nothing = torch.zeros(logp.shape[0], 0, dtype=torch.long, device=logp.device)
    none = torch.zeros(logp.shape[0], dtype=torch.int32, device=logp.device)
    target = logp.float().log_softmax(dim=-1)[:, None]
    tokens, _ = ops.verify_draft(target, None, nothing, none, host.send(draws.seeds), host.send(positions))
    host.expect(tokens[:, 0] < 0, nothing_left)
    return tokens[:, 0]
