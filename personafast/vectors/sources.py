"""What a vector can be read from: chats, pairs of plain texts, or responses that were collected elsewhere."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from personafast.errors import FormatError, PersonafastError


@dataclass(frozen=True)
class Contrast:
    """Chats that show a trait and chats that do not; the last message of each is the assistant's response."""

    positive: Sequence[Sequence[dict[str, str]]]
    negative: Sequence[Sequence[dict[str, str]]]


@dataclass(frozen=True)
class TextPairs:
    """Plain texts in pairs: positive[i] shows the trait, negative[i] is its counterpart without it.

    Every token counts as response, so `response_avg` is the mean over the whole text and `response_last` its last
    token. Texts are tokenised as they are, with the tokenizer's own special tokens and without a chat template.

    Raises:
        PersonafastError: unequal counts, no pairs, an empty text.
    """

    positive: Sequence[str]
    negative: Sequence[str]
    source: str = "pairs"

    def __post_init__(self) -> None:
        if len(self.positive) != len(self.negative):
            raise PersonafastError(
                f"{self.source}: {len(self.positive)} positive and {len(self.negative)} negative texts; "
                "pairs need as many on each side"
            )
        if not self.positive:
            raise PersonafastError(f"{self.source}: no pairs; give at least one")
        for side, texts in (("positive", self.positive), ("negative", self.negative)):
            for index, text in enumerate(texts):
                if not isinstance(text, str) or not text.strip():
                    raise PersonafastError(f"{self.source}: {side} text {index} is empty; write it or drop the pair")

    @classmethod
    def from_jsonl(cls, path: str | Path) -> TextPairs:
        """Read a file with one JSON object `{"positive": ..., "negative": ...}` a line.

        Raises:
            FormatError: no such file, or a line without the two texts.
        """
        path = Path(path)
        positive, negative = [], []
        for number, line in enumerate(_lines(path), 1):
            if not line.strip():
                continue
            try:
                pair = json.loads(line)
                positive.append(pair["positive"])
                negative.append(pair["negative"])
            except (ValueError, KeyError, TypeError):
                raise FormatError(
                    f'{path}: line {number} is not {{"positive": ..., "negative": ...}}; write one pair a line'
                ) from None
        try:
            return cls(positive, negative, str(path))
        except PersonafastError as error:
            raise FormatError(str(error)) from None


@dataclass(frozen=True)
class Response:
    """One collected response.

    Attributes:
        prompt: the text in front of it, with the chat template's markup in place.
        answer: the response.
        question: what was asked, for a judge.
        score: how strongly the trait shows, 0 to 100; None if nobody said, NaN if a judge gave no number.
        coherence: how coherent it is, 0 to 100, or None.
    """

    prompt: str
    answer: str
    question: str = ""
    score: float | None = None
    coherence: float | None = None


@dataclass(frozen=True)
class Responses:
    """Responses collected under prompts that ask for a trait and prompts that do not; row i of one side pairs with i.

    The text is prompt + answer, tokenised without further special tokens; as many tokens as the prompt alone has are
    the prompt, the rest is the response (the rule of the persona_vectors project).

    Raises:
        PersonafastError: unequal counts, no rows, an empty answer.
    """

    positive: Sequence[Response]
    negative: Sequence[Response]
    source: str = "responses"

    def __post_init__(self) -> None:
        if len(self.positive) != len(self.negative):
            raise PersonafastError(
                f"{self.source}: {len(self.positive)} positive and {len(self.negative)} negative rows; "
                "row i of one side belongs to row i of the other"
            )
        if not self.positive:
            raise PersonafastError(f"{self.source}: no rows; give at least one pair")
        for side, rows in (("positive", self.positive), ("negative", self.negative)):
            for index, row in enumerate(rows):
                if not row.answer.strip():
                    raise PersonafastError(f"{self.source}: {side} row {index} has an empty answer; drop the pair")

    @classmethod
    def from_csv(cls, positive: str | Path, negative: str | Path, trait: str) -> Responses:
        """Read the two CSV files that the persona_vectors project writes for one trait.

        Columns `prompt` and `answer` are needed; `question`, the trait's own name (its score) and `coherence` are used
        where both files have them.

        Raises:
            FormatError: a file or a column is missing, or a score is no number.
        """
        sides = [_read_csv(Path(path), trait) for path in (positive, negative)]
        scored = [{column for column in (trait, "coherence") if column in columns} for columns, _ in sides]
        if scored[0] != scored[1]:
            odd = sorted(scored[0] ^ scored[1])[0]
            missing = negative if odd in scored[0] else positive
            raise FormatError(f"{missing}: no column {odd!r}, which the other file has; score both or neither")
        try:
            return cls(sides[0][1], sides[1][1], f"{positive}, {negative}")
        except PersonafastError as error:
            raise FormatError(str(error)) from None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (FileNotFoundError, IsADirectoryError):
        raise FormatError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not UTF-8 text; save it as UTF-8") from None


def _read_csv(path: Path, trait: str) -> tuple[list[str], list[Response]]:
    try:
        # newline="" leaves line breaks inside quoted answers as they are.
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or [])
            for needed in ("prompt", "answer"):
                if needed not in columns:
                    raise FormatError(
                        f"{path}: no column {needed!r}; it has {', '.join(columns) or 'none'}, and prompt and answer "
                        "are needed"
                    )
            rows = [_row(path, number, row, trait) for number, row in enumerate(reader)]
    except (FileNotFoundError, IsADirectoryError):
        raise FormatError(f"{path}: no such file; check the path") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise FormatError(f"{path}: not a CSV file in UTF-8 ({error}); save it again") from None
    return columns, rows


def _row(path: Path, number: int, row: dict[str, str | None], trait: str) -> Response:
    def score(column: str) -> float | None:
        if column not in row:
            return None
        text = (row[column] or "").strip()
        try:
            return float(text) if text else math.nan
        except ValueError:
            raise FormatError(f"{path}: row {number}, column {column!r}: {text!r} is no number") from None

    prompt, answer = row["prompt"], row["answer"]
    if prompt is None or answer is None:
        raise FormatError(f"{path}: row {number} has fewer cells than the header; save it again")
    return Response(prompt, answer, row.get("question") or "", score(trait), score("coherence"))
