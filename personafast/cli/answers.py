"""A JSON-lines file of answers that an interrupted run can be resumed into."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from personafast._io import write_text
from personafast.errors import FormatError


class AnswerFile:
    """Answers by prompt, appended as they are made.

    Every line carries the settings it was made with, so that a resumed run cannot mix two of them. A line that a crash
    cut short is dropped at opening, by rewriting the file beside itself and renaming; nothing else is ever rewritten.

    Raises:
        FormatError: the file exists and is not such a file, or was made with other settings.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = dict(settings)
        self.answered: Counter[str] = Counter()
        if not path.parent.is_dir():
            raise FormatError(f"{path}: the folder {path.parent} does not exist; make it first")
        if path.exists():
            self._read()

    def _read(self) -> None:
        # Only "\n" ends a line: JSON leaves U+2028 and its like inside texts. A crash may cut a character, hence bytes.
        *parts, torn = self.path.read_bytes().split(b"\n")
        lines = []
        for number, part in enumerate(parts, 1):
            try:
                lines.append(part.decode("utf-8"))
                record = json.loads(lines[-1])
                prompt, settings = record["prompt"], dict(record["settings"])
            except (KeyError, TypeError, ValueError):
                raise FormatError(
                    f"{self.path}: line {number} is no answer of this command; give --output another name"
                ) from None
            if settings != self.settings:
                changed = sorted(
                    key for key in {*settings, *self.settings} if settings.get(key) != self.settings.get(key)
                )
                raise FormatError(
                    f"{self.path}: made with another {', '.join(changed)}; repeat those settings to resume, "
                    "or give --output another name"
                )
            self.answered[prompt] += 1
        if torn:
            if not lines and not torn.startswith(b'{"prompt": '):
                raise FormatError(f"{self.path}: not a file of answers; give --output another name")
            write_text(self.path, "".join(f"{line}\n" for line in lines))

    def missing(self, prompts: Iterable[str]) -> list[int]:
        """The places of the prompts without an answer, in order; a prompt given twice needs two."""
        left = Counter(self.answered)
        todo = []
        for place, prompt in enumerate(prompts):
            if left[prompt]:
                left[prompt] -= 1
            else:
                todo.append(place)
        return todo

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records as whole lines and wait until they are on disk."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
