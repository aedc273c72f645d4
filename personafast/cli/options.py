"""Reading what was typed: name=number pairs, steering, prompts files, numbers that must be finite."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from personafast.errors import FormatError, PersonafastError


def assignments(option: str, values: Sequence[str]) -> dict[str, float]:
    """Parse "name=number" pairs, each split at its last "=" so that a system prompt may hold one.

    Raises:
        PersonafastError: no "=", an empty name, no finite number, or a name given twice.
    """
    parsed: dict[str, float] = {}
    for value in values:
        name, separator, number = value.rpartition("=")
        name = name.strip()
        if not separator or not name:
            raise PersonafastError(f"{option} {value!r}: expected name=number, as in 'warm=1.0'")
        try:
            weight = float(number)
        except ValueError:
            raise PersonafastError(f"{option} {value!r}: {number!r} is not a number; write 'name=1.0'") from None
        if not math.isfinite(weight):
            raise PersonafastError(f"{option} {value!r}: the weight is {weight}; give a finite number")
        if name in parsed:
            raise PersonafastError(f"{option} {value!r}: {name!r} is given twice; name it once, with one number")
        parsed[name] = weight
    return parsed


def finite(option: str, value: float, *, low: float, high: float = math.inf) -> float:
    """Return `value` if it is a finite number in [low, high], or raise `PersonafastError` naming the option."""
    if not math.isfinite(value) or not low <= value <= high:
        wanted = f"between {low:g} and {high:g}" if math.isfinite(high) else f"of at least {low:g}"
        raise PersonafastError(f"{option} {value:g}: give a finite number {wanted}")
    return value


def read_prompts(path: Path, option: str = "--prompts-file", key: str = "prompt") -> list[str]:
    """Read prompts: one a line, or from a `.jsonl` file the "prompt" of every object. Blank lines are skipped.

    `option` names the file's option in messages; with another `key`, other texts than prompts are read.

    Raises:
        FormatError: the file is missing, not UTF-8 text, holds a line without a prompt, or no prompt at all.
    """
    if not path.is_file():
        raise FormatError(f"{path}: no such file; {option} takes a text file with one {key} a line, or a .jsonl file")
    try:
        # A byte order mark is no part of the first prompt, and U+2028 and its like inside a prompt end no line.
        lines = path.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise FormatError(f"{path}: not UTF-8 text; {option} takes one {key} a line, or a .jsonl file") from None
    numbered = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_text_of(path, key, number, line) for number, line in numbered]
    else:
        prompts = [line for _, line in numbered]
    if not prompts:
        raise FormatError(f"{path}: holds no {key}; write one a line")
    return prompts


def _text_of(path: Path, key: str, number: int, line: str) -> str:
    try:
        text = json.loads(line)[key]
    except (json.JSONDecodeError, KeyError, TypeError):
        text = None
    if not isinstance(text, str) or not text.strip():
        raise FormatError(f'{path}: line {number} is no object with a "{key}" text; write {{"{key}": "..."}}')
    return text


def steered(vectors: Mapping[str, float], options: Mapping[str, Any]) -> dict[str, Any]:
    """`Persona` arguments for vectors that do what `--operation` and its like say.

    Raises:
        PersonafastError: naming the option.
    """
    from personafast.steering import Steering

    chosen = dict(options)
    ends = chosen.pop("range", None)
    if (ends is not None) != (chosen.get("operation") == "clamp"):
        raise PersonafastError("--range: belongs to --operation clamp, which needs one; give both or neither")
    if ends is not None:
        chosen.update(_range(ends))
    try:
        return {"vectors": {}, "steering": [Steering(vectors, **chosen)]}
    except PersonafastError as error:
        name, _, why = str(error).partition(": ")
        option = "range" if name in ("low", "high", "target") else name.partition("[")[0].removesuffix("s")
        option = {"position": "positions"}.get(option, option)
        raise PersonafastError(f"--{option}: {why}") from None


def _range(text: str) -> dict[str, float]:
    low, colon, high = text.partition(":")
    names = ("low", "high") if colon else ("target",)
    try:
        found = {name: float(end) for name, end in zip(names, (low, high), strict=False) if end.strip()}
    except ValueError:
        found = {}
    if not found:
        raise PersonafastError(f"--range {text!r}: expected LOW:HIGH, LOW:, :HIGH or one number")
    return found
