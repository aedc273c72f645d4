"""Every kind of source as two lists of tokenised texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
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
    positive = [TokenizedText.from_chat(tokenizer, chat) for chat in source.positive]
    negative = [TokenizedText.from_chat(tokenizer, chat) for chat in source.negative]
    return Sides(positive, negative, {"source": "chats"})


def pair_sides(tokenizer: Any, source: TextPairs) -> Sides:
    """Plain texts, as they are."""
    positive = [TokenizedText.from_text(tokenizer, text) for text in source.positive]
    negative = [TokenizedText.from_text(tokenizer, text) for text in source.negative]
    return Sides(positive, negative, {"source": _name(source.source)})


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
    on_batch(len(lines.records))
    for pair in rows[len(lines.records) :]:
        scores = [pairs.scores(row.question, row.answer, name, (row.score, row.coherence)) for row in pair]
        lines.append([{"scores": scores}])
        on_batch(1)
    kept = [pair for pair, record in zip(rows, lines.records, strict=True) if pairs.keeps(*record["scores"])]
    if not kept:
        raise PersonafastError(
            f"{source.source}: none of {len(rows)} pairs passes the filter; lower the threshold or collect others"
        )
    positive = [_text(tokenizer, row.prompt, row.answer) for row, _ in kept]
    negative = [_text(tokenizer, row.prompt, row.answer) for _, row in kept]
    counts = {"pairs": len(rows), "kept": len(kept), "filtered": len(rows) - len(kept)}
    metadata = {"source": _name(source.source), "filter": {**pairs.settings(), **counts}}
    return Sides(positive, negative, metadata)


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
    prompts = [[_opening_ids(tokenizer, source, pair[side]) for pair in chats] for side in (0, 1)]
    if prompts[0] == prompts[1]:
        raise PersonafastError(
            f"{source.source}: both sides give the same prompts; the chat template leaves system messages out, or pos "
            "and neg are equal"
        )
    lines = Lines(None if folder is None else folder / "responses.jsonl")
    on_batch(len(lines.records))
    for index, side in enumerate(SIDES):
        done = {record["place"] for record in lines.records if record["side"] == side}
        todo = [place for place in range(len(chats)) if place not in done]
        seeds = [response_seed(sampling.seed, name, side, place) for place in todo]
        drawn = respond(model, tokenizer, [prompts[index][place] for place in todo], seeds, sampling, batch_size)
        for batch, answers in drawn:
            records = []
            for place, ids in zip((todo[i] for i in batch), answers, strict=True):
                scores: Scores = (None, None)
                if ids:
                    question = chats[place][index][-1]["content"]
                    scores = pairs.scores(question, tokenizer.decode(ids, skip_special_tokens=True), name)
                prompt = prompts[index][place]
                records.append({"side": side, "place": place, "prompt": prompt, "ids": ids, "scores": scores})
            lines.append(records)
            on_batch(len(records))
    found = {(record["side"], record["place"]): record for record in lines.records}
    answered = [[found[side, place] for side in SIDES] for place in range(len(chats))]
    spoken = [pair for pair in answered if all(record["ids"] for record in pair)]
    kept = [pair for pair in spoken if pairs.keeps(*(record["scores"] for record in pair))]
    if not kept:
        raise PersonafastError(
            f"{source.source}: no pair of {len(chats)} is left, {len(chats) - len(spoken)} had an empty response and "
            f"{len(spoken)} did not pass the filter; lower the threshold or draw more"
        )
    # With the prompt as it was answered: a template may write today's date into it.
    positive, negative = (
        [TokenizedText(pair[side]["prompt"] + pair[side]["ids"], len(pair[side]["ids"])) for pair in kept]
        for side in (0, 1)
    )
    counts = {"pairs": len(chats), "kept": len(kept), "empty": len(chats) - len(spoken)}
    counts["filtered"] = len(spoken) - len(kept)
    metadata = {"source": _name(source.source), "sampling": asdict(sampling)}
    return Sides(positive, negative, {**metadata, "filter": {**pairs.settings(), **counts}})


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
