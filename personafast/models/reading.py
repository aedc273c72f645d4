"""Run a model over texts and read what passes through it, without keeping the activations."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from personafast.errors import PersonafastError
from personafast.models.compressed import home
from personafast.models.wrappers import unwrapped

POSITIONS = ("response_avg", "prompt_avg", "prompt_last", "response_last")
"""Which tokens of a text stand for it: the mean over its response or its prompt, or the last token of either."""


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

    def span(self, positions: str) -> tuple[int, int]:
        """First token and one past the last token of `positions`, counted from the text's own start.

        Raises:
            PersonafastError: an unknown name, or a text without a prompt or a response where one is asked for.
        """
        if positions not in POSITIONS:
            raise PersonafastError(f"positions: {positions!r} is not one of {', '.join(POSITIONS)}")
        whose, what = positions.split("_")
        prompt = len(self.ids) - self.response
        start, stop = (0, prompt) if whose == "prompt" else (prompt, len(self.ids))
        if stop <= start:
            raise PersonafastError(f"texts: a {whose} has no tokens; drop that text or take other positions")
        return (start, stop) if what == "avg" else (stop - 1, stop)


def chat_ids(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a chat, ready for the assistant's reply."""
    ids = tokenizer.apply_chat_template(list(messages), tokenize=True, add_generation_prompt=True, return_dict=False)
    return list(ids)


def batches(
    texts: Sequence[TokenizedText], size: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (input_ids, attention_mask, response_mask), each [B, L], right-padded, longest texts first."""
    for rows in longest_first([len(text.ids) for text in texts], size):
        chosen = [texts[i] for i in rows]
        ids, live = padded([text.ids for text in chosen], device)
        response = torch.zeros(ids.shape, dtype=torch.bool)
        for row, text in enumerate(chosen):
            response[row, len(text.ids) - text.response : len(text.ids)] = True
        yield ids, live, response.to(device)


def longest_first(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Indices in batches of `size`, longest first, so that a batch is little padding and the first is the largest."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    for start in range(0, len(order), size):
        yield order[start : start + size]


def padded(
    rows: Sequence[Sequence[int]], device: torch.device, *, side: str = "right"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), int64 [B, L], padded with id 0.

    Right padding is what to read activations with: under a causal mask nothing real sees the padding, and the positions
    0, 1, 2 ... that every model counts by itself are right. To generate, rows are padded on the left.
    """
    length = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    live = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[index, place] = torch.as_tensor(row)
        live[index, place] = 1
    return ids.to(device), live.to(device)


def forward(model: nn.Module, ids: torch.Tensor, live: torch.Tensor) -> None:
    """One forward for what the hooks see; of the logits only one position is asked for, where the model can do that."""
    model(input_ids=ids, attention_mask=live, use_cache=False, **few_logits(model))


def few_logits(model: nn.Module) -> dict[str, int]:
    """What a forward is called with when nobody reads its logits: all of them take more memory than the rest."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(unwrapped(model).forward).parameters else {}


def input_device(model: nn.Module) -> torch.device:
    """Where to put the ids that a model is given: where its weights are, if any is in memory.

    Offloaded weights do not tell; whatever brings them for a pass moves the ids too.
    """
    return home(model)[1]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Let the model run without dropout, then put every module back as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
