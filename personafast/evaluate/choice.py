"""Which of two answers a model prefers, and how often that is the one a persona would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from personafast.errors import PersonafastError
from personafast.evaluate.intervals import Interval, paired_difference, wilson
from personafast.evaluate.items import ChoiceItem
from personafast.evaluate.logprobs import Continuation, TextScorer
from personafast.models.reading import chat_ids

NORMALISATIONS = ("token", "character", "none")


@dataclass(frozen=True)
class Choices:
    """What was chosen of every item, and by how much.

    Attributes:
        scores: float64 [items, 2], the normalised log-probability of each answer.
        labels: the labels of each item's answers.
    """

    scores: torch.Tensor
    labels: tuple[tuple[str, str], ...]

    @property
    def chosen(self) -> list[str | None]:
        """The label of the likelier answer of every item; None where both are equally likely."""
        return [
            None if first == second else pair[int(second > first)]
            for (first, second), pair in zip(self.scores.tolist(), self.labels, strict=True)
        ]

    def share(self, label: str) -> Interval:
        """How often the answer of this label was chosen where there is one, with 95 % Wilson limits.

        Raises:
            PersonafastError: no item has the label.
        """
        hits = self.hits(label)
        return wilson(sum(hits), len(hits))

    def hits(self, label: str) -> list[bool]:
        """Whether the answer of this label was chosen, of every item that has one.

        Raises:
            PersonafastError: no item has the label.
        """
        found = [one == label for one, pair in zip(self.chosen, self.labels, strict=True) if label in pair]
        if not found:
            known = ", ".join(sorted({each for pair in self.labels for each in pair}))
            raise PersonafastError(f"label: no item has {label!r}; there are {known}")
        return found

    def margin(self, label: str) -> float:
        """Mean over the items of the label's score less the other answer's."""
        margins = [
            float(score[pair.index(label)] - score[1 - pair.index(label)])
            for score, pair in zip(self.scores, self.labels, strict=True)
            if label in pair
        ]
        return sum(margins) / len(margins)

    def less(self, other: Choices, label: str) -> Interval:
        """Share of the label here less that of `other`, over the same items, with 95 % limits for paired shares."""
        own, theirs = self.hits(label), other.hits(label)
        return paired_difference(
            sum(a and not b for a, b in zip(own, theirs, strict=True)),
            sum(b and not a for a, b in zip(own, theirs, strict=True)),
            len(own),
        )


def choose(
    model: Any,
    tokenizer: Any,
    items: Sequence[ChoiceItem],
    *,
    system: str | None = None,
    normalise: str = "token",
    batch_size: int = 32,
    on_items: Callable[[int], None] | None = None,
) -> Choices:
    """Score both answers of every item as the reply to its question.

    score(a) = (1 / n) sum_t log p(a_t | prompt, a_<t), n the tokens of the answer (`token`), its characters
    (`character`), or 1 (`none`). Without the normalisation the shorter answer is favoured (arXiv 2602.07164 compares
    length-normalised log-probabilities).

    Args:
        model: a transformers causal LM; who speaks is what is in force (`handle.using`).
        tokenizer: its tokenizer; without a chat template a question stands as "Question: ... Answer:".
        items: the items.
        system: a persona prompt, as the system message.
        normalise: "token", "character" or "none".
        batch_size: answers a forward pass.
        on_items: called with the number of items done.

    Raises:
        PersonafastError: another normalisation, or a system prompt for a tokenizer without a chat template.
    """
    if normalise not in NORMALISATIONS:
        raise PersonafastError(f"normalise: {normalise!r} is not one of {', '.join(NORMALISATIONS)}")
    scorer = TextScorer(model)
    scores = torch.zeros(len(items), 2, dtype=torch.float64)
    step = max(1, batch_size // 2)
    for start in range(0, len(items), step):
        part = items[start : start + step]
        texts = [_continuation(tokenizer, item.question, answer, system) for item in part for answer in item.answers]
        values = scorer.score(texts, batch_size=batch_size)
        for index, found in enumerate(values):
            item, side = divmod(index, 2)
            size = {"token": found.numel(), "character": len(part[item].answers[side]), "none": 1}[normalise]
            scores[start + item, side] = float(found.double().sum()) / size
        if on_items is not None:
            on_items(start + len(part))
    return Choices(scores, tuple(item.labels for item in items))


def _continuation(tokenizer: Any, question: str, answer: str, system: str | None) -> Continuation:
    if tokenizer.chat_template is not None:
        opening = [] if system is None else [{"role": "system", "content": system}]
        prompt = chat_ids(tokenizer, [*opening, {"role": "user", "content": question}])
        reply = tokenizer(answer, add_special_tokens=False)["input_ids"]
    else:
        if system is not None:
            raise PersonafastError("system: this tokenizer has no chat template; put the text into the questions")
        prompt = tokenizer(f"Question: {question}\nAnswer:")["input_ids"]
        reply = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]
    if not reply:
        raise PersonafastError(f"items: the answer {answer!r} has no tokens; drop that item")
    return Continuation([*prompt, *reply], len(reply))
