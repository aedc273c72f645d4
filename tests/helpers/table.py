"""Tables over a tiny vocabulary in place of models, and the distributions they imply by enumeration."""

from __future__ import annotations

import itertools

import torch
from scipy import stats as scipy_stats

from personafast.density.rule import Rule
from personafast.ops import Aggregator


class Tables:
    """Next-token logits of a reference and N policies for every prefix of up to `length` tokens."""

    def __init__(
        self, policies: int, vocab: int = 4, length: int = 4, seed: int = 0, near: float | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab, self.length = vocab, length
        self.offsets = torch.tensor([sum(vocab**j for j in range(n)) for n in range(length + 1)])
        prefixes = int(self.offsets[-1]) + 1  # one spare row for drafts that run past the end
        self.logits = torch.randn(policies + 1, prefixes, vocab, generator=generator)
        if near is not None:  # policies that differ little from the reference, as trained ones do at most tokens
            self.logits[1:] = self.logits[0] + near * self.logits[1:]

    def row(self, code: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
        """Index of a prefix, given as its base-V code and its length."""
        spare = self.logits.shape[1] - 1
        return torch.where(length < self.length, self.offsets[length.clamp(max=self.length)] + code, spare)

    def joint(self, rule: Rule) -> torch.Tensor:
        """Probability of every full text under the token-level target, [V ** length]; rule has one row."""
        found = []
        for text in itertools.product(range(self.vocab), repeat=self.length):
            logp, code = 0.0, 0
            for position, token in enumerate(text):
                index = self.row(torch.tensor(code), torch.tensor(position))
                target = rule.target(self.logits[0, index][None], self.logits[1:, index][:, None])
                logp += float(target.double().log_softmax(-1)[0, token])
                code = code * self.vocab + token
            found.append(logp)
        return torch.tensor(found, dtype=torch.float64).exp()


class TableScorer:
    """`Scorer` over tables, all rows with the same empty prompt; `ahead` are the logits of what proposes, [P, V]."""

    def __init__(self, tables: Tables, rows: int, ahead: torch.Tensor | None = None) -> None:
        self.tables = tables
        self.ahead = tables.logits[0] if ahead is None else ahead
        self.code = torch.zeros(rows, dtype=torch.long)
        self.length = torch.zeros(rows, dtype=torch.long)

    def _after(self, draft: torch.Tensor, count: int) -> torch.Tensor:
        code = self.code
        for j in range(count):
            code = code * self.tables.vocab + draft[:, j]
        return self.tables.row(code, self.length + count)

    def propose(self, draft: torch.Tensor) -> torch.Tensor:
        return self.ahead[self._after(draft, draft.shape[1])]

    def speak(self, member: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
        return self.tables.logits[1 + member, self._after(draft, draft.shape[1])]

    def score(self, draft: torch.Tensor, *, reference: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        index = torch.stack([self._after(draft, j) for j in range(draft.shape[1] + 1)], dim=1)
        return (self.tables.logits[0, index] if reference else None), self.tables.logits[1:, index]

    def commit(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        for j in range(tokens.shape[1]):
            adds = counts > j
            self.code = torch.where(adds, self.code * self.tables.vocab + tokens[:, j], self.code)
            self.length = self.length + adds.long()

    def keep(self, rows: torch.Tensor) -> None:
        self.code, self.length = self.code[rows], self.length[rows]


def rule(rows: int, weights: list[float], aggregator: str, min_p: float = 0.0, temperature: float = 1.0) -> Rule:
    """The same rule for every row."""
    return Rule(
        torch.tensor(weights).repeat(rows, 1),
        torch.full((rows,), int(Aggregator[aggregator.upper()]), dtype=torch.int32),
        torch.full((rows,), min_p),
        temperature,
    )


def p_value(codes: torch.Tensor, expected: torch.Tensor) -> float:
    """Chi-square of observed texts against probabilities; cells with expectation below 5 are pooled."""
    counts = torch.bincount(codes, minlength=expected.numel()).double()
    wanted = expected / expected.sum() * codes.numel()
    small = wanted < 5
    assert counts[wanted == 0].sum() == 0, "a text of probability zero was drawn"
    observed, hoped = counts[~small].tolist(), wanted[~small].tolist()
    if wanted[small].sum() > 0:
        observed.append(float(counts[small].sum()))
        hoped.append(float(wanted[small].sum()))
    return float(scipy_stats.chisquare(observed, hoped).pvalue)


def total_variation(codes: torch.Tensor, expected: torch.Tensor) -> float:
    counts = torch.bincount(codes, minlength=expected.numel()).double()
    return float((counts / counts.sum() - expected / expected.sum()).abs().sum() / 2)
