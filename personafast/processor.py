"""`MPGLogitsProcessor`: the aggregate of density ratios in transformers' own `generate`, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import LogitsProcessor

from personafast.density.model_scorer import Member, ModelScorer
from personafast.density.transcript import GenerationStats
from personafast.errors import PersonafastError
from personafast.generate import check_room, make_rule, row_prompts
from personafast.handle import PersonaHandle
from personafast.persona import Persona


class MPGLogitsProcessor(LogitsProcessor):
    """Turns the reference's logits into log-probabilities of the target, b g(pi_1 / pi_0, ...) / Z (arXiv 2511.01891).

    The reference is the model that `generate` is called on; the processor runs the policies beside it. What comes after
    it, transformers' warpers among them, acts on the target; processors that transformers puts before those a caller
    gives (repetition_penalty and its like) have acted on the reference. `custom_generate=personas.generate` has neither
    limit, and runs reference and policies as rows of one forward pass where they share a model.

    Any stock decoding works, beam search included; where rows are reordered, the policies read their texts anew.

    Args:
        handle: the attached model.
        personas: one a row (None for the plain model), or one for all rows.
        input_ids: int64 [B, L], as given to `generate`.
        attention_mask: as given to `generate`; None if no row is padded.
        min_p: support mask, as for `personas.generate`.
        policy_temperature: divides the logits of every member before the ratios.

    Raises:
        PersonafastError: a persona names what is not there, or the batch is not that of `input_ids` or a multiple.

    Example:
        >>> processor = personafast.MPGLogitsProcessor(personas, persona, **batch)
        >>> out = model.generate(**batch, logits_processor=[processor], do_sample=True, top_k=0)
    """

    def __init__(
        self,
        handle: PersonaHandle,
        personas: Persona | Sequence[Persona | None] | None,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        min_p: float | None = None,
        policy_temperature: float = 1.0,
    ) -> None:
        self.stats = GenerationStats()
        self._handle = handle
        self._start = input_ids.shape[1]
        prompts = row_prompts(input_ids, attention_mask)
        self._personas = handle.cast.spread(personas, len(prompts))
        self._rows = handle.cast.rows(self._personas, prompts, "direct", "reference")
        self._rule = make_rule(self._rows, min_p, policy_temperature, input_ids.device)
        self._known: torch.Tensor | None = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Log-probabilities of the target, float32 [B, V], from ids [B, l] and the reference's raw logits [B, V]."""
        check_room(self._handle.cast.patch, self._rows, input_ids.shape[1] - self._start)
        self._follow(input_ids)
        with self._handle.speaking():
            reference, policies = self._scorer.score(input_ids[:, :0], reference=True)
        assert reference is not None
        own = self._own[:, None].to(scores.device)
        found = self._batch_rule.target(torch.where(own, reference[:, 0], scores.float()), policies[:, :, 0])
        return found  # type: ignore[return-value]

    def _follow(self, ids: torch.Tensor) -> None:
        """Bring the policies' texts up to these."""
        known = self._known
        if known is not None and ids.shape[1] == known.shape[1] + 1 and torch.equal(ids[:, :-1], known):
            self._scorer.commit(ids[:, -1:].cpu(), torch.ones(ids.shape[0], dtype=torch.long))
        else:
            self._begin(ids)
        self._known = ids.clone()

    def _begin(self, ids: torch.Tensor) -> None:
        rows = len(self._rows)
        if ids.shape[0] % rows or ids.shape[1] < self._start:
            raise PersonafastError(
                f"input_ids: {list(ids.shape)}, but the processor was made for {rows} rows of {self._start} tokens; "
                "make one for every call of generate"
            )
        repeats = ids.shape[0] // rows
        texts = ids[:, self._start :].tolist()
        spread = [row for row in self._rows for _ in range(repeats)]
        index = torch.arange(rows).repeat_interleave(repeats)
        self._batch_rule = self._rule.select(index)
        # The model's own pass knows neither vectors nor masks, and has its own adapters on.
        held = self._handle.cast.policies is not None
        own = [row.needs_reference and (held or row.reference.steered) for row in spread]
        self._own = torch.tensor(own)
        self._scorer = ModelScorer(
            self._handle.cast.patch,
            [
                _written(row.reference, text) if mine else None
                for row, text, mine in zip(spread, texts, own, strict=True)
            ],
            [[_written(member, text) for member in row.members] for row, text in zip(spread, texts, strict=True)],
            stats=self.stats,
            device=ids.device,
        )


def _written(member: Member, text: list[int]) -> Member:
    """A member after it has written some tokens."""
    return replace(member, prompt=member.prompt + text, written=len(text))
