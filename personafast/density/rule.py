"""How the density ratios of each row meet: weights, rule, support mask."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from personafast import ops
from personafast.density.host import send
from personafast.errors import PersonafastError
from personafast.ops import Aggregator

# log g of log ratios: (log_ratios float32 [N, ..., ], weights float32 [N]) -> [...], N the members of non-zero weight.
Custom = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass
class Clamped:
    """What negative weights under the linear rule took from targets: the sum of shares, and over how many places."""

    share: float | torch.Tensor = 0.0
    places: int = 0


@dataclass(frozen=True)
class _Served:
    """Rows [b] that a function of a caller's own joins, all with the same weights, where the models are.

    Attributes:
        rows: int64 [b].
        used: int64 [n], the members of non-zero weight.
        weights: float32 [n], theirs.
        function: it.
    """

    rows: torch.Tensor
    used: torch.Tensor
    weights: torch.Tensor
    function: Custom


@dataclass
class Rule:
    """The target of every row: q(y) = b(y) g(r_1(y), ..., r_N(y)) / Z with r_i = pi_i / pi_0 (METHODS 3).

    What is asked of weights, rules and thresholds is settled on the host, which has them, and once: they do not change
    while a text is written. Targets are made where the models are, of copies that are sent there when first needed.

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
        device: where the models are; None for the CPU. All the tensors above are on the CPU.
    """

    weights: torch.Tensor
    aggregator: torch.Tensor
    min_p: torch.Tensor
    policy_temperature: float = 1.0
    p: torch.Tensor | None = None
    base: torch.Tensor | None = None
    custom: Sequence[Custom | None] | None = None
    clamped: Clamped = field(default_factory=Clamped)
    device: torch.device | None = None

    @property
    def trivial(self) -> bool:
        """Whether every row's target is its reference as it is."""
        return self.weights.shape[1] == 0 and not self.masks and self.policy_temperature == 1.0

    @cached_property
    def masks(self) -> bool:
        """Whether any row has a support mask."""
        return bool(self.min_p.any())

    @cached_property
    def based(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The rows where a policy stands for b and that policy, int64 [b] each where the models are; None without."""
        if self.base is None:
            return None
        rows = (self.base >= 0).nonzero().flatten()
        return (self._send(rows), self._send(self.base[rows])) if rows.numel() else None

    @cached_property
    def unweighted(self) -> torch.Tensor | None:
        """The rows without weights and support mask, bool [B] where the models are; None where no row is."""
        return self._without(self.weights)

    def no_ratios(self) -> torch.Tensor:
        """Log ratios of no text, float32 [B, N] where the models are."""
        return torch.zeros(self.weights.shape, dtype=torch.float32, device=self.device)

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
        aggregator, exponents, min_p = self._sent
        target = ops.aggregate_logits(reference, policies, self._member_weights, carried, aggregator, exponents, min_p)
        if self._clamping is not None:
            self._count_clamped(self._clamping, policies, carried)
        for served in self._customs:
            target[served.rows] = self._custom_targets(served, reference, policies, carried)
        if self._rebased is not None:
            rows = self._rebased[0]
            target[rows] = self._on_base(*self._rebased, target[rows], reference, policies, carried)
        # A row that is only its reference keeps raw logits, so that processors see what stock generate shows them.
        return target if self._plain is None else torch.where(self._plain[:, None], reference, target)

    def targets(
        self, reference: torch.Tensor, policies: torch.Tensor, carried: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`target` at m places of every row: reference [B, m, V], policies [N, B, m, V], carried [B, m, N] or None."""
        batch, places, vocabulary = reference.shape
        found = self.at_places(places).target(
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
        aggregator, exponents, _ = self._sent
        scores = ops.chunk_scores(reference, policies, self._sent_weights, carried, aggregator, exponents)
        for served in self._customs:
            rows, used = served.rows, served.used
            ratios = (policies[used][:, rows].float() - reference[rows].float()).cumsum(dim=-1)
            if carried is not None:
                ratios = ratios + carried[rows][:, used].t()[..., None]
            scores[rows] = _call(served.function, ratios, served.weights)
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

    def at_places(self, places: int) -> Rule:
        """The rule of m places of every row, place by place: B m rows."""
        if places == 1:
            return self
        if places not in self._at_places:
            rows = torch.arange(self.weights.shape[0]).repeat_interleave(places)
            self._at_places[places] = self.select(rows)
        return self._at_places[places]

    def select(self, rows: torch.Tensor) -> Rule:
        """The rule of some rows, which may repeat: int64 indices on the CPU."""
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
        # All of it: what was sent for the rows before is no longer theirs.
        self.__dict__ = dict(vars(self.select(rows)))

    def _send(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.device is None else send(tensor, self.device)

    @cached_property
    def _at_places(self) -> dict[int, Rule]:
        return {}

    @cached_property
    def _sent_weights(self) -> torch.Tensor:
        return self._send(self.weights)

    @cached_property
    def _sent(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Aggregators, exponents and thresholds where the models are."""
        exponents = torch.ones_like(self.min_p) if self.p is None else self.p
        return self._send(self.aggregator), self._send(exponents), self._send(self.min_p)

    @cached_property
    def _exponents_of_members(self) -> torch.Tensor:
        """The weights, and under the geometric rule a base as one more member, at exponent 1, float32 [B, N].

        That leaves the reference -sum alpha.
        """
        if self.base is None:
            return self.weights
        rows = ((self.base >= 0) & (self.aggregator == int(Aggregator.GEOMETRIC))).nonzero().flatten()
        weights = self.weights.clone()
        weights[rows, self.base[rows]] = 1.0
        return weights

    @cached_property
    def _member_weights(self) -> torch.Tensor:
        return self._send(self._exponents_of_members)

    @cached_property
    def _plain(self) -> torch.Tensor | None:
        """The rows that are only their reference, bool [B] where the models are; None where no row is."""
        return self._without(self._exponents_of_members)

    def _without(self, weights: torch.Tensor) -> torch.Tensor | None:
        rows = (weights == 0).all(dim=1) & (self.min_p == 0)
        return self._send(rows) if bool(rows.any()) else None

    @cached_property
    def _clamping(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The rows that may clamp, int64 [b], and their weights, both where the models are; None without any."""
        negative = (self.weights < 0).any(dim=1) & (self.aggregator == int(Aggregator.LINEAR))
        rows = negative.nonzero().flatten()
        return (self._send(rows), self._send(self.weights[rows])) if rows.numel() else None

    def _count_clamped(
        self, clamping: tuple[torch.Tensor, torch.Tensor], policies: torch.Tensor, carried: torch.Tensor | None
    ) -> None:
        """The mass below zero of sum_i w_i e^carried_i pi_i, as a share of all its mass by magnitude."""
        rows, weights = clamping
        log_weights = weights.abs().log()
        if carried is not None:
            log_weights = log_weights + carried[rows]
        factors = weights.sign() * log_weights.log_softmax(dim=1).exp()
        total = (factors.t()[:, :, None] * policies[:, rows].float().softmax(dim=-1)).sum(dim=0)
        share = total.clamp(max=0).abs().sum(dim=1) / total.abs().sum(dim=1)
        # Read when the text is done.
        self.clamped.share = self.clamped.share + share.sum().double()
        self.clamped.places += rows.numel()

    @cached_property
    def _customs(self) -> list[_Served]:
        """The rows that have a function; those of one function and the same weights are served together."""
        if self.custom is None:
            return []
        found: dict[tuple[int, tuple[float, ...]], tuple[list[int], Custom]] = {}
        for row, (function, weights) in enumerate(zip(self.custom, self.weights.tolist(), strict=True)):
            if function is not None:
                found.setdefault((id(function), tuple(weights)), ([], function))[0].append(row)
        served = []
        for rows, function in found.values():
            own = self.weights[rows[0]]
            used = own.nonzero().flatten()
            there = self._send(torch.tensor(rows)), self._send(used), self._send(own[used])
            served.append(_Served(*there, function))
        return served

    def _custom_targets(
        self,
        served: _Served,
        reference: torch.Tensor,
        policies: torch.Tensor,
        carried: torch.Tensor | None,
    ) -> torch.Tensor:
        """Targets [b, V] of rows that share a function and their weights."""
        rows, used = served.rows, served.used
        logp0 = reference[rows].float().log_softmax(-1)  # [b, V]
        logp = policies[used][:, rows].float().log_softmax(-1)  # [N, b, V]
        ratios = torch.where(logp0 == -torch.inf, -torch.inf, logp - logp0)
        if carried is not None:
            ratios = ratios + carried[rows][:, used].t()[..., None]
        log_g = _call(served.function, ratios, served.weights)
        target = torch.where(logp0 == -torch.inf, -torch.inf, logp0 + log_g)
        likely = _likely(torch.cat([logp, logp0[None]]), self._sent[2][rows])
        return _normalised(torch.where(likely, target, -torch.inf))

    @cached_property
    def _rebased(self) -> tuple[torch.Tensor, torch.Tensor, Rule] | None:
        """Rows whose base still has to take the reference's place, int64 [b], their bases, and their rule without.

        None where there is no such row.
        """
        if self.base is None:
            return None
        done = self.aggregator == int(Aggregator.GEOMETRIC)
        if self.custom is not None:
            done = done & torch.tensor([function is None for function in self.custom])
        rows = ((self.base >= 0) & ~done).nonzero().flatten()
        if not rows.numel():
            return None
        some = self.select(rows)
        some.base, some.min_p, some.policy_temperature = None, torch.zeros_like(some.min_p), 1.0
        # What negative weights take was counted when these rows were first seen.
        some.clamped = Clamped()
        return self._send(rows), self._send(self.base[rows]), some

    def _on_base(
        self,
        rows: torch.Tensor,
        base: torch.Tensor,
        some: Rule,
        target: torch.Tensor,
        reference: torch.Tensor,
        policies: torch.Tensor,
        carried: torch.Tensor | None,
    ) -> torch.Tensor:
        """Exchange pi_0 for b in some rows, whose target is [b, V]: log q + log b - log pi_0."""
        reference, of_base = reference[rows], policies[base, rows]
        whole = some.target(reference, policies[:, rows], None if carried is None else carried[rows])
        logp0, base_logp = reference.float().log_softmax(-1), of_base.float().log_softmax(-1)
        moved = torch.where(logp0 == -torch.inf, -torch.inf, whole.log_softmax(-1) - logp0 + base_logp)
        support = (target > -torch.inf) | _likely(base_logp[None], self._sent[2][rows])
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
