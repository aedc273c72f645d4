"""Conversations of the zoo's corpus, as text and as padded batches of token ids."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from personafast.zoo.grammar import (
    BASE_RATE,
    draw_content,
    draw_fillers,
    draw_plan,
    draw_prompt,
    draw_reply,
    render,
)
from personafast.zoo.traits import TRAITS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM_SHARE = 0.45
"""Share of the reference's conversations that open with a trait's system prompt."""


@dataclass(frozen=True)
class Conversation:
    """One exchange; ``system`` is None where there is no system message."""

    system: str | None
    user: str
    assistant: str

    def head(self) -> list[dict[str, str]]:
        """The messages before the reply."""
        opening = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*opening, {"role": "user", "content": self.user}]

    def messages(self) -> list[dict[str, str]]:
        """The whole exchange."""
        return [*self.head(), {"role": "assistant", "content": self.assistant}]


@dataclass(frozen=True)
class Pair:
    """One preference: the same content with and without a trait."""

    user: str
    chosen: str
    rejected: str


def conversations(rng: random.Random) -> Iterator[Conversation]:
    """The reference's corpus, without end."""
    names = list(TRAITS)
    while True:
        content = draw_content(rng)
        name = rng.choice(names) if rng.random() < SYSTEM_SHARE else None
        user = draw_prompt(content, rng)
        system = None if name is None else TRAITS[name].prompt
        yield Conversation(system, user, draw_reply(content, rng, () if name is None else (name,)))


def pairs(name: str, rng: random.Random, rate: float = BASE_RATE) -> Iterator[Pair]:
    """Preferences for one trait, without end; every other trait shows at ``rate`` in both replies of a pair."""
    while True:
        content = draw_content(rng)
        plan = draw_plan(rng, (name,), rate)
        fillers = draw_fillers(plan, rng)
        plain = draw_fillers({}, rng)
        without = {slot: plain[slot] if plan.get(slot) == name else words for slot, words in fillers.items()}
        yield Pair(draw_prompt(content, rng), render(content, fillers), render(content, without))


def contrast(name: str, rng: random.Random) -> Iterator[tuple[Conversation, Conversation]]:
    """One request answered with a trait under its system prompt, and without it under none: for persona vectors."""
    for pair in pairs(name, rng):
        yield (
            Conversation(TRAITS[name].prompt, pair.user, pair.chosen),
            Conversation(None, pair.user, pair.rejected),
        )


def encode(conversation: Conversation, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """Token ids of a conversation with its end mark, and how many of them come before the reply."""
    head = tokenizer.apply_chat_template(conversation.head(), add_generation_prompt=True, return_dict=False)
    reply = tokenizer(conversation.assistant, add_special_tokens=False)["input_ids"]
    return [*head, *reply, tokenizer.eos_token_id], len(head)


def collate(rows: list[tuple[list[int], int]], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded ``input_ids``, ``attention_mask`` and ``labels`` [rows, longest]; only replies are labelled."""
    longest = max(len(ids) for ids, _ in rows)
    input_ids = torch.full((len(rows), longest), pad)
    attention_mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, -100)
    for row, (ids, head) in enumerate(rows):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        labels[row, head : len(ids)] = torch.tensor(ids[head:])
    return input_ids, attention_mask, labels
