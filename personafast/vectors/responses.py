"""Let a model answer prompts: each response with a seed of its own, so that batches do not matter."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from personafast.errors import PersonafastError, UnsupportedModelError
from personafast.models.reading import evaluating, input_device, longest_first, padded
from personafast.ops import philox


@dataclass(frozen=True)
class Sampling:
    """How responses to a trait's questions are drawn.

    Attributes:
        per_question: responses to every question under every pair of system prompts.
        max_new_tokens: longest response.
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: keep the likeliest tokens up to this probability.
        seed: a response follows from seed, trait, side and its place, whatever the batch size.
    """

    per_question: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("per_question", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise PersonafastError(f"{name}: {getattr(self, name)} is not at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise PersonafastError(f"temperature: {self.temperature} is not 0 or more")
        if not 0 < self.top_p <= 1:
            raise PersonafastError(f"top_p: {self.top_p} is not in (0, 1]")


def response_seed(seed: int, trait: str, side: str, place: int) -> int:
    """A 63-bit seed for one response, by a hash of what it answers."""
    found = hashlib.sha256(f"{seed}\0{trait}\0{side}\0{place}".encode()).digest()
    return int.from_bytes(found[:8], "big") >> 1


class RowSampler:
    """A logits processor that leaves one token a row: drawn with the row's own seed, so batches do not matter.

    u of Philox, keyed by the row's seed and the token's position, picks the first token whose cumulative probability
    exceeds it, in float64.
    """

    def __init__(self, seeds: Sequence[int], prompt: int, sampling: Sampling) -> None:
        self._seeds = torch.tensor(seeds)
        self._prompt = prompt
        self._sampling = sampling

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, V] with -inf everywhere but at the token drawn."""
        probabilities = (scores.double() / self._sampling.temperature).softmax(dim=-1)
        if not bool(torch.isfinite(probabilities).all()):
            raise PersonafastError("model: its logits are not numbers; load it in a wider dtype")
        if self._sampling.top_p < 1:
            ordered, order = probabilities.sort(dim=-1, descending=True)
            outside = ordered.cumsum(dim=-1) - ordered >= self._sampling.top_p
            probabilities = probabilities.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0)
        steps = torch.full_like(self._seeds, ids.shape[1] - self._prompt)
        u = philox.uniform(self._seeds, steps, 0).to(scores.device)
        total = probabilities.cumsum(dim=-1)
        token = torch.searchsorted(total, u * total[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


@torch.no_grad()
def respond(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    sampling: Sampling,
    batch_size: int,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Yield (places, responses) batch by batch, longest prompts first; a response ends before its end token.

    The model's own generation settings do not count, but for its special tokens.

    Raises:
        UnsupportedModelError: the model cannot generate.
    """
    from transformers import GenerationConfig, LogitsProcessorList

    if not prompts:
        return
    if not hasattr(model, "generate"):
        raise UnsupportedModelError(f"model: {type(model).__name__} cannot generate; give collected responses instead")
    net = cast(Any, model)
    own = net.generation_config
    ends = _end_tokens(own, tokenizer)
    device = input_device(model)
    config = GenerationConfig(
        bos_token_id=getattr(own, "bos_token_id", None),
        eos_token_id=ends or None,
        pad_token_id=next((i for i in (own.pad_token_id, tokenizer.pad_token_id, *ends) if i is not None), 0),
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
    )
    # transformers lays a checkpoint's penalties and cut-offs over the options of a call.
    net.generation_config = config
    try:
        with evaluating(model):
            for places in longest_first([len(prompt) for prompt in prompts], batch_size):
                ids, live = padded([prompts[place] for place in places], device, side="left")
                processors = LogitsProcessorList()
                if sampling.temperature > 0:
                    processors.append(cast(Any, RowSampler([seeds[place] for place in places], ids.shape[1], sampling)))
                whole = net.generate(
                    input_ids=ids, attention_mask=live, generation_config=config, logits_processor=processors
                )
                yield places, [_until(row, ends) for row in whole[:, ids.shape[1] :].tolist()]
    finally:
        net.generation_config = own


def _end_tokens(own: Any, tokenizer: Any) -> list[int]:
    ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    return list(ends) if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]


def _until(row: list[int], ends: list[int]) -> list[int]:
    return row[: next((place for place, token in enumerate(row) if token in ends), len(row))]
