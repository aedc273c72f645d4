"""Put a system text into a row that is already tokenised."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from personafast.errors import PersonafastError
from personafast.models.reading import chat_ids

# Two first user messages that share no beginning: what their renderings share comes from the template.
_PROBES = ("x", "")


class SystemPrompts:
    """Rewrites the head of a row: what the chat template writes before the first user message.

    The template is rendered with and without the system text around a probe message; their common tail is what follows
    the head. Heads are exchanged as tokens where the user's first token stays what it is, and as text otherwise
    (templates that put the system text and the message into one turn). A tokenizer without a chat template gets the
    text and a line break in front.

    Args:
        tokenizer: the model's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._heads: dict[str, tuple[list[int], list[int]] | None] = {}
        self._start: list[int] | None = None
        self._texts: dict[str, list[int]] = {}

    def insert(self, ids: Sequence[int], text: str) -> list[int]:
        """The row's ids with the system text in place.

        Where the template writes the system text into the user's turn, one that is there already cannot be told from
        the user's words: it is kept, behind the new one.

        Raises:
            PersonafastError: the row does not begin as the chat template does (it may have a system message already),
                or the template takes no system message.
        """
        if not text.strip():
            raise PersonafastError("prompts: a system text is empty; write what the persona is")
        ids = list(ids)
        if not getattr(self._tokenizer, "chat_template", None):
            bos = self._tokenizer.bos_token_id
            first = 1 if ids and bos is not None and ids[0] == bos else 0
            if text not in self._texts:
                self._texts[text] = list(self._tokenizer(text + "\n", add_special_tokens=False)["input_ids"])
            return ids[:first] + self._texts[text] + ids[first:]
        if text not in self._heads:
            self._heads[text] = self._token_heads(text)
        heads = self._heads[text]
        if self._start is None:
            self._start = _shared([chat_ids(self._tokenizer, _user(probe)) for probe in _PROBES])
        start = self._start
        if heads is not None and len(heads[0]) <= len(start) and ids[: len(start)] == start:
            return heads[1] + ids[len(heads[0]) :]
        return self._by_text(ids, text)

    def _token_heads(self, text: str) -> tuple[list[int], list[int]] | None:
        """(head without, head with the system text), or None where it changes the tokens of the user's message."""
        heads = None
        for probe in _PROBES:
            plain = chat_ids(self._tokenizer, _user(probe))
            found = _heads(plain, self._render(text, probe, tokenize=True))
            if heads is not None and found != heads:
                return None
            heads = found
        return heads

    def _by_text(self, ids: list[int], text: str) -> list[int]:
        plain = [self._render(None, probe, tokenize=False) for probe in _PROBES]
        head, with_text = _heads(plain[0], self._render(text, _PROBES[0], tokenize=False))
        row = self._tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        start = _shared(plain)
        if (
            len(head) > len(start)
            or not row.startswith(start)
            or self._tokenizer(row, add_special_tokens=False)["input_ids"] != ids
        ):
            raise PersonafastError(
                "prompts: a row does not begin as the chat template begins; tokenise it with "
                "apply_chat_template(..., add_generation_prompt=True) and without a system message"
            )
        return list(self._tokenizer(with_text + row[len(head) :], add_special_tokens=False)["input_ids"])

    def _render(self, system: str | None, user: str, *, tokenize: bool) -> Any:
        messages = _user(user) if system is None else [{"role": "system", "content": system}, *_user(user)]
        try:
            if tokenize:
                found = chat_ids(self._tokenizer, messages)
            else:
                found = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template refuses by jinja's own exceptions
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PersonafastError(f"prompts: the chat template takes no system message ({reason})") from None
        if system is not None and found == self._render(None, user, tokenize=tokenize):
            raise PersonafastError("prompts: the chat template leaves system messages out; use another template")
        return found


def _user(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def _shared(pair: Sequence[Any]) -> Any:
    """The common beginning of two sequences."""
    return pair[0][: sum(1 for _ in takewhile(lambda ab: ab[0] == ab[1], zip(*pair, strict=False)))]


def _heads(plain: Any, whole: Any) -> tuple[Any, Any]:
    """What stands before the common end of two sequences, in each."""
    common = len(_shared([plain[::-1], whole[::-1]]))
    return plain[: len(plain) - common], whole[: len(whole) - common]
