"""The decoding loop behind `model.generate(custom_generate=personas.generate)`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import LogitsProcessorList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.logits_process import (
    LogitNormalization,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
)

from personafast.density.direct import sample_direct
from personafast.density.draws import Draws, row_seed
from personafast.density.model_scorer import Member, ModelScorer
from personafast.density.rule import Rule
from personafast.density.scr import ScrOptions, sample_scr
from personafast.density.transcript import GenerationStats, Transcript
from personafast.errors import PersonafastError
from personafast.models.cache import learned_positions
from personafast.models.patch import Patch
from personafast.ops import Aggregator

SAMPLERS = ("direct", "scr", "merge")
# Keep a token whose probability under a member is at least this share of that member's largest (METHODS 3.2).
DEFAULT_MIN_P = 0.05
# Rows may leave the batch under these; any other processor may hold a state per row.
_STATELESS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, LogitNormalization)


class PersonaGenerateOutput(GenerateDecoderOnlyOutput):
    """What generate returns with `return_dict_in_generate=True`: `sequences`, and `stats` (`GenerationStats`)."""

    stats: GenerationStats | None = None


@dataclass(frozen=True)
class Row:
    """Everything one row of the batch needs: its reference, its policies with weights, and its rule."""

    reference: Member
    policies: Sequence[Member]
    weights: Sequence[float]
    aggregator: str
    has_ratios: bool

    @property
    def needs_reference(self) -> bool:
        """Whether the token-level target depends on the reference: not a mixture, nor weights that sum to 1."""
        if not self.policies:
            return True
        # Well inside the tolerance within which `aggregate_logits` gives the reference no share.
        return self.aggregator != "linear" and abs(1 - sum(self.weights)) > 5e-7


@dataclass(frozen=True)
class Options:
    """How to sample; what `PersonaHandle.generate` takes beside `model.generate`'s own arguments."""

    sampler: str = "direct"
    seed: int | None = None
    seeds: Sequence[int] | None = None
    min_p: float | None = None
    policy_temperature: float = 1.0
    carry: bool = False
    scr: ScrOptions = ScrOptions()

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise PersonafastError(f"sampler: {self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise PersonafastError(f"min_p: {self.min_p} is not in [0, 1]")
        if not self.policy_temperature > 0:
            raise PersonafastError(f"policy_temperature: {self.policy_temperature} is not above 0")


def decode(
    patch: Patch,
    rows: Sequence[Row],
    prompt: torch.Tensor,
    options: Options,
    config: Any,
    processors: LogitsProcessorList,
    criteria: Sequence[Callable[..., Any]],
    streamer: Any = None,
) -> torch.Tensor | PersonaGenerateOutput:
    """Generate for rows that may each carry another persona.

    Args:
        patch: the model with its banks.
        rows: one a row of the batch.
        prompt: int64 [B, L], as given to generate, padding included.
        options: sampler and its settings.
        config: the call's GenerationConfig, prepared by transformers.
        processors: logits processors and warpers; they act on the aggregated target.
        criteria: stopping criteria; length and EOS are taken from `config`.
        streamer: a transformers streamer; it gets committed tokens.

    Returns:
        int64 [B, L + new], or `PersonaGenerateOutput` with `return_dict_in_generate`.
    """
    device = prompt.device
    sampling = bool(config.do_sample)
    min_p = options.min_p if options.min_p is not None else config.min_p
    _check_room(patch.model, prompt.shape[1], int(config.max_length))
    processors = LogitsProcessorList(p for p in processors if not isinstance(p, MinPLogitsWarper))
    if streamer is not None:
        streamer.put(prompt.cpu())
    transcript = Transcript(
        prompt,
        max(0, int(config.max_length) - prompt.shape[1]),
        _eos_ids(config),
        [c for c in criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))],
        (lambda tokens: streamer.put(tokens.cpu())) if streamer is not None else None,
        may_shrink=all(isinstance(p, _STATELESS) for p in processors),
    )
    chunked = options.sampler == "scr" and sampling
    if options.sampler == "scr" and not sampling:
        transcript.stats.notes.append("scr without sampling is greedy decoding of the target: sampled by `direct`")
    rule = _rule(rows, min_p, options.policy_temperature, device)
    scorer = ModelScorer(
        patch,
        [row.reference if chunked or row.needs_reference else None for row in rows],
        [row.policies for row in rows],
        ahead=[row.reference for row in rows] if chunked else None,
        stats=transcript.stats,
        device=device,
    )
    if chunked:
        rule.policy_temperature *= _only_temperature(processors)
        if not all(len(row.policies) for row in rows):
            raise PersonafastError(
                "sampler: 'scr' needs policies or prompts in every row; use 'direct' for mixed batches"
            )
        sample_scr(scorer, transcript, rule, _draws(options, len(rows), device), options.scr)
    else:
        plain = _plain_min_p(rows, min_p, device) if sampling else None

        def process(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            scores = processors(cast(torch.LongTensor, ids), cast(torch.FloatTensor, scores))
            return scores if plain is None else _keep_likely(scores, plain[transcript.alive])

        sample_direct(
            scorer,
            transcript,
            rule,
            _draws(options, len(rows), device) if sampling else None,
            process=process if len(processors) or plain is not None else None,
            carry=options.carry,
        )
    if streamer is not None:
        streamer.end()
    sequences = transcript.sequences(_pad_id(config))
    if not config.return_dict_in_generate:
        return sequences
    output = PersonaGenerateOutput(sequences=sequences)  # type: ignore[arg-type]
    output.stats = transcript.stats
    return output


class StopStrings:
    """Ends a row whose last token completes one of the strings.

    transformers' `StopStringCriteria` tabulates the vocabulary first, which takes seconds for large ones and fails for
    word-level tokenizers; decoding the end of the row needs neither.
    """

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


def row_prompts(prompt: torch.Tensor, attention_mask: torch.Tensor | None) -> list[list[int]]:
    """The tokens of every row without its padding, wherever that stands."""
    prompts = []
    for index, ids in enumerate(prompt.tolist()):
        if attention_mask is not None:
            ids = [token for token, live in zip(ids, attention_mask[index].tolist(), strict=True) if live]
        if not ids:
            raise PersonafastError(f"input_ids: row {index} is empty; give every row at least one token")
        prompts.append(ids)
    return prompts


def _rule(rows: Sequence[Row], min_p: float | None, policy_temperature: float, device: torch.device) -> Rule:
    count = max(len(row.weights) for row in rows)
    weights = torch.zeros(len(rows), count, dtype=torch.float32)
    for index, row in enumerate(rows):
        weights[index, : len(row.weights)] = torch.tensor(row.weights, dtype=torch.float32)
    thresholds = [_threshold(row, min_p) if row.policies else 0.0 for row in rows]
    codes = [int(Aggregator[row.aggregator.upper()]) for row in rows]
    return Rule(
        weights.to(device),
        torch.tensor(codes, dtype=torch.int32, device=device),
        torch.tensor(thresholds, dtype=torch.float32, device=device),
        policy_temperature,
    )


def _threshold(row: Row, min_p: float | None) -> float:
    return min_p if min_p is not None else (DEFAULT_MIN_P if row.has_ratios else 0.0)


def _plain_min_p(rows: Sequence[Row], min_p: float | None, device: torch.device) -> torch.Tensor | None:
    """Min-p [B] of the rows that are one model: there it comes last, after the temperature, as in stock generate."""
    thresholds = [0.0 if row.policies else _threshold(row, min_p) for row in rows]
    return torch.tensor(thresholds, dtype=torch.float32, device=device) if any(thresholds) else None


def _keep_likely(scores: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    logp = scores.float().log_softmax(dim=-1)
    unlikely = logp < logp.amax(dim=-1, keepdim=True) + min_p.log()[:, None]
    return scores.masked_fill(unlikely, float("-inf"))


def _check_room(model: Any, prompt: int, length: int) -> None:
    most = learned_positions(model)
    if most is not None and length > most:
        raise PersonafastError(
            f"max_new_tokens: a prompt of {prompt} tokens and {length - prompt} new ones exceed the {most} positions "
            f"of this model; ask for at most {max(0, most - prompt)}"
        )


def _draws(options: Options, rows: int, device: torch.device) -> Draws:
    if options.seeds is not None:
        if len(options.seeds) != rows:
            raise PersonafastError(f"seeds: {len(options.seeds)} given for {rows} rows; give one a row")
        seeds = [int(seed) for seed in options.seeds]
        if not all(0 <= seed < 2**63 for seed in seeds):
            raise PersonafastError("seeds: a seed is not in 0 .. 2**63 - 1")
    else:
        # Without a seed of its own a call follows torch.manual_seed, as stock generate does.
        base = options.seed if options.seed is not None else int(torch.randint(2**62, ()))
        seeds = [row_seed(int(base), row) for row in range(rows)]
    return Draws(torch.tensor(seeds, dtype=torch.long, device=device))


def _only_temperature(processors: LogitsProcessorList) -> float:
    temperature = 1.0
    for processor in processors:
        if not isinstance(processor, TemperatureLogitsWarper):
            raise PersonafastError(
                f"sampler: 'scr' scores chunks and cannot apply {type(processor).__name__} to them; turn it off "
                "(top_k=0, top_p=1.0, ...) or use sampler='direct'"
            )
        temperature *= float(processor.temperature)
    return temperature


def _eos_ids(config: Any) -> list[int]:
    eos = config.eos_token_id
    if eos is None:
        return []
    return [int(token) for token in (eos if isinstance(eos, (list, tuple)) else [eos])]


def _pad_id(config: Any) -> int:
    if config.pad_token_id is not None:
        return int(config.pad_token_id)
    eos = _eos_ids(config)
    return eos[0] if eos else 0
