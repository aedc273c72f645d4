"""Every kind of source as two lists of tokenised texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from personafast.errors import PersonafastError
from personafast.models.reading import TokenizedText, chat_ids
from personafast.vectors.judging import PairFilter, Scores
from personafast.vectors.responses import Sampling, respond, response_seed
from personafast.vectors.sources import Contrast, Responses, TextPairs
from personafast.vectors.state import Lines
from personafast.vectors.traits import TraitPrompts

SIDES = ("positive", "negative")


@dataclass(frozen=True)
class Sides:
    """The tokenised texts of a contrast, and what to tell of them in a vector's metadata."""

    positive: Sequence[TokenizedText]
    negative: Sequence[TokenizedText]
    metadata: dict[str, Any] = field(default_factory=dict)


def contrast_sides(tokenizer: Any, source: Contrast) -> Sides:
    """Chats, through the chat template."""
    return Sides(
        *([TokenizedText.from_chat(tokenizer, chat) for chat in chats] for chats in (source.positive, source.negative)),
        {"source": "chats"},
    )


def pair_sides(tokenizer: Any, source: TextPairs) -> Sides:
    """Plain texts, as they are."""
    return Sides(
        *([TokenizedText.from_text(tokenizer, text) for text in texts] for texts in (source.positive, source.negative)),
        {"source": _name(source.source)},
    )


def response_sides(
    tokenizer: Any,
    name: str,
    source: Responses,
    pairs: PairFilter,
    folder: Path | None,
    on_batch: Callable[[int], None],
) -> Sides:
    """Collected responses that pass the filter."""
    rows = list(zip(source.positive, source.negative, strict=True))
    lines = Lines(None if folder is None else folder / "scores.jsonl")
    for place in range(len(lines.records), len(rows)):
        scores = [pairs.scores(row.question, row.answer, name, (row.score, row.coherence)) for row in rows[place]]
        if pairs.judge is not None or pairs.coherence is not None:
            lines.append([{"scores": scores}])
        else:
            lines.records.append({"scores": scores})
        on_batch(1)
    kept = [place for place, record in enumerate(lines.records) if pairs.keeps(*map(tuple, record["scores"]))]
    if not kept:
        raise PersonafastError(
            f"{source.source}: none of {len(rows)} pairs passes the filter; lower the threshold or collect others"
        )
    texts = [
        [_text(tokenizer, rows[place][side].prompt, rows[place][side].answer) for place in kept] for side in (0, 1)
    ]
    counts = {"pairs": len(rows), "kept": len(kept), "filtered": len(rows) - len(kept)}
    return Sides(*texts, {"source": _name(source.source), "filter": {**pairs.settings(), **counts}})


def _text(tokenizer: Any, prompt: str, answer: str) -> TokenizedText:
    ids = tokenizer(prompt + answer, add_special_tokens=False)["input_ids"]
    return TokenizedText(ids, len(ids) - len(tokenizer(prompt, add_special_tokens=False)["input_ids"]))


def trait_sides(
    model: nn.Module,
    tokenizer: Any,
    name: str,
    source: TraitPrompts,
    sampling: Sampling,
    pairs: PairFilter,
    batch_size: int,
    folder: Path | None,
    on_batch: Callable[[int], None],
) -> Sides:
    """Responses that the model gives itself under the trait's prompts, and of them those that pass the filter.

    The activations are read over the very tokens that were generated, without the end token. Responses of no tokens are
    dropped with their counterpart, and counted.
    """
    chats = source.chats(sampling.per_question)
    prompts = [[_opening_ids(tokenizer, source, chat) for chat in (pair[side] for pair in chats)] for side in (0, 1)]
    if prompts[0] == prompts[1]:
        raise PersonafastError(
            f"{source.source}: both sides give the same prompts; the chat template leaves system messages out, or pos "
            "and neg are equal"
        )
    lines = Lines(None if folder is None else folder / "responses.jsonl")
    for index, side in enumerate(SIDES):
        done = {record["place"] for record in lines.records if record["side"] == side}
        on_batch(len(done))
        todo = [place for place in range(len(chats)) if place not in done]
        seeds = [response_seed(sampling.seed, name, side, place) for place in todo]
        if not todo:
            continue
        drawn = respond(model, tokenizer, [prompts[index][place] for place in todo], seeds, sampling, batch_size)
        for places, answers in drawn:
            records = []
            for place, ids in zip((todo[i] for i in places), answers, strict=True):
                question = chats[place][index][-1]["content"]
                scores: Scores = (None, None)
                if ids:
                    scores = pairs.scores(question, tokenizer.decode(ids, skip_special_tokens=True), name)
                records.append({"side": side, "place": place, "ids": ids, "scores": scores})
            lines.append(records)
            on_batch(len(records))
    found = {(record["side"], record["place"]): record for record in lines.records}
    both = [[found[side, place] for side in SIDES] for place in range(len(chats))]
    spoken = [place for place, pair in enumerate(both) if all(record["ids"] for record in pair)]
    kept = [place for place in spoken if pairs.keeps(*(tuple(record["scores"]) for record in both[place]))]
    if not kept:
        why = f"{len(chats) - len(spoken)} have an empty response, {len(spoken)} do not pass the filter"
        raise PersonafastError(f"{source.source}: none of {len(chats)} pairs of responses is left: {why}")
    texts = [
        [
            TokenizedText(prompts[side][place] + both[place][side]["ids"], len(both[place][side]["ids"]))
            for place in kept
        ]
        for side in (0, 1)
    ]
    counts = {
        "pairs": len(chats),
        "kept": len(kept),
        "empty": len(chats) - len(spoken),
        "filtered": len(spoken) - len(kept),
    }
    drawn_with = {"per_question": sampling.per_question, "max_new_tokens": sampling.max_new_tokens}
    drawn_with |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
    return Sides(
        *texts,
        {"source": _name(source.source), "sampling": drawn_with, "filter": {**pairs.settings(), **counts}},
    )


def _opening_ids(tokenizer: Any, source: TraitPrompts, chat: list[dict[str, str]]) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise PersonafastError(
            f"{source.source}: the tokenizer has no chat template to write system prompts with; give pairs of texts "
            "instead"
        )
    try:
        return chat_ids(tokenizer, chat)
    except Exception as error:  # a template refuses by jinja's own exceptions
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PersonafastError(
            f"{source.source}: the chat template takes no system message ({reason}); use another template"
        ) from None


def _name(source: str) -> str:
    """File names without their folders: metadata travels, paths do not."""
    return ", ".join(Path(part).name for part in source.split(", "))
