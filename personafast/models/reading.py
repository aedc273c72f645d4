"""Run a model over texts and read what passes through it, without keeping the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from personafast.errors import PersonafastError


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of a text, and how many of them at its end are the response (all of them by default)."""

    ids: Sequence[int]
    response: int

    @classmethod
    def from_chat(cls, tokenizer: Any, messages: Sequence[dict[str, str]]) -> TokenizedText:
        """Tokenise a chat whose last message is the assistant's; that message is the response."""
        if not messages or messages[-1].get("role") != "assistant":
            raise PersonafastError("messages: the last message must be the assistant's, it is the response")
        prompt = chat_ids(tokenizer, messages[:-1])
        whole = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=False)
        if list(whole[: len(prompt)]) != prompt:
            # A template that rewrites the history: fall back to writing the response after the prompt.
            whole = prompt + tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
        return cls(list(whole), len(whole) - len(prompt))

    @classmethod
    def from_text(cls, tokenizer: Any, text: str) -> TokenizedText:
        """Tokenise a plain text; every token counts."""
        ids = tokenizer(text)["input_ids"]
        if not ids:
            raise PersonafastError(f"texts: {text!r} has no tokens; give a non-empty text")
        return cls(ids, len(ids))


def chat_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a chat, ready for the assistant's reply."""
    ids = tokenizer.apply_chat_template(list(messages), tokenize=True, add_generation_prompt=True, return_dict=False)
    return list(ids)


def batches(
    texts: Sequence[TokenizedText], size: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (input_ids, attention_mask, response_mask), each [B, L], right-padded, longest texts first."""
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i].ids))
    for start in range(0, len(order), size):
        chosen = [texts[i] for i in order[start : start + size]]
        length = len(chosen[0].ids)
        ids = torch.zeros(len(chosen), length, dtype=torch.long)
        live = torch.zeros(len(chosen), length, dtype=torch.long)
        response = torch.zeros(len(chosen), length, dtype=torch.bool)
        for row, text in enumerate(chosen):
            count = len(text.ids)
            ids[row, :count] = torch.as_tensor(text.ids)
            live[row, :count] = 1
            response[row, count - text.response : count] = True
        yield ids.to(device), live.to(device), response.to(device)


class Reader:
    """Forward hooks for the time of a `with` block; they see activations and never change them."""

    def __init__(self) -> None:
        self._hooks: list[Any] = []

    def on_output(self, module: nn.Module, see: Callable[[torch.Tensor], None]) -> None:
        """Call `see` with the (first) output of the module at every forward."""

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            see(output[0] if isinstance(output, tuple) else output)

        self._hooks.append(module.register_forward_hook(hook))

    def on_input(self, module: nn.Module, see: Callable[[torch.Tensor], None]) -> None:
        """Call `see` with the first positional input of the module at every forward."""

        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            see(args[0])

        self._hooks.append(module.register_forward_pre_hook(hook))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
