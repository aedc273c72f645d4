"""How the density ratios of each row meet: weights, rule, support mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from personafast import ops
from personafast.errors import PersonafastError
from personafast.ops import Aggregator

# log g of log ratios: (log_ratios float32 [N, ..., ], weights float32 [N]) -> [...], N the members of non-zero weight.
Custom = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Clamped:
    """What negative weights under the linear rule took from targets: the sum of shares, and over how many places."""

    share: float = 0.0
    places: int = 0


@dataclass
class Rule:
    """The target of every row: q(y) = b(y) g(r_1(y), ..., r_N(y)) / Z with r_i = pi_i / pi_0 (METHODS 3).

    Attributes:
        weights: float32 [B, N], alpha; 0 for a member a row does not have. Not normalised.
        aggregator: int32 [B], codes of `ops.Aggregator`. Not looked at where `custom` has a function.
        min_p: float32 [B], threshold of the support mask; 0 keeps every token.
        policy_temperature: divides the logits of every member before the ratios.
        p: float32 [B], exponent of power means; None for 1.
        base: int64 [B], index of the policy that stands for b; -1, or None for all rows, where b is the reference
            pi_0 itself. A base takes part in no ratio: its weight is 0.
        custom: a function a row in place of the aggregator, or None.
        clamped: counts what was clamped; shared with every selection of rows.
    """

    weights: torch.Tensor
    aggregator: torch.Tensor
    min_p: torch.Tensor
    policy_temperature: float = 1.0
    p: torch.Tensor | None = None
    base: torch.Tensor | None = None
    custom: Sequence[Custom | None] | None = None
    clamped: Clamped = field(default_factory=Clamped)

    def __post_init__(self) -> None:
        # Weights do not change while a text is written, so whether any may clamp is settled here.
        linear = (self.aggregator == int(Aggregator.LINEAR))[:, None]
        self._may_clamp = bool((linear & (self.weights < 0)).any())

    @property
    def trivial(self) -> bool:
        """Whether every row's target is its reference as it is."""
        return self.weights.shape[1] == 0 and not bool(self.min_p.any()) and self.policy_temperature == 1.0

    def target(
        self, reference: torch.Tensor, policies: torch.Tensor, carried: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Log-probabilities of the token-level target, float32 [B, V].

        Args:
            reference: raw logits [B, V].
            policies: raw logits [N, B, V].
            carried: float32 [B, N], log r_i of the text so far.
        """
        if self.trivial:
            return reference
        if self.policy_temperature != 1.0:
            reference, policies = reference / self.policy_temperature, policies / self.policy_temperature
        weights = self.weights
        if self.base is not None:
            # Under the geometric rule a base is one more member, at exponent 1: that leaves the reference -sum alpha.
            member = (self.base >= 0) & (self.aggregator == int(Aggregator.GEOMETRIC))
            rows = member.nonzero().flatten()
            weights = weights.clone()
            weights[rows, self.base[rows]] = 1.0
        target = ops.aggregate_logits(
            reference, policies, weights, carried, self.aggregator, self._exponents(), self.min_p
        )
        if self._may_clamp:
            self._count_clamped(policies, carried)
        for rows, function in self._customs():
            target[rows] = self._custom_targets(rows, function, reference, policies, carried)
        if self.base is not None:
            rows = self._rebased()
            if rows.numel():
                target[rows] = self._on_base(rows, target[rows], reference, policies, carried)
        # A row that is only its reference keeps raw logits, so that processors see what stock generate shows them.
        plain = (weights == 0).all(dim=1) & (self.min_p == 0)
        return torch.where(plain[:, None], reference, target) if bool(plain.any()) else target

    def targets(
        self, reference: torch.Tensor, policies: torch.Tensor, carried: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`target` at m places of every row: reference [B, m, V], policies [N, B, m, V], carried [B, m, N] or None."""
        batch, places, vocabulary = reference.shape
        flat = self.select(torch.arange(batch, device=reference.device).repeat_interleave(places))
        found = flat.target(
            reference.reshape(batch * places, vocabulary),
            policies.reshape(-1, batch * places, vocabulary),
            None if carried is None else carried.reshape(batch * places, -1),
        )
        return found.view(batch, places, vocabulary)

    def scores(
        self, reference: torch.Tensor, policies: torch.Tensor, carried: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Log g of the ratios of every prefix of a chunk, float32 [B, k].

        Args:
            reference: log-probabilities of the chunk's tokens, [B, k].
            policies: those of every policy, [N, B, k].
            carried: float32 [B, N], log ratios of the text before the chunk.
        """
        scores = ops.chunk_scores(reference, policies, self.weights, carried, self.aggregator, self._exponents())
        for rows, function in self._customs():
            used = self._used(rows)
            ratios = (policies[used][:, rows].float() - reference[rows].float()).cumsum(dim=-1)
            if carried is not None:
                ratios = ratios + carried[rows][:, used].t()[..., None]
            scores[rows] = _call(function, ratios, self.weights[rows[0], used])
        return scores

    def log_ratios(self, reference: torch.Tensor, policies: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        """log pi_i(token) - log pi_0(token), float32 [B, N], from raw logits [B, V], [N, B, V] and int64 [B]."""
        t = self.policy_temperature
        index = token[None, :, None].expand(policies.shape[0], -1, 1)
        of_policies = (policies / t).log_softmax(dim=-1).gather(2, index).squeeze(2)
        of_reference = (reference / t).log_softmax(dim=-1).gather(1, token[:, None])
        return of_policies.t() - of_reference

    def supported(self, reference: torch.Tensor, policies: torch.Tensor) -> torch.Tensor:
        """Which tokens the support mask keeps, bool [B, V]; arguments as for `target`."""
        return self.target(reference, policies) > -torch.inf

    def select(self, rows: torch.Tensor) -> Rule:
        """The rule of some rows, which may repeat: int64 indices."""
        return replace(
            self,
            weights=self.weights[rows],
            aggregator=self.aggregator[rows],
            min_p=self.min_p[rows],
            p=None if self.p is None else self.p[rows],
            base=None if self.base is None else self.base[rows],
            custom=None if self.custom is None else [self.custom[row] for row in rows.tolist()],
        )

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only."""
        self.__dict__.update(vars(self.select(rows)))

    def _exponents(self) -> torch.Tensor:
        return torch.ones_like(self.min_p) if self.p is None else self.p

    def _count_clamped(self, policies: torch.Tensor, carried: torch.Tensor | None) -> None:
        """The mass below zero of sum_i w_i e^carried_i pi_i, as a share of all its mass by magnitude."""
        negative = (self.weights < 0).any(dim=1) & (self.aggregator == int(Aggregator.LINEAR))
        rows = negative.nonzero().flatten()
        log_weights = self.weights[rows].abs().log()
        if carried is not None:
            log_weights = log_weights + carried[rows]
        factors = self.weights[rows].sign() * log_weights.log_softmax(dim=1).exp()
        total = (factors.t()[:, :, None] * policies[:, rows].float().softmax(dim=-1)).sum(dim=0)
        share = total.clamp(max=0).abs().sum(dim=1) / total.abs().sum(dim=1)
        self.clamped.share += float(share.sum())
        self.clamped.places += rows.numel()

    def _customs(self) -> list[tuple[torch.Tensor, Custom]]:
        """The rows that have a function, int64 [b]; those of one function and the same weights are served together."""
        if self.custom is None:
            return []
        found: dict[tuple[int, tuple[float, ...]], tuple[list[int], Custom]] = {}
        for row, (function, weights) in enumerate(zip(self.custom, self.weights.tolist(), strict=True)):
            if function is not None:
                found.setdefault((id(function), tuple(weights)), ([], function))[0].append(row)
        return [(torch.tensor(rows, device=self.weights.device), function) for rows, function in found.values()]

    def _used(self, rows: torch.Tensor) -> torch.Tensor:
        """Members of non-zero weight of rows that have the same weights."""
        return self.weights[rows[0]].nonzero().flatten()

    def _custom_targets(
        self,
        rows: torch.Tensor,
        function: Custom,
        reference: torch.Tensor,
        policies: torch.Tensor,
        carried: torch.Tensor | None,
    ) -> torch.Tensor:
        """Targets [b, V] of rows that share a function and their weights."""
        used = self._used(rows)
        logp0 = reference[rows].float().log_softmax(-1)  # [b, V]
        logp = policies[used][:, rows].float().log_softmax(-1)  # [N, b, V]
        ratios = torch.where(logp0 == -torch.inf, -torch.inf, logp - logp0)
        if carried is not None:
            ratios = ratios + carried[rows][:, used].t()[..., None]
        log_g = _call(function, ratios, self.weights[rows[0], used])
        target = torch.where(logp0 == -torch.inf, -torch.inf, logp0 + log_g)
        likely = _likely(torch.cat([logp, logp0[None]]), self.min_p[rows])
        return _normalised(torch.where(likely, target, -torch.inf))

    def _rebased(self) -> torch.Tensor:
        """Rows whose base still has to take the reference's place, int64 [b]."""
        assert self.base is not None
        done = self.aggregator == int(Aggregator.GEOMETRIC)
        for rows, _ in self._customs():
            done = done.index_fill(0, rows, False)
        return ((self.base >= 0) & ~done).nonzero().flatten()

    def _on_base(
        self,
        rows: torch.Tensor,
        target: torch.Tensor,
        reference: torch.Tensor,
        policies: torch.Tensor,
        carried: torch.Tensor | None,
    ) -> torch.Tensor:
        """Exchange pi_0 for b in some rows, whose target is [b, V]: log q + log b - log pi_0."""
        assert self.base is not None
        some = self.select(rows)
        some.base, some.min_p, some.policy_temperature = None, torch.zeros_like(some.min_p), 1.0
        # What negative weights take was counted when these rows were first seen.
        some.clamped = Clamped()
        reference, of_base = reference[rows], policies[self.base[rows], rows]
        whole = some.target(reference, policies[:, rows], None if carried is None else carried[rows])
        logp0, base = reference.float().log_softmax(-1), of_base.float().log_softmax(-1)
        moved = torch.where(logp0 == -torch.inf, -torch.inf, whole.log_softmax(-1) - logp0 + base)
        support = (target > -torch.inf) | _likely(base[None], self.min_p[rows])
        return _normalised(torch.where(support, moved, -torch.inf))


def _likely(logp: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Tokens that pass min-p [b] under at least one member, bool [b, V]; logp is [M, b, V]."""
    return (logp >= logp.amax(-1, keepdim=True) + min_p.log()[:, None]).any(0)


def _normalised(target: torch.Tensor) -> torch.Tensor:
    norm = target.logsumexp(-1, keepdim=True)
    return torch.where(norm == -torch.inf, target, target - norm)


def _call(function: Custom, ratios: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    found = function(ratios, weights)
    if not isinstance(found, torch.Tensor) or found.shape != ratios.shape[1:]:
        given = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise PersonafastError(
            f"aggregator: the function gave {given} for log ratios {list(ratios.shape)}; return log g as a tensor "
            f"{list(ratios.shape[1:])}"
        )
    return found.float()
