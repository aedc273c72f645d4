"""The decoding loop behind `model.generate(custom_generate=personas.generate)`."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from transformers import LogitsProcessorList
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.logits_process import (
    LogitNormalization,
    MinPLogitsWarper,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import (
    EosTokenCriteria,
    MaxLengthCriteria,
)

from personafast.density.direct import sample_direct
from personafast.density.draft import Drafter, ModelDrafter, NgramDrafter
from personafast.density.draws import Draws, row_seed
from personafast.density.mixture import sample_mixture
from personafast.density.model_scorer import Member, ModelScorer
from personafast.density.rule import Rule
from personafast.density.scr import sample_scr
from personafast.density.token_rs import sample_token_rs
from personafast.density.transcript import GenerationStats, Transcript
from personafast.density.verify import sample_verify
from personafast.errors import PersonafastError
from personafast.models.context import learned_positions
from personafast.models.patch import Patch
from personafast.ops import Aggregator
from personafast.options import Options
from personafast.row import Row

# Keep a token whose probability under a member is at least this share of that member's largest (METHODS 3.2).
DEFAULT_MIN_P = 0.05
# Tokens drafted a round, unless asked otherwise.
_CHUNK = 8
# Rows may leave the batch under these, and drafts may take them on; any other processor may hold a state per row.
_STATELESS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    LogitNormalization,
)
# These remember the steps they have seen, and would take those of a draft for the text.
_STATEFUL = (UnbatchedClassifierFreeGuidanceLogitsProcessor, SynthIDTextWatermarkLogitsProcessor)
# The rules that are power means, and their exponents.
_POWERS = {"harmonic": -1.0}


class PersonaGenerateOutput(GenerateDecoderOnlyOutput):
    """What generate returns with `return_dict_in_generate=True`: `sequences`, and `stats` (`GenerationStats`)."""

    stats: GenerationStats | None = None


class _Call:
    """One call of generate: its rows, what acts on their targets, and what comes of it."""

    def __init__(
        self,
        patch: Patch,
        rows: Sequence[Row],
        prompt: torch.Tensor,
        options: Options,
        config: Any,
        processors: LogitsProcessorList,
        transcript: Transcript,
    ) -> None:
        self.patch, self.rows, self.options, self.transcript = patch, rows, options, transcript
        self.device = prompt.device
        self.prompt = prompt
        self.sampling = bool(config.do_sample)
        self.want_log_z = bool(config.return_dict_in_generate)
        self.min_p = options.min_p if options.min_p is not None else config.min_p
        self.processors = LogitsProcessorList(p for p in processors if not _makes_support(p, config))
        self.rule = make_rule(rows, self.min_p, options.policy_temperature, self.device)
        self.draws = _draws(options, len(rows)) if self.sampling else None
        self._plain = _plain_min_p(rows, self.min_p) if self.sampling else None
        self._scorers: list[ModelScorer] = []

    def run(self, sampler: str) -> None:
        """Decode every row to its end."""
        try:
            self._run(sampler)
        finally:
            for scorer in self._scorers:
                scorer.close()

    def _run(self, sampler: str) -> None:
        if sampler in ("direct", "merge"):
            sample_direct(
                self._scorer(),
                self.transcript,
                self.rule,
                self.draws,
                process=self._process_or_none,
                carry=self.options.carry,
                want_log_z=self.want_log_z,
            )
        elif sampler in ("verify", "block"):
            self._verify(block=sampler == "block")
        elif sampler == "token_rs":
            assert self.draws is not None
            sample_token_rs(
                self._scorer(all_references=True),
                self.transcript,
                self.rule,
                self.draws,
                retries=self.options.retries,
                process=self._process_or_none,
                carry=self.options.carry,
                want_log_z=self.want_log_z,
            )
        else:
            self._chunks(sampler)

    def _verify(self, block: bool) -> None:
        given = self.options.draft
        own = given == "ngram" or (not isinstance(given, (str, Patch)))
        scorer = self._scorer(None if own else [row.draft or row.front for row in self.rows])
        if given == "ngram":
            drafter: Drafter = NgramDrafter([row.reference.prompt for row in self.rows])
        elif own:
            drafter = given
        else:
            drafter = ModelDrafter(
                scorer,
                temperature=self.rule.policy_temperature,
                doubt=self.options.draft_doubt,
                min_p=self._draft_min_p(),
                process=self._draft_process(),
            )
        sample_verify(
            scorer,
            self.transcript,
            self.rule,
            self.draws,
            drafter,
            chunk=self.options.chunk or _CHUNK,
            block=block,
            process=self._process_or_none,
            carry=self.options.carry,
            want_log_z=self.want_log_z,
            vocabulary=self.patch.parts.shape.vocab_size,
        )

    def _chunks(self, sampler: str) -> None:
        """The samplers whose target is at chunk level: nothing but a temperature can act on it."""
        assert self.draws is not None
        self.rule.policy_temperature *= _only_temperature(sampler, self.processors)
        if sampler == "scr":
            if not all(len(row.policies) for row in self.rows):
                raise PersonafastError(
                    "sampler: 'scr' needs policies or prompts in every row; use 'direct' for mixed batches"
                )
            scorer = self._scorer(ahead=[row.front for row in self.rows], all_references=True)
            sample_scr(scorer, self.transcript, self.rule, self.draws, self.options.scr, want_log_z=self.want_log_z)
            return
        # A row without policies is a mixture of one: its reference.
        policies = [row.policies or [row.reference] for row in self.rows]
        sample_mixture(
            self._members([None] * len(policies), policies),
            self.transcript,
            _as_mixture(self.rule, self._plain),
            self.draws,
            chunk=self.options.chunk or 1,
            carry=self.options.carry,
            want_log_z=self.want_log_z,
        )

    def _scorer(self, ahead: Sequence[Member] | None = None, all_references: bool = False) -> ModelScorer:
        references = [row.reference if all_references or row.needs_reference else None for row in self.rows]
        return self._members(references, [row.members for row in self.rows], ahead)

    def _members(
        self,
        references: Sequence[Member | None],
        policies: Sequence[Sequence[Member]],
        ahead: Sequence[Member] | None = None,
    ) -> ModelScorer:
        scorer = ModelScorer(
            self.patch,
            references,
            policies,
            ahead=ahead,
            stats=self.transcript.stats,
            device=self.device,
            room=self.transcript.limit + (self.options.chunk or _CHUNK) + 1,
            host=self.transcript.host,
        )
        self._scorers.append(scorer)
        return scorer

    @property
    def _process_or_none(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
        return self._process if len(self.processors) or self._plain is not None else None

    def _draft_min_p(self) -> torch.Tensor | None:
        """The target's own thresholds: what the support mask drops there is drafted in vain."""
        found = [_threshold(row, self.min_p) if row.members else 0.0 for row in self.rows]
        return torch.tensor(found, dtype=torch.float32) if any(found) else None

    def _draft_process(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None:
        shared = LogitsProcessorList(p for p in self.processors if isinstance(p, _STATELESS))
        return cast(Any, shared) if shared else None

    def _process(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = self._processed(cast(torch.LongTensor, ids), cast(torch.FloatTensor, scores))
        if self._plain is None:
            return scores
        return _keep_likely(scores, self.transcript.host.send(self._plain[self.transcript.alive]))

    def _processed(self, ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.Tensor:
        """Scores [B, V] after the processors, which count columns and look for repetitions: no row may be filled up."""
        if all(isinstance(p, _STATELESS) for p in self.processors):
            return self.processors(ids, scores)
        positions, host = self.transcript.positions, self.transcript.host
        short = positions.max() - positions  # ids are aligned at the right
        found: torch.Tensor | None = None
        for least in short[~self.transcript.ended].unique().tolist():
            # Every row keeps its place; those that are longer stand here with the beginning of their text.
            columns = host.send(torch.arange(ids.shape[1] - least) + short.clamp(max=least)[:, None])
            # A copy, as in stock generate: a processor may write into what it is given.
            part = self.processors(cast(Any, ids.gather(1, columns)), cast(Any, scores.clone()))
            found = part if found is None else torch.where(host.send(short == least)[:, None], part, found)
        assert found is not None
        return found


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
        options: sampler, not "auto", and its settings.
        config: the call's GenerationConfig, prepared by transformers.
        processors: logits processors and warpers; they act on the aggregated target.
        criteria: stopping criteria; length and EOS are taken from `config` where no criterion says them.
        streamer: a transformers streamer; it gets committed tokens.

    Returns:
        int64 [B, L + new], or `PersonaGenerateOutput` with `return_dict_in_generate`.
    """
    length, eos = _ends(config, criteria)
    check_room(patch, rows, length - prompt.shape[1])
    if streamer is not None:
        streamer.put(prompt.cpu())
    transcript = Transcript(
        prompt,
        max(0, length - prompt.shape[1]),
        eos,
        [c for c in criteria if not isinstance(c, (EosTokenCriteria, MaxLengthCriteria))],
        (lambda tokens: streamer.put(tokens.cpu())) if streamer is not None else None,
        may_shrink=all(isinstance(p, _STATELESS) for p in processors),
        looked_at=any(type(p) not in _STATELESS for p in processors),
    )
    transcript.stats.notes.extend(options.notes)
    sampler = options.sampler
    if sampler in ("scr", "mixture", "token_rs") and not config.do_sample:
        transcript.stats.notes.append(f"{sampler} without sampling is greedy decoding of the target: by `direct`")
        sampler = "direct"
    stateful = processor_of_steps(processors) if sampler in ("verify", "block") else None
    if stateful is not None:
        raise PersonafastError(
            f"sampler: {sampler!r} calls processors at drafted places too, and {stateful} remembers what it has seen; "
            "turn it off or use sampler='direct'"
        )
    call = _Call(patch, rows, prompt, options, config, processors, transcript)
    call.run(sampler)
    _report_clamping(call.rule, transcript.stats)
    if streamer is not None:
        streamer.end()
    sequences = transcript.sequences(_pad_id(config))
    if not config.return_dict_in_generate:
        return sequences
    output = PersonaGenerateOutput(sequences=sequences)  # type: ignore[arg-type]
    output.stats = transcript.stats
    return output


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


def make_rule(rows: Sequence[Row], min_p: float | None, policy_temperature: float, device: torch.device) -> Rule:
    """The targets of some rows; min_p None gives rows with ratios their default support mask."""
    count = max(len(row.members) for row in rows)
    weights = torch.zeros(len(rows), count, dtype=torch.float32)
    for index, row in enumerate(rows):
        weights[index, : len(row.weights)] = torch.tensor(row.weights, dtype=torch.float32)
    # Without policies there is nothing to join, and the geometric rule is the one that takes a base as it is.
    names = [row.aggregator if row.policies else "geometric" for row in rows]
    functions = [None if isinstance(name, str) else name for name in names]
    codes = [_code(name) if isinstance(name, str) else int(Aggregator.GEOMETRIC) for name in names]
    exponents = [_POWERS.get(cast(str, name), row.p) for name, row in zip(names, rows, strict=True)]
    bases = [-1 if row.base is None else len(row.policies) for row in rows]
    return Rule(
        weights,
        torch.tensor(codes, dtype=torch.int32),
        torch.tensor([_threshold(row, min_p) if row.members else 0.0 for row in rows]),
        policy_temperature,
        torch.tensor(exponents, dtype=torch.float32),
        torch.tensor(bases) if max(bases) >= 0 else None,
        functions if any(functions) else None,
        device=device,
    )


def _code(aggregator: str) -> int:
    return int(Aggregator["POWER" if aggregator in _POWERS else aggregator.upper()])


def _threshold(row: Row, min_p: float | None) -> float:
    return min_p if min_p is not None else (DEFAULT_MIN_P if row.has_ratios else 0.0)


def _plain_min_p(rows: Sequence[Row], min_p: float | None) -> torch.Tensor | None:
    """Min-p [B] of the rows that are one model: there it comes last, after the temperature, as in stock generate."""
    thresholds = [0.0 if row.members else _threshold(row, min_p) for row in rows]
    return torch.tensor(thresholds, dtype=torch.float32) if any(thresholds) else None


def _keep_likely(scores: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    logp = scores.float().log_softmax(dim=-1)
    unlikely = logp < logp.amax(dim=-1, keepdim=True) + min_p.log()[:, None]
    return scores.masked_fill(unlikely, float("-inf"))


def check_room(patch: Patch, rows: Sequence[Row], new: int) -> None:
    """Raise unless the model of every member, `patch`'s by default, has learned positions for `new` more tokens.

    A draft may run out of them: its tokens are verified.
    """
    longest: dict[Patch, Member] = {}
    for member in (member for row in rows for member in (row.reference, *row.members)):
        own = member.patch or patch
        if own not in longest or len(member.prompt) > len(longest[own].prompt):
            longest[own] = member
    for own, member in longest.items():
        most, prompt = learned_positions(own.model), len(member.prompt)
        if most is not None and prompt + new > most:
            whose = "this model" if member.patch is None else f"the model of {member.name}"
            raise PersonafastError(
                f"max_new_tokens: a prompt of {prompt} tokens and {new} new ones exceed the {most} positions of "
                f"{whose}; ask for at most {max(0, most - prompt)}"
            )


def _draws(options: Options, rows: int) -> Draws:
    if options.seeds is not None:
        try:
            seeds = [operator.index(seed) for seed in options.seeds]
        except TypeError:
            raise PersonafastError(f"seeds: expected one whole number a row, got {options.seeds!r}") from None
        if len(seeds) != rows:
            raise PersonafastError(f"seeds: {len(seeds)} given for {rows} rows; give one a row")
        if not all(0 <= seed < 2**63 for seed in seeds):
            raise PersonafastError("seeds: a seed is not in 0 .. 2**63 - 1")
    else:
        # Without a seed of its own a call follows torch.manual_seed, as stock generate does.
        base = options.seed if options.seed is not None else int(torch.randint(2**62, ()))
        seeds = [row_seed(int(base), row) for row in range(rows)]
    return Draws(torch.tensor(seeds, dtype=torch.long))


def _only_temperature(sampler: str, processors: LogitsProcessorList) -> float:
    temperature = 1.0
    for processor in processors:
        if not isinstance(processor, TemperatureLogitsWarper):
            raise PersonafastError(
                f"sampler: {sampler!r} has its target at chunk level, where {type(processor).__name__} cannot act; "
                "turn it off (top_k=0, top_p=1.0, ...) or use sampler='direct'"
            )
        temperature *= float(processor.temperature)
    return temperature


def _makes_support(processor: Any, config: Any) -> bool:
    """Whether a processor is what transformers makes of `min_p`, which is the support mask here."""
    return isinstance(processor, MinPLogitsWarper) and processor.min_p == config.min_p


def warper_of_targets(processors: Sequence[Any], config: Any) -> str | None:
    """The name of a processor that acts on the target, if there is one.

    A mixture cannot take it, or, as the temperature, takes it policy by policy, which is another target.
    """
    return next((type(p).__name__ for p in processors if not _makes_support(p, config)), None)


def processor_of_steps(processors: Sequence[Any]) -> str | None:
    """The name of a processor that must see every token once, in order, as no draft lets it; None without one."""
    return next((type(p).__name__ for p in processors if isinstance(p, _STATEFUL)), None)


def _as_mixture(rule: Rule, plain: torch.Tensor | None) -> Rule:
    """Rows without policies speak as the one member that stands for them, under their own min-p, `plain` [B]."""
    weights = rule.weights if rule.weights.shape[1] else rule.weights.new_zeros(rule.weights.shape[0], 1)
    alone = (weights == 0).all(dim=1)
    weights[alone, 0] = 1.0
    rule.weights = weights
    rule.aggregator = torch.where(alone, int(Aggregator.LINEAR), rule.aggregator)
    rule.min_p = rule.min_p if plain is None else torch.where(alone, plain, rule.min_p)
    return rule


def _report_clamping(rule: Rule, stats: GenerationStats) -> None:
    if not rule.clamped.places:
        return
    stats.clamped_share = float(rule.clamped.share) / rule.clamped.places
    warnings.warn(
        "personas: a negative weight under the linear rule makes the target negative in places, where it was set to 0: "
        f"{stats.clamped_share:.1%} of its mass (stats.clamped_share). Such a target does not compose from token to "
        "token; use aggregator='geometric' to subtract a trait",
        stacklevel=2,
    )


def _ends(config: Any, criteria: Sequence[Any]) -> tuple[int, list[int]]:
    """Most tokens of a row, prompt included, and the ids that end it.

    A caller's own criteria stand in place of those that transformers makes of the configuration.
    """
    limits = [int(c.max_length) for c in criteria if isinstance(c, MaxLengthCriteria)]
    eos = [int(token) for c in criteria if isinstance(c, EosTokenCriteria) for token in c.eos_token_id.tolist()]
    return min(limits, default=int(config.max_length)), eos or _eos_ids(config)


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
