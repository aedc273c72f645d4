"""Put a system text into a row that is already tokenised."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from personafast.errors import PersonafastError
from personafast.models.reading import chat_ids

_PROBE, _OTHER = ([{"role": "user", "content": text}] for text in ("x", ""))


class SystemPrompts:
    """Rewrites the head of a row: what the chat template writes before the first user message.

    The template is rendered with and without the system text around one probe message; their common tail is what
    follows the head. A tokenizer without a chat template gets the text and a line break in front.

    Args:
        tokenizer: the model's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._heads: dict[str, tuple[list[int], list[int]]] = {}
        self._start: list[int] | None = None

    def insert(self, ids: Sequence[int], text: str) -> list[int]:
        """The row's ids with the system text in place.

        Raises:
            PersonafastError: the row does not begin as the chat template does, or has a system text already.
        """
        if not text.strip():
            raise PersonafastError("prompts: a system text is empty; write what the persona is")
        ids = list(ids)
        if not getattr(self._tokenizer, "chat_template", None):
            bos = self._tokenizer.bos_token_id
            start = 1 if ids and bos is not None and ids[0] == bos else 0
            return ids[:start] + self._tokenizer(text + "\n", add_special_tokens=False)["input_ids"] + ids[start:]
        if self._start is None:
            # What every row without a system message begins with, up to where the user's words differ.
            pair = zip(chat_ids(self._tokenizer, _PROBE), chat_ids(self._tokenizer, _OTHER), strict=False)
            self._start = [a for a, _ in itertools.takewhile(lambda ab: ab[0] == ab[1], pair)]
        if text not in self._heads:
            self._heads[text] = self._head(text)
        plain, with_text = self._heads[text]
        if ids[: len(self._start)] != self._start:
            raise PersonafastError(
                "prompts: a row does not begin as the chat template begins; tokenise it with "
                "apply_chat_template(..., add_generation_prompt=True) and without a system message"
            )
        return with_text + ids[len(plain) :]

    def _head(self, text: str) -> tuple[list[int], list[int]]:
        plain = chat_ids(self._tokenizer, _PROBE)
        try:
            whole = chat_ids(self._tokenizer, [{"role": "system", "content": text}, *_PROBE])
        except Exception as error:  # a template refuses by jinja's own exceptions
            raise PersonafastError(f"prompts: the chat template takes no system message ({error})") from None
        common = 0
        while common < min(len(plain), len(whole)) and plain[-1 - common] == whole[-1 - common]:
            common += 1
        return plain[: len(plain) - common], whole[: len(whole) - common]
