"""Persona vectors from contrasting texts, by four methods, batched and resumable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from personafast.errors import PersonafastError
from personafast.models.anatomy import anatomy
from personafast.models.reading import POSITIONS, TokenizedText
from personafast.vectors.directions import METHODS, PAIRED, SCALES, direction, scaled
from personafast.vectors.judging import Judge, PairFilter
from personafast.vectors.means import TextMeans, find_spans, read_means
from personafast.vectors.reliability import reliability
from personafast.vectors.responses import Sampling
from personafast.vectors.sides import SIDES, Sides, contrast_sides, pair_sides, response_sides, trait_sides
from personafast.vectors.sources import Contrast, Responses, TextPairs
from personafast.vectors.state import digest, model_settings, open_state, trait_folder
from personafast.vectors.traits import TraitPrompts
from personafast.vectors.vector import PersonaVector

Source = Contrast | TextPairs | Responses | TraitPrompts | Mapping[str, Any] | str | Path
Progress = Callable[[str, int, int], None]


def mean_activations(model: nn.Module, texts: Sequence[TokenizedText], *, batch_size: int = 32) -> torch.Tensor:
    """Mean over texts of the mean over each text's response tokens, at every block's output.

    Every text weighs the same however long its response is (arXiv 2510.10157). Only running sums are kept.

    Returns:
        float64 [num_blocks, hidden].

    Raises:
        PersonafastError: no texts, or a text without response tokens.
    """
    found = TextMeans(len(texts), keep=False)
    read_means(model, texts, found, batch_size=batch_size)
    return found.mean()


def extract_vectors(
    model: nn.Module,
    tokenizer: Any,
    traits: Mapping[str, Source],
    *,
    method: str = "mean_diff",
    positions: str = "response_avg",
    scale: str = "gap",
    blocks: Sequence[int] = (),
    batch_size: int = 32,
    sampling: Sampling | None = None,
    judge: Judge | None = None,
    coherence: Judge | None = None,
    threshold: float = 50.0,
    coherence_threshold: float = 50.0,
    statistics: bool = True,
    state: str | Path | None = None,
    on_progress: Progress | None = None,
    on_trait: Callable[[str], None] | None = None,
) -> dict[str, PersonaVector]:
    """One direction per block and trait, from texts that show the trait and texts that do not.

    v_b = `direction(method, X_b, Y_b)`, scaled by `scaled`, where X_b and Y_b hold one row a text: the mean over its
    chosen tokens of the residual stream at the output of block b (arXiv 2510.10157). One forward a batch reads all
    blocks; no activation of a token is kept. `mean_diff` comes from running sums in float64. The other methods, and the
    reliability figures in the metadata, come from the texts' means, which are kept in float32, see `TextMeans`.

    A trait's source is one of

    - `TraitPrompts`, or the path of such a file: the model answers its questions under both kinds of system prompt;
    - `TextPairs`: plain texts in pairs;
    - `Responses`: responses collected elsewhere, for example persona_vectors' CSV files;
    - `Contrast`: chats whose last message is the response.

    Metadata, besides method, counts and settings: `split_half_cosine` and `separation` per block (see `reliability`;
    None where there are too few texts) and `best_block`, the block of the largest separation.

    Args:
        model: a Hugging Face decoder, wherever its weights are; personas in force (`using`) and adapters that are on
            are part of what is read.
        tokenizer: its tokenizer; a chat template is needed for chats and trait files.
        traits: trait -> source.
        method: `mean_diff`, `pca_diff`, `pca_center` or `logistic`, see `direction`.
        positions: `response_avg`, `prompt_avg`, `prompt_last` or `response_last`.
        scale: `gap` (coefficient 1 goes from one side's mean to the other's, along this direction) or `unit`.
        blocks: blocks the vectors act on by default; empty takes `default_blocks`.
        batch_size: texts a forward, and responses generated at once.
        sampling: how responses to a trait file are drawn; None takes `Sampling()`.
        judge: judge(question, response, trait) -> 0 to 100; keeps pairs by the rule of `PairFilter`.
        coherence: the same for coherence.
        threshold: least score of a positive response; negatives must stay below 100 minus it.
        coherence_threshold: least coherence of both.
        statistics: False, with `mean_diff`, keeps no texts' means and leaves the reliability figures out.
        state: a folder to keep what was generated and read, batch by batch. A call with the same folder and settings
            goes on where an interrupted one stopped; batch size, method and scale may change. It is yours to delete.
        on_progress: called as on_progress(stage, done, total).
        on_trait: called with each trait's name when it is done.

    Returns:
        trait -> vector, float32 [num_blocks, hidden].

    Raises:
        PersonafastError: an unknown option, a source that cannot be used, no pair left, activations that are not
            finite.
        FormatError: a file that cannot be used, or a state folder of other settings.
        UnsupportedModelError: the model's blocks were not found.
    """
    for argument, value, names in (
        ("method", method, METHODS),
        ("positions", positions, POSITIONS),
        ("scale", scale, SCALES),
    ):
        if value not in names:
            raise PersonafastError(f"{argument}: {value!r} is not one of {', '.join(names)}")
    if batch_size < 1:
        raise PersonafastError(f"batch_size: {batch_size} is not at least 1")
    if not statistics and method != "mean_diff":
        raise PersonafastError(f"statistics: {method} needs the texts' means; leave it on, or take mean_diff")
    if not traits:
        raise PersonafastError("traits: empty; give at least one trait and its source")
    pairs = PairFilter(judge, coherence, threshold, coherence_threshold)
    known = {name: _resolve(name, source, pairs) for name, source in traits.items()}
    anatomy(model)  # what is not understood is refused before anything is generated
    run = _Run(model, tokenizer, positions, batch_size, sampling or Sampling(), pairs, statistics, on_progress)
    found = {}
    for name, source in known.items():
        folder = None if state is None else trait_folder(Path(state), name)
        sides = run.sides(name, source, folder)
        counts = [len(sides.positive), len(sides.negative)]
        if method in PAIRED and counts[0] != counts[1]:
            raise PersonafastError(
                f"traits[{name!r}]: {counts[0]} positive and {counts[1]} negative texts; {method} needs pairs"
            )
        directions, facts = run.directions(name, run.means(name, sides, folder), method, scale)
        metadata = {"method": method, "positive": counts[0], "negative": counts[1], "positions": positions}
        metadata |= {"scale": scale, **run.shape, **sides.metadata, **facts}
        found[name] = PersonaVector(directions.float(), blocks, metadata)
        if on_trait is not None:
            on_trait(name)
    return found


def _resolve(name: str, source: Source, pairs: PairFilter) -> Contrast | TextPairs | Responses | TraitPrompts:
    if isinstance(source, (str, Path)):
        source = TraitPrompts.from_file(source)
    elif isinstance(source, Mapping):
        source = TraitPrompts.from_dict(source, source=f"traits[{name!r}]")
    if not isinstance(source, (Contrast, TextPairs, Responses, TraitPrompts)):
        raise PersonafastError(
            f"traits[{name!r}]: {type(source).__name__} is no source; give TraitPrompts or the path of a trait file, "
            "TextPairs, Responses or a Contrast"
        )
    if isinstance(source, (Contrast, TextPairs)) and (pairs.judge is not None or pairs.coherence is not None):
        raise PersonafastError(f"judge: traits[{name!r}] holds no responses to judge; leave the judge out")
    return source


@dataclass(frozen=True)
class _Run:
    """What the traits of one call share."""

    model: nn.Module
    tokenizer: Any
    positions: str
    batch_size: int
    sampling: Sampling
    pairs: PairFilter
    statistics: bool
    on_progress: Progress | None

    @cached_property
    def shape(self) -> dict[str, Any]:
        """What the vectors fit, for their metadata."""
        shape = anatomy(self.model).shape
        return {"model_type": shape.model_type, "hidden_size": shape.hidden_size, "num_blocks": shape.num_blocks}

    @cached_property
    def model_settings(self) -> dict[str, str]:
        """What a state folder tells models apart by."""
        return model_settings(self.model)

    def sides(self, name: str, source: Contrast | TextPairs | Responses | TraitPrompts, folder: Path | None) -> Sides:
        """The texts of a trait, generated and filtered first where that is called for."""
        if isinstance(source, Contrast):
            return contrast_sides(self.tokenizer, source)
        if isinstance(source, TextPairs):
            return pair_sides(self.tokenizer, source)
        settings: dict[str, Any] = {"trait": name, **self.pairs.settings()}
        if isinstance(source, Responses):
            settings["responses"] = digest(
                [[asdict(row) for row in side] for side in (source.positive, source.negative)]
            )
            advance = self._bar(f"{name}: filter", len(source.positive))
            return response_sides(
                self.tokenizer, name, source, self.pairs, self._open(folder, "responses", settings), advance
            )
        settings |= {**self.model_settings, **asdict(self.sampling)}
        settings |= {"instructions": digest(source.instructions), "questions": digest(source.questions)}
        settings["chat template"] = digest(getattr(self.tokenizer, "chat_template", None))
        total = 2 * self.sampling.per_question * len(source.instructions) * len(source.questions)
        advance = self._bar(f"{name}: responses", total)
        place = self._open(folder, "responses", settings)
        return trait_sides(
            self.model, self.tokenizer, name, source, self.sampling, self.pairs, self.batch_size, place, advance
        )

    def means(self, name: str, sides: Sides, folder: Path | None) -> list[TextMeans]:
        """Read what is not read yet."""
        both = (sides.positive, sides.negative)
        self._check(name, both)
        if folder is not None:
            texts = digest([[[list(map(int, text.ids)), text.response] for text in side] for side in both])
            settings = {
                **self.model_settings,
                "positions": self.positions,
                "texts": texts,
                "statistics": self.statistics,
            }
            folder = self._open(folder, "means", settings)
        advance = self._bar(f"{name}: texts", sum(map(len, both)))
        found = []
        for side, texts_of in zip(SIDES, both, strict=True):
            place = None if folder is None else folder / side
            means = TextMeans(len(texts_of), keep=self.statistics, folder=place)
            advance(len(texts_of) - len(means.missing))
            read_means(
                self.model,
                texts_of,
                means,
                positions=self.positions,
                batch_size=self.batch_size,
                label=f"traits[{name!r}]: {side} texts",
                on_batch=advance,
            )
            found.append(means)
        return found

    def directions(
        self, name: str, means: list[TextMeans], method: str, scale: str
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """float64 [num_blocks, hidden], and the reliability figures."""
        gap = means[0].mean() - means[1].mean()
        rows, cosines, effects = [], [], []
        advance = self._bar(f"{name}: directions", len(gap))
        for block in range(len(gap)):
            try:
                if self.statistics:
                    sides = [side.block(block) for side in means]
                    cosine, effect = reliability(method, *sides)
                    cosines.append(_rounded(cosine))
                    effects.append(_rounded(effect))
                found = gap[block] if method == "mean_diff" else direction(method, *sides)
                # The mean difference is its own gap: scaling it would only round it.
                own = method == "mean_diff" and scale == "gap"
                rows.append(found if own else scaled(found, gap[block], scale))
            except PersonafastError as error:
                raise PersonafastError(f"traits[{name!r}], block {block}: {error}") from None
            advance(1)
        if not self.statistics:
            return torch.stack(rows), {}
        known = [(effect, block) for block, effect in enumerate(effects) if effect is not None]
        best = max(known)[1] if known else None
        return torch.stack(rows), {"split_half_cosine": cosines, "separation": effects, "best_block": best}

    def _check(self, name: str, both: Sequence[Sequence[TokenizedText]]) -> None:
        seen: list[Counter[tuple[int, ...]]] = []
        for side, texts in zip(SIDES, both, strict=True):
            spans = find_spans(texts, self.positions, f"traits[{name!r}]: {side} texts")
            seen.append(Counter((start, *text.ids[:stop]) for text, (start, stop) in zip(texts, spans, strict=True)))
        # Under a causal mask no later token reaches these, so the difference would be rounding errors.
        if seen[0] == seen[1]:
            raise PersonafastError(
                f"traits[{name!r}]: both sides are the same at {self.positions}; take other positions or other texts"
            )

    def _open(self, folder: Path | None, part: str, settings: Mapping[str, Any]) -> Path | None:
        return None if folder is None else open_state(folder / part, settings)

    def _bar(self, stage: str, total: int) -> Callable[[int], None]:
        done = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            if self.on_progress is not None:
                self.on_progress(stage, done, total)

        return advance


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
