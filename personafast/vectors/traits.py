"""Trait files of the persona_vectors project: contrasting system prompts and questions to ask under them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personafast._io import read_json
from personafast.errors import FormatError


@dataclass(frozen=True)
class TraitPrompts:
    """Pairs of system prompts that ask for a trait and for its absence, and questions to ask under each.

    Attributes:
        instructions: (positive, negative) system prompts.
        questions: what the user asks.
        eval_prompt: what a judge is told, if the file says.
        source: the file's name, for messages and metadata.
    """

    instructions: Sequence[tuple[str, str]]
    questions: Sequence[str]
    eval_prompt: str = ""
    source: str = "trait"

    @classmethod
    def from_file(cls, path: str | Path) -> TraitPrompts:
        """Read `{"instruction": [{"pos": ..., "neg": ...}, ...], "questions": [...], "eval_prompt": ...}`.

        Raises:
            FormatError: naming the file and what it lacks.
        """
        return cls.from_dict(read_json(Path(path)), source=str(path))

    @classmethod
    def from_dict(cls, value: Any, *, source: str = "trait") -> TraitPrompts:
        """The same from a parsed file."""
        if not isinstance(value, Mapping):
            raise FormatError(f"{source}: not a trait file; expected an object with instruction and questions")
        for key in ("instruction", "questions"):
            if not isinstance(value.get(key), list) or not value[key]:
                raise FormatError(f"{source}: no list {key!r}, or an empty one; a trait file needs it")
        pairs = []
        for index, pair in enumerate(value["instruction"]):
            for side in ("pos", "neg"):
                if not isinstance(pair, Mapping) or not isinstance(pair.get(side), str) or not pair[side].strip():
                    raise FormatError(f"{source}: instruction {index} has no text {side!r}; write one")
            pairs.append((pair["pos"], pair["neg"]))
        for index, question in enumerate(value["questions"]):
            if not isinstance(question, str) or not question.strip():
                raise FormatError(f"{source}: question {index} is no text; write one")
        return cls(tuple(pairs), tuple(value["questions"]), str(value.get("eval_prompt") or ""), source)

    def chats(self, per_question: int) -> list[tuple[list[dict[str, str]], list[dict[str, str]]]]:
        """(positive, negative) openings: every question under every pair of prompts, `per_question` times over.

        More responses a question append to the list, so what was generated before keeps its place.
        """
        return [
            (_opening(positive, question), _opening(negative, question))
            for _ in range(per_question)
            for positive, negative in self.instructions
            for question in self.questions
        ]


def _opening(system: str, question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": question}]
