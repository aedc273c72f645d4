"""Prompts as a batch for a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from personafast.errors import PersonafastError


def encode(
    tokenizer: Any, prompts: Sequence[str], device: torch.device | str = "cpu", system: str | None = None
) -> dict[str, torch.Tensor]:
    """One row a prompt, left-padded: int64 input_ids and attention_mask, both [B, S].

    Prompts go through the chat template, ready for the assistant's reply, or stay plain text where there is none.

    Raises:
        PersonafastError: a system prompt for a tokenizer without a chat template.
    """
    if tokenizer.chat_template is None:
        if system is not None:
            raise PersonafastError("system: this tokenizer has no chat template; put the text into the prompt")
        batch = tokenizer(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    else:
        opening = [] if system is None else [{"role": "system", "content": system}]
        batch = tokenizer.apply_chat_template(
            [[*opening, {"role": "user", "content": prompt}] for prompt in prompts],
            add_generation_prompt=True,
            padding=True,
            tokenizer_kwargs={"padding_side": "left"},
            return_tensors="pt",
            return_dict=True,
        )
    return {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
