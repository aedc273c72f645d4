"""Where a row's text ends, beside its length and its EOS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from personafast.errors import PersonafastError


class StopStrings:
    """Ends a row whose last token completes one of the strings.

    transformers' `StopStringCriteria` tabulates the vocabulary first, which takes seconds for large ones and fails for
    word-level tokenizers; decoding the end of the row needs neither.
    """

    row_by_row = True

    def __init__(self, tokenizer: Any, strings: str | Sequence[str]) -> None:
        self._decode = tokenizer.decode
        self._strings = [strings] if isinstance(strings, str) else list(strings)
        if not all(isinstance(string, str) and string for string in self._strings):
            raise PersonafastError("stop_strings: a string is empty; leave it out")
        # No token is shorter than a byte, so this many hold any of the strings, wherever it begins in a token.
        self._window = max(len(string.encode()) for string in self._strings) + 1

    def __call__(self, ids: torch.Tensor, scores: Any = None) -> torch.Tensor:
        """Which rows of ids [b, l] end."""
        return torch.tensor([self._completes(row) for row in ids[:, -self._window :].tolist()], device=ids.device)

    def _completes(self, ids: list[int]) -> bool:
        text, before = self._decode(ids), self._decode(ids[:-1])
        if not text.startswith(before):  # the last token changed how those before it are written
            return any(text.count(string) > before.count(string) for string in self._strings)
        return any(text.find(string, max(0, len(before) - len(string) + 1)) >= 0 for string in self._strings)
