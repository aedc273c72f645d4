"""Two-way choice items: a question, two answers, and what each answer stands for."""

from __future__ import annotations

import csv
import io
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personafast._io import read_json
from personafast.errors import FormatError

MATCHING, OTHER = "matching", "not_matching"
# The lettered answers at the end of a question. Published files hold a backslash and an n where a line ends.
_LETTERED = re.compile(r"(?:\\n|\n)\s*A[.)]\s*(?P<a>.*?)(?:\\n|\n)\s*B[.)]\s*(?P<b>.*)", re.DOTALL)


@dataclass(frozen=True)
class ChoiceItem:
    """A question with two answers.

    Attributes:
        question: what is asked, without the answers.
        answers: the two texts.
        labels: what each stands for: `matching` and `not_matching` a trait, or the poles of a scale such as E and I.
    """

    question: str
    answers: tuple[str, str]
    labels: tuple[str, str]


def read_items(path: Path) -> list[ChoiceItem]:
    """Read items of a CSV or JSON file, in one of three layouts.

    - CSV `question, A, B, matching`: the last holds the letter of the answer that shows the trait (arXiv 2602.07164).
    - CSV `question, matching, not_matching`.
    - JSON, an object or a list of `{"question": ..., "A": label, "B": label}`, where the question ends with its two
      answers, "A. ..." and "B. ...", on lines of their own (arXiv 2511.01891).

    An item whose question is empty, as one of the published ones is, is left out with a warning.

    Raises:
        FormatError: another layout, an item with fewer than two different answers, no items.
    """
    if path.suffix.lower() == ".json":
        items = list(_from_json(path))
    else:
        items = list(_from_csv(path))
    if not items:
        raise FormatError(f"{path}: holds no items; give a question with two answers a row")
    return items


def _from_csv(path: Path) -> Iterator[ChoiceItem]:
    try:
        # Fields may hold line breaks, so the text goes to the parser whole.
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not UTF-8 text; save it as UTF-8") from None
    rows = csv.DictReader(io.StringIO(text, newline=""))
    columns = set(rows.fieldnames or ())
    lettered = {"question", "A", "B", MATCHING} <= columns
    if not lettered and not {"question", MATCHING, OTHER} <= columns:
        raise FormatError(
            f"{path}: has the columns {', '.join(sorted(columns)) or 'none'}; expected question, A, B, matching, or "
            "question, matching, not_matching"
        )
    for row in rows:
        where = f"{path}: line {rows.line_num}"
        if not lettered:
            yield from _item(where, row["question"], (row[MATCHING], row[OTHER]), (MATCHING, OTHER))
            continue
        letter = (row[MATCHING] or "").strip().upper()
        if letter not in ("A", "B"):
            raise FormatError(f"{where}: matching is {row[MATCHING]!r}; give the letter A or B")
        labels = (MATCHING, OTHER) if letter == "A" else (OTHER, MATCHING)
        yield from _item(where, row["question"], (row["A"], row["B"]), labels)


def _from_json(path: Path) -> Iterator[ChoiceItem]:
    found = read_json(path)
    entries = found.items() if isinstance(found, dict) else enumerate(found or [])
    for name, entry in entries:
        where = f"{path}: item {name}"
        try:
            question, labels = entry["question"], (str(entry["A"]), str(entry["B"]))
        except (KeyError, TypeError):
            raise FormatError(f'{where}: expected {{"question": ..., "A": label, "B": label}}') from None
        parts = _LETTERED.search(question)
        if parts is None:
            raise FormatError(f'{where}: its question does not end with "A. ..." and "B. ..." on lines of their own')
        yield from _item(where, question[: parts.start()], (parts["a"], parts["b"]), labels)


def _item(where: str, question: str | None, answers: tuple[Any, Any], labels: tuple[str, str]) -> Iterator[ChoiceItem]:
    texts = tuple((answer or "").strip() for answer in answers)
    asked = (question or "").strip()
    if not asked:
        warnings.warn(f"{where}: the question is empty; left out", stacklevel=2)
        return
    if not all(texts) or texts[0] == texts[1]:
        raise FormatError(f"{where}: needs two different answers, got {texts[0]!r} and {texts[1]!r}")
    yield ChoiceItem(asked, (texts[0], texts[1]), labels)
