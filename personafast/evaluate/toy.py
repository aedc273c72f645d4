"""A toy in place of models, small enough that the laws samplers aim at can be written down and compared with."""

from __future__ import annotations

from collections.abc import Callable

import torch

from personafast.density.draws import Draws
from personafast.density.rule import Rule
from personafast.density.transcript import GenerationStats, Transcript
from personafast.errors import PersonafastError
from personafast.ops import Aggregator

LARGEST = 1 << 20  # texts an enumeration may hold


class Toy:
    """A reference and N policies whose next-token logits depend on the last few tokens only.

    Texts may thus be as long as estimates need to settle, and the law of any stretch of them is a sum over few
    contexts.
    Every text starts after a context of zeros. All weights are 1, so that no rule needs more than its name: under the
    linear one the target is the even mixture.

    Args:
        policies: N.
        vocabulary: V, tokens.
        order: tokens of context; there are C = V ** order contexts.
        seed: of the logits.
        apart: standard deviation of a policy's logits around the reference's, which are standard normal.
    """

    def __init__(
        self, policies: int = 2, vocabulary: int = 2, order: int = 2, seed: int = 0, apart: float = 0.5
    ) -> None:
        if min(policies, order) < 1 or vocabulary < 2:
            raise PersonafastError(
                f"toy: {policies} policies, {vocabulary} tokens, order {order}; give at least 1, 2 and 1"
            )
        self.policies, self.vocabulary = policies, vocabulary
        self.contexts = vocabulary**order
        generator = torch.Generator().manual_seed(seed)
        reference = torch.randn(self.contexts, vocabulary, generator=generator)
        moved = torch.randn(policies, self.contexts, vocabulary, generator=generator)
        self.logits = torch.cat([reference[None], reference + apart * moved])  # [N + 1, C, V], reference first
        grown = torch.arange(self.contexts)[:, None] * vocabulary + torch.arange(vocabulary)
        self.after = grown % self.contexts  # [C, V], the context after one more token

    def rule(self, rows: int, aggregator: str) -> Rule:
        """The same rule for every row: weights 1, no support mask."""
        return Rule(
            torch.ones(rows, self.policies),
            torch.full((rows,), int(Aggregator[aggregator.upper()]), dtype=torch.int32),
            torch.zeros(rows),
        )

    def chunk_law(self, aggregator: str, chunk: int, length: int, start: int = 0) -> torch.Tensor:
        """What the chunk-level target says of `length` tokens, float64 [V ** length], by `codes`.

        Each chunk of k tokens is drawn from pi_0(C | Y) g(r_1(C | Y), ..., r_N(C | Y)) / Z(Y), the last one shorter if
        need be; k = 1 is the token-level target. `start` tokens of the token-level target come before.

        Raises:
            PersonafastError: the aggregator is neither "linear" nor "geometric", or there are too many texts.
        """
        if min(chunk, length) < 1 or self.contexts * self.vocabulary**length > LARGEST:
            raise PersonafastError(f"toy: cannot enumerate texts of {length} tokens in chunks of {chunk}")
        law = self._spread(aggregator, start)[:, None]  # [C, texts], by the context a text begins with
        context = torch.arange(self.contexts)[:, None]
        while length > 0:
            size = min(chunk, length)
            conditional, ends = self._chunk(aggregator, size)
            law = (law[..., None] * conditional[context]).flatten(1)
            context = ends[context].flatten(1)
            length -= size
        return law.sum(dim=0)

    def sampled_law(
        self,
        run: Callable[[ToyScorer, Transcript, Rule, Draws], None],
        aggregator: str,
        length: int,
        start: int = 0,
        *,
        texts: int,
        seed: int,
        batch: int = 50_000,
    ) -> tuple[torch.Tensor, list[GenerationStats]]:
        """Shares of what a sampler wrote after its first `start` tokens, as in `chunk_law`, and statistics by batch.

        Args:
            run: writes one batch of texts.
            aggregator: the rule's name.
            length: tokens to look at.
            start: tokens before them.
            texts: how many to sample.
            seed: of the draws.
            batch: texts at once.
        """
        counts = torch.zeros(self.vocabulary**length, dtype=torch.float64)
        generator = torch.Generator().manual_seed(seed)
        stats = []
        for done in range(0, texts, batch):
            rows = min(batch, texts - done)
            transcript = Transcript(torch.zeros(rows, 1, dtype=torch.long), start + length, ())
            draws = Draws(torch.randint(2**62, (rows,), generator=generator))
            run(ToyScorer(self, rows), transcript, self.rule(rows, aggregator), draws)
            tokens = transcript.sequences(0)[:, 1 + start :]
            counts += torch.bincount(self.codes(tokens), minlength=counts.numel())
            stats.append(transcript.stats)
        return counts / texts, stats

    def codes(self, texts: torch.Tensor) -> torch.Tensor:
        """Texts, int64 [n, length], as numbers of base V, first token first."""
        places = self.vocabulary ** torch.arange(texts.shape[1] - 1, -1, -1)
        return (texts * places).sum(dim=1)

    def _chunk(self, aggregator: str, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Law of a chunk after every context and the context it leads to, both [C, V ** size]."""
        members = self.logits.double().log_softmax(-1)
        logp = torch.zeros(self.policies + 1, self.contexts, 1, dtype=torch.float64)
        context = torch.arange(self.contexts)[:, None]
        for _ in range(size):
            logp = (logp[..., None] + members[:, context]).flatten(2)
            context = self.after[context].flatten(1)
        return (logp[0] + _log_g(aggregator, logp[1:] - logp[0])).softmax(-1), context

    def _spread(self, aggregator: str, start: int) -> torch.Tensor:
        """Law of the context after `start` tokens of the token-level target, [C]."""
        one, ends = self._chunk(aggregator, 1)
        law = torch.zeros(self.contexts, dtype=torch.float64)
        law[0] = 1
        for _ in range(start):
            law = torch.zeros_like(law).index_add(0, ends.flatten(), (law[:, None] * one).flatten())
        return law


class ToyScorer:
    """`Scorer` over a toy: all it keeps is every row's context."""

    def __init__(self, toy: Toy, rows: int) -> None:
        self.toy = toy
        self._context = torch.zeros(rows, dtype=torch.long)

    def propose(self, draft: torch.Tensor) -> torch.Tensor:
        """The reference's logits, [B, V]."""
        return self.toy.logits[0, self._along(draft)[:, -1]]

    def score(self, draft: torch.Tensor, *, reference: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Logits after the text and after each draft token, [B, j + 1, V] and [N, B, j + 1, V]."""
        places = self._along(draft)
        return (self.toy.logits[0, places] if reference else None), self.toy.logits[1:, places]

    def speak(self, member: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
        """One policy's logits a row, [B, V]."""
        return self.toy.logits[1 + member, self._along(draft)[:, -1]]

    def commit(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Move every row on by as many of its tokens as count."""
        self._context = self._along(tokens).gather(1, counts[:, None].long())[:, 0]

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows."""
        self._context = self._context[rows]

    def _along(self, tokens: torch.Tensor) -> torch.Tensor:
        """Contexts before and after each token, int64 [B, n + 1]."""
        places = [self._context]
        for j in range(tokens.shape[1]):
            places.append(self.toy.after[places[-1], tokens[:, j]])
        return torch.stack(places, dim=1)


def total_variation(p: torch.Tensor, q: torch.Tensor) -> float:
    """Half the sum of |p - q|: the largest difference of the two laws on any set of texts."""
    return float((p - q).abs().sum() / 2)


def noise(law: torch.Tensor, texts: int) -> float:
    """Total variation from `law` that so many exact samples of it are expected to show: that of a normal deviation.

    Each share p has the standard deviation sqrt(p (1 - p) / n), and a normal deviate's mean magnitude is sqrt(2 / pi)
    of that.
    """
    return float((law * (1 - law) / texts).sqrt().sum() / (2 * torch.pi) ** 0.5)


def _log_g(aggregator: str, ratios: torch.Tensor) -> torch.Tensor:
    """Log of the joined ratios, up to a constant, from log ratios [N, ...]."""
    if aggregator == "geometric":
        return ratios.sum(dim=0)
    if aggregator == "linear":
        return ratios.logsumexp(dim=0)
    raise PersonafastError(f"toy: {aggregator!r} is not one of linear, geometric")
