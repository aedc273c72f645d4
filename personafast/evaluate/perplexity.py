"""Perplexity on a held-out text: what a persona costs in general ability."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from personafast.errors import PersonafastError
from personafast.evaluate.logprobs import Continuation, TextScorer


class Perplexity(NamedTuple):
    """exp of the mean negative log-probability a token, with 95 % limits over windows; `tokens` were scored."""

    value: float
    low: float
    high: float
    tokens: int


def perplexity(
    model: Any, tokenizer: Any, text: str | Sequence[str], *, window: int = 256, batch_size: int = 8
) -> Perplexity:
    """exp(-(1 / n) sum_t log p(x_t | x_<t within the window)), windows that do not overlap.

    The first token of a window has nothing before it and is not scored. The limits are those of the mean over windows
    of their mean log-probability (normal approximation); with one window they are the value itself.

    Args:
        model: a transformers causal LM; who speaks is what is in force.
        tokenizer: its tokenizer.
        text: a text, or several, each beginning a window of its own.
        window: tokens of a window, at least 2.
        batch_size: windows a forward pass.

    Raises:
        PersonafastError: a window of fewer than 2 tokens, or no text of that many.
    """
    if window < 2:
        raise PersonafastError(f"window: {window} tokens leave nothing to score; give at least 2")
    windows = []
    for part in [text] if isinstance(text, str) else text:
        ids = tokenizer(part)["input_ids"]
        windows += [ids[start : start + window] for start in range(0, len(ids), window)]
    texts = [Continuation(ids, len(ids) - 1) for ids in windows if len(ids) > 1]
    if not texts:
        raise PersonafastError("text: has fewer than two tokens; give more held-out text")
    found = TextScorer(model).score(texts, batch_size=batch_size)
    tokens = sum(values.numel() for values in found)
    mean = sum(float(values.double().sum()) for values in found) / tokens
    # Windows weigh by their tokens; nearly all have the same number.
    means = [float(values.double().mean()) for values in found]
    half = 1.96 * statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return Perplexity(math.exp(-mean), math.exp(-mean - half), math.exp(-mean + half), tokens)
