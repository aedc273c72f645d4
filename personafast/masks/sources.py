"""Calibration texts of a persona, from the files that hold them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personafast.errors import FormatError, PersonafastError
from personafast.models.reading import TokenizedText

POSITIVE, NEGATIVE = "positive", "negative"
_ANSWERS = {POSITIVE: ("matching", "chosen", "response", "text"), NEGATIVE: ("not_matching", "rejected")}


@dataclass(frozen=True)
class CalibrationText:
    """What the persona says, and what it was asked."""

    response: str
    prompt: str = ""


def read_texts(path: str | Path, *, side: str = POSITIVE, containing: str = "") -> list[CalibrationText]:
    """Read the texts of one side of a persona.

    - ``.csv`` with the columns question, matching, not_matching: the question and one of its answers;
    - ``.json``, a list of objects, and ``.jsonl``, an object a line: prompt, chosen and rejected (texts, or chats whose
      last message is the answer); question, matching and not_matching; prompt and response; or text alone;
    - any other file: plain text, one text a line, or a paragraph each where blank lines part them.

    Args:
        path: the file, UTF-8.
        side: ``positive`` takes what the persona says, ``negative`` what its opposite says.
        containing: keep the texts whose prompt (or text, without a prompt) holds this.

    Raises:
        FormatError: the file is missing, not UTF-8, of another layout, or holds no such text.
        PersonafastError: another side.
    """
    path = Path(path)
    if side not in _ANSWERS:
        raise PersonafastError(f"side: {side!r} is unknown; choose positive or negative")
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not UTF-8 text; convert it") from None
    if path.suffix == ".csv":
        texts = _from_csv(path, content, side)
    elif path.suffix in (".json", ".jsonl"):
        texts = [_from_record(path, number, record, side) for number, record in _records(path, content)]
    elif side == NEGATIVE:
        raise FormatError(f"{path}: plain text has no other side; give a file of its own for the opposite")
    else:
        texts = [CalibrationText(text) for text in _paragraphs(content)]
    texts = [text for text in texts if containing in (text.prompt or text.response)]
    if not texts:
        what = f"no text whose prompt holds {containing!r}" if containing else "no calibration text"
        raise FormatError(f"{path}: holds {what}; give at least one")
    return texts


def tokenize(tokenizer: Any, text: TokenizedText | CalibrationText | str, max_length: int | None) -> TokenizedText:
    """Token ids of a text, at most `max_length` from its start.

    With a chat template, a prompt and its response are a chat; else the response follows the prompt on a new line.

    Raises:
        PersonafastError: a text without tokens, a response that is cut off whole, or no tokenizer for plain texts.
    """
    if not isinstance(text, TokenizedText):
        if tokenizer is None:
            raise PersonafastError("tokenizer: missing; give one, or tokenised texts")
        text = _tokenize(tokenizer, CalibrationText(text) if isinstance(text, str) else text)
    if not text.ids or text.response < 1:
        raise PersonafastError("texts: a text has no response tokens; drop it")
    if max_length is None or len(text.ids) <= max_length:
        return text
    response = text.response - (len(text.ids) - max_length)
    if response < 1:
        raise PersonafastError(
            f"max_length: {max_length} cuts off the response of a text of {len(text.ids)} tokens; give more"
        )
    return TokenizedText(text.ids[:max_length], response)


def _tokenize(tokenizer: Any, text: CalibrationText) -> TokenizedText:
    if not text.response.strip():
        raise PersonafastError("texts: a text is empty; drop it")
    if not text.prompt:
        return TokenizedText.from_text(tokenizer, text.response)
    if getattr(tokenizer, "chat_template", None):
        chat = [{"role": "user", "content": text.prompt}, {"role": "assistant", "content": text.response}]
        return TokenizedText.from_chat(tokenizer, chat)
    prompt = list(tokenizer(f"{text.prompt}\n")["input_ids"])
    response = list(tokenizer(text.response, add_special_tokens=False)["input_ids"])
    return TokenizedText(prompt + response, len(response))


def _paragraphs(content: str) -> list[str]:
    # Only a line feed ends a line: U+2028 and its like may stand inside a text.
    lines = [line.strip() for line in content.split("\n")]
    body = "\n".join(lines).strip()
    if "\n\n" not in body:
        return [line for line in body.split("\n") if line]
    return [part.replace("\n", " ").strip() for part in body.split("\n\n") if part.strip()]


def _from_csv(path: Path, content: str, side: str) -> list[CalibrationText]:
    rows = csv.DictReader(io.StringIO(content, newline=""))
    answer = _ANSWERS[side][0]
    missing = [name for name in ("question", answer) if name not in (rows.fieldnames or ())]
    if missing:
        raise FormatError(f"{path}: no column {missing[0]!r}; expected question, matching, not_matching")
    texts = []
    for number, row in enumerate(rows, 2):
        # Real tables have rows without a question; an answer that stands alone is a text too.
        if not (row[answer] or "").strip():
            raise FormatError(f"{path}: row {number} has no {answer}; fill it in or drop it")
        texts.append(CalibrationText(row[answer].strip(), (row["question"] or "").strip()))
    return texts


def _records(path: Path, content: str) -> list[tuple[int, Any]]:
    try:
        if path.suffix == ".jsonl":
            lines = [(number, line) for number, line in enumerate(content.split("\n"), 1) if line.strip()]
            return [(number, json.loads(line)) for number, line in lines]
        found = json.loads(content)
    except json.JSONDecodeError as error:
        raise FormatError(f"{path}: not valid JSON ({error}); save it again from its source") from None
    if not isinstance(found, list):
        raise FormatError(
            f"{path}: expected a list of objects, as in [{{'prompt': ..., 'chosen': ..., 'rejected': ...}}]"
        )
    return list(enumerate(found, 1))


def _from_record(path: Path, number: int, record: Any, side: str) -> CalibrationText:
    if isinstance(record, Mapping):
        answer = next((_last(record[key]) for key in _ANSWERS[side] if key in record), "")
        prompt = record.get("prompt", record.get("question", ""))
        prompt = prompt if isinstance(prompt, str) else _last(prompt)
        if answer.strip():
            return CalibrationText(answer.strip(), prompt.strip())
    raise FormatError(
        f"{path}: entry {number} has no text under {' or '.join(_ANSWERS[side])}; add it or drop the entry"
    )


def _last(value: Any) -> str:
    """A text, or what the last message of a chat says."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    return value if isinstance(value, str) else ""
