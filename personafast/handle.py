"""`attach`: personas for a Hugging Face model, and the handle that carries them."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from personafast.density.prompting import SystemPrompts
from personafast.density.scr import ScrOptions
from personafast.errors import PersonafastError
from personafast.library import PersonaLibrary
from personafast.models.anatomy import anatomy
from personafast.models.patch import Patch
from personafast.models.rows import NOBODY, RowSlots
from personafast.persona import Persona
from personafast.vectors.blend import blend

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from personafast.generate import Options, PersonaGenerateOutput, Row

_MARK = "_personafast_handle"
# Merged policies kept in the banks; each holds the concatenated ranks of what it merges.
_MERGED = 8
# Arguments transformers prepares for a decoding loop that this one makes anew.
_PREPARED = {"attention_mask", "position_ids", "cache_position", "past_key_values", "use_cache", "logits_to_keep"}


def attach(
    model: PreTrainedModel,
    library: PersonaLibrary | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_personas: int = 64,
    keep_dense: bool = True,
) -> PersonaHandle:
    """Give a Hugging Face decoder personas.

    Nothing about the model's weights or state-dict names changes; rows without a persona compute what they did before,
    up to rounding: on a CPU, linears with few rows run on our own kernel, which reads their weights faster.

    Args:
        model: a transformers causal LM of any family whose blocks can be found by structure, PEFT-wrapped or not.
        library: vectors, masks and policies; may be left out when only `Persona(prompts=...)` is used.
        tokenizer: needed for prompt personas and stop strings; taken from the model's own folder when left out.
        max_personas: most different vector blends in one call; their bank holds that many rows a steered block.
        keep_dense: False keeps of the masked linears only what the library's one mask keeps, 9 bits a weight at 16 bit
            and 50 %: every row then speaks through that mask, and `detach` cannot bring the rest back. What is saved
            is the masked model. Wrap the model with PEFT before attaching, not after.

    Returns:
        The handle: `generate`, `detach`, and a context manager that detaches.

    Raises:
        UnsupportedModelError: the structure was not understood; nothing is patched.
        PersonafastError: the library was made for another model, the model has personas attached already, or
            keep_dense=False with a library that has not exactly one mask.

    Example:
        >>> with personafast.attach(model, library) as personas:
        ...     out = model.generate(**batch, custom_generate=personas.generate,
        ...                          personas=[personafast.Persona(vectors={"creative": 1.0}), None])
    """
    if max_personas < 1:
        raise PersonafastError(f"max_personas: {max_personas} is not at least 1")
    if _MARK in model.__dict__:
        raise PersonafastError("model: personas are attached already; call detach() on the first handle")
    parts = anatomy(model)
    library = library if library is not None else PersonaLibrary(parts.shape)
    library.check(parts)
    if not keep_dense and len(library.masks) != 1:
        raise PersonafastError(
            f"keep_dense: the library has {len(library.masks)} masks, and keep_dense=False keeps the weights of one; "
            "make a library with that mask alone"
        )
    only_mask = None if keep_dense else next(iter(library.masks))
    return PersonaHandle(model, library, tokenizer, Patch(model, parts, max_personas), only_mask)


class PersonaHandle:
    """A model with personas. Made by `attach`.

    Attributes:
        library: what the personas may name.
        model: the model they are attached to.
    """

    def __init__(
        self, model: nn.Module, library: PersonaLibrary, tokenizer: Any, patch: Patch, only_mask: str | None = None
    ) -> None:
        self.model = model
        self.library = library
        self._tokenizer = tokenizer
        self._patch = patch
        self._only_mask = only_mask
        self._kept = None if only_mask is None else library.masks[only_mask]
        self._prompts: SystemPrompts | None = None
        self._mask_slots: dict[str, int] = {}
        self._adapter_names: list[str] = []
        self._merged: dict[tuple[tuple[str, float], ...], int] = {}
        self._seen: int | None = None
        self._forward_rows: contextlib.ExitStack | None = None
        self._hooks: list[Any] = []
        try:
            patch.install()
            if only_mask is not None:
                patch.compress(library.masks[only_mask].words)
            self._refresh()
            self._hooks.append(model.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True))
            self._hooks.append(model.register_forward_hook(self._after_forward, always_call=True))
            model.__dict__[_MARK] = self
        except BaseException:
            self.detach()
            raise

    @property
    def tokenizer(self) -> Any:
        """The tokenizer given to `attach`, or the one in the model's own folder."""
        if self._tokenizer is None:
            from transformers import AutoTokenizer

            source = getattr(getattr(self.model, "config", None), "_name_or_path", "")
            try:
                if not source:
                    raise OSError("the model has no folder of its own")
                self._tokenizer = AutoTokenizer.from_pretrained(source)
            except (OSError, ValueError) as error:
                raise PersonafastError(
                    f"tokenizer: none given and none found ({str(error).splitlines()[0]}); "
                    "pass tokenizer= to personafast.attach"
                ) from None
        return self._tokenizer

    def __enter__(self) -> PersonaHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Take the personas off; the model is as it was before `attach`, bit for bit. May be called twice.

        After `keep_dense=False` it warns: the weights that the mask dropped are gone, and zeros stand in their place.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        lost = self._patch.remove()
        self.model.__dict__.pop(_MARK, None)
        if lost:
            warnings.warn(
                f"detach: the dense weights were given up (keep_dense=False); the model keeps those of mask "
                f"{self._only_mask!r} and zeros elsewhere. Load it again for the rest",
                stacklevel=2,
            )

    @contextlib.contextmanager
    def using(self, personas: Sequence[Persona | None]) -> Iterator[PersonaHandle]:
        """Let every forward pass inside the `with` carry these personas, one a row: for stock `generate` and training.

        Only vectors and masks act in a plain forward pass; density ratios need `generate`. A batch that is a multiple
        of the personas (beams, `num_return_sequences`) repeats each.

        Raises:
            PersonafastError: a persona has policies or prompts, or names something the library lacks.
        """
        self._check_attached()
        with self._patch.rows(self._plain_rows(personas)):
            yield self

    def bind(self, **options: Any) -> functools.partial[Any]:
        """`generate` with options that transformers' `generate` does not pass on.

        Example:
            >>> model.generate(**batch, custom_generate=personas.bind(streamer=TextStreamer(tokenizer)), personas=[p])
        """
        return functools.partial(self.generate, **options)

    def generate(
        self,
        model: Any,
        input_ids: torch.Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        *,
        personas: Persona | Sequence[Persona | None] | None = None,
        sampler: str = "direct",
        seed: int | None = None,
        seeds: Sequence[int] | None = None,
        min_p: float | None = None,
        policy_temperature: float = 1.0,
        carry: bool = False,
        chunk: int = 4,
        scr_options: ScrOptions | None = None,
        stop_strings: str | Sequence[str] | None = None,
        streamer: Any = None,
        **prepared: Any,
    ) -> torch.Tensor | PersonaGenerateOutput:
        """A decoding loop for `model.generate(..., custom_generate=personas.generate)`.

        The arguments before `personas`, and `prepared`, come from transformers; the others are given to
        `model.generate` by name.

        Args:
            model: the model `generate` was called on.
            input_ids: int64 [B, L], padded left or right.
            logits_processor: processors and warpers; they act on the aggregated target, at every position.
            stopping_criteria: criteria beside length and EOS.
            generation_config: the call's settings.
            personas: one a row (None for the plain model), or one for all rows.
            sampler: "direct" draws every token from the target exactly; "scr" proposes chunks (arXiv 2511.01891,
                approximate); "merge" adds the policies' weights into one model, the baseline without ratios.
            seed: seed of the call; row r uses a hash of it and r. Default: drawn from torch's generator.
            seeds: the rows' own seeds instead.
            min_p: support mask of every row: keep a token whose probability under at least one member is at least
                this share of that member's largest. Default 0.05 for rows with policies or prompts, 0 for others.
                Rows that are one model (no ratios, or "merge") have stock min-p, after the temperature.
            policy_temperature: divides the logits of every member before the ratios; `temperature` acts on the target.
            carry: for the linear rule: one policy speaks the whole text.
            chunk: tokens a proposal of "scr".
            scr_options: all of its open parameters; overrides `chunk`.
            stop_strings: texts that end a row.
            streamer: a transformers streamer; give it through `bind`, `model.generate` keeps its own to itself.
            prepared: what transformers prepares for a decoding loop; `attention_mask` is used.

        Returns:
            int64 [B, L + new], or `PersonaGenerateOutput` with `return_dict_in_generate=True`.

        Raises:
            PersonafastError: naming the argument and the mend.
        """
        from personafast.generate import Options, StopStrings, decode, row_prompts

        self._check_call(model, generation_config, prepared)
        options = Options(
            sampler, seed, seeds, min_p, policy_temperature, carry, scr_options or ScrOptions(chunk=chunk)
        )
        criteria = list(stopping_criteria or ())
        if stop_strings:
            criteria.append(StopStrings(self.tokenizer, stop_strings))
        prompts = row_prompts(input_ids, prepared.get("attention_mask"))
        spread = self._spread(personas, len(prompts), generation_config.num_return_sequences or 1)
        return decode(
            self._patch,
            self._rows(spread, prompts, options),
            input_ids,
            options,
            generation_config,
            logits_processor if logits_processor is not None else [],
            criteria,
            streamer,
        )

    def _check_attached(self) -> None:
        if self.model.__dict__.get(_MARK) is not self:
            raise PersonafastError("personas: this handle is detached; attach again")

    def _refresh(self) -> None:
        """Fill the banks with the masks and policies that are in the library now."""
        if self._seen == self.library.version:
            return
        self.library.check(self._patch.parts)
        if self._only_mask is not None and self.library.masks[self._only_mask] is not self._kept:
            raise PersonafastError(
                f"masks[{self._only_mask!r}]: another mask now, but only the weights of the one before were kept "
                "(keep_dense=False); load the model again and attach"
            )
        self._mask_slots = {name: slot for slot, name in enumerate(sorted(self.library.masks))}
        self._adapter_names = sorted(self.library.policies)
        self._merged = {}
        if self._only_mask is None:
            self._patch.set_masks(self._mask_banks())
        self._fill_adapters()
        self._seen = self.library.version

    def _check_call(self, model: Any, config: Any, prepared: dict[str, Any]) -> None:
        self._check_attached()
        if model is not self.model and getattr(self.model, "base_model", None) is not model:
            owner = getattr(self.model, "get_base_model", lambda: None)()
            if owner is not model:
                raise PersonafastError("custom_generate: these personas belong to another model; attach to this one")
        if (config.num_beams or 1) > 1:
            raise PersonafastError(
                "num_beams: beam search has no density-ratio form; use personas.using(...) or num_beams=1"
            )
        for option in ("output_scores", "output_logits"):
            if getattr(config, option, None):
                raise PersonafastError(f"{option}: not returned with personas; leave it out")
        cache = prepared.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0:
            raise PersonafastError("past_key_values: a filled cache cannot be continued; pass the whole text")
        other = sorted(key for key, value in prepared.items() if key not in _PREPARED and value is not None)
        other = [key for key in other if key not in ("synced_gpus", "output_attentions", "output_hidden_states")]
        if other:
            raise PersonafastError(f"{other[0]}: not supported with personas; leave it out")

    def _spread(
        self, personas: Persona | Sequence[Persona | None] | None, rows: int, repeats: int = 1
    ) -> list[Persona | None]:
        """One persona a row, from one for all, one a row, or one for each `repeats` rows that follow each other."""
        self._refresh()
        given = list(personas) if isinstance(personas, Sequence) else [personas]
        if len(given) not in {1, rows, rows // repeats}:
            raise PersonafastError(
                f"personas: {len(given)} given for {rows // repeats} rows; give one a row (None for the plain model)"
            )
        for persona in given:
            if persona is not None:
                if not isinstance(persona, Persona):
                    raise PersonafastError(f"personas: expected Persona or None, got {type(persona).__name__}")
                self.library.check_persona(persona)
            if self._only_mask is not None and (persona is None or persona.mask != self._only_mask):
                raise PersonafastError(
                    f"personas: {persona} does not speak through mask {self._only_mask!r}, but only its weights were "
                    f"kept (keep_dense=False); give Persona(mask={self._only_mask!r}) or attach with keep_dense=True"
                )
        # num_return_sequences repeats each row in place.
        return [persona for persona in given for _ in range(rows // len(given))]

    def _rows(self, personas: Sequence[Persona | None], prompts: Sequence[list[int]], options: Options) -> list[Row]:
        if options.sampler == "merge":
            self._merge_all([persona for persona in personas if persona is not None])
        vectors = self._vector_slots(personas)
        return [
            self._row(persona or Persona(), prompt, vector, options.sampler == "merge")
            for persona, prompt, vector in zip(personas, prompts, vectors, strict=True)
        ]

    def _row(self, persona: Persona, prompt: list[int], vector: int, merge: bool) -> Row:
        from personafast.density.model_scorer import Member
        from personafast.generate import Row

        mask = self._mask_slot(persona)
        if merge:
            key = _merge_key(persona)
            adapter = self._merged[key] if key else NOBODY
            return Row(Member(prompt, vector, mask, adapter), (), (), persona.aggregator, persona.has_ratios)
        members, weights = [], []
        for name, weight in persona.policies.items():
            if weight:
                members.append(Member(prompt, vector, mask, self._adapter_names.index(name)))
                weights.append(weight)
        for text, weight in persona.prompts.items():
            if weight:
                members.append(Member(self._system_prompts().insert(prompt, text), vector, mask, NOBODY))
                weights.append(weight)
        reference = Member(prompt, vector, mask, NOBODY)
        return Row(reference, members, weights, persona.aggregator, persona.has_ratios)

    def _vector_slots(self, personas: Sequence[Persona | None]) -> list[int]:
        slots: list[int] = []
        in_use = self._patch.vector_slots
        for persona in personas:
            if persona is None or not any(persona.vectors.values()):
                slots.append(NOBODY)
                continue
            # By the vectors themselves: one replaced in the library under its old name must not come from the bank.
            content = tuple((self.library.vectors[name], c) for name, c in sorted(persona.vectors.items()))
            slot = self._patch.vectors.slot(
                (content, persona.blocks),
                functools.partial(blend, self.library.vectors, persona.vectors, blocks=persona.blocks),
                in_use,
            )
            in_use.add(slot)
            slots.append(slot)
        return slots

    def _mask_slot(self, persona: Persona) -> int:
        # A mask whose weights are all there is needs no slot.
        if persona.mask is None or self._only_mask is not None:
            return NOBODY
        return self._mask_slots[persona.mask]

    def _plain_rows(self, personas: Sequence[Persona | None]) -> RowSlots:
        given = self._spread(personas, len(personas))
        for persona in given:
            if persona is not None and persona.has_ratios:
                raise PersonafastError(
                    "personas: policies and prompts act through generate(custom_generate=personas.generate); a plain "
                    "forward pass takes vectors and masks only"
                )
        masks = [NOBODY if persona is None else self._mask_slot(persona) for persona in given]
        return RowSlots.of(self._vector_slots(given), masks, [NOBODY] * len(given))

    def _before_forward(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        personas = kwargs.pop("personas", None)
        if personas is None:
            return None
        self._forward_rows = contextlib.ExitStack()
        self._forward_rows.enter_context(self.using([personas] if isinstance(personas, Persona) else personas))
        return args, kwargs

    def _after_forward(self, *_: Any) -> None:
        if self._forward_rows is not None:
            rows, self._forward_rows = self._forward_rows, None
            rows.close()

    def _system_prompts(self) -> SystemPrompts:
        if self._prompts is None:
            self._prompts = SystemPrompts(self.tokenizer)
        return self._prompts

    def _mask_banks(self) -> dict[str, torch.Tensor]:
        masks = [self.library.masks[name] for name in self._mask_slots]
        banks = {}
        for path in sorted({path for mask in masks for path in mask.words}):
            shape = next(mask.words[path] for mask in masks if path in mask.words)
            # All bits set: a mask that leaves this linear alone keeps every weight of it.
            banks[path] = torch.stack([mask.words.get(path, torch.full_like(shape, -1)) for mask in masks])
        return banks

    def _fill_adapters(self) -> None:
        adapters = [
            {path: (f.a, f.b, f.scale) for path, f in self.library.policies[name].factors.items()}
            for name in self._adapter_names
        ]
        for key in self._merged:
            adapters.append(self._merge(key))
        self._patch.set_adapters(adapters)

    def _merge_all(self, personas: Sequence[Persona]) -> None:
        """See that every persona's merged policy is in the banks; the oldest ones leave when they are too many."""
        for persona in personas:
            if any(persona.prompts.values()):
                raise PersonafastError("sampler: 'merge' adds weights, and prompts have none; use 'direct'")
        needed = [key for key in dict.fromkeys(_merge_key(persona) for persona in personas) if key]
        if all(key in self._merged for key in needed):
            return
        kept = [key for key in self._merged if key not in needed]
        keys = kept[max(0, len(kept) + len(needed) - _MERGED) :] + needed
        self._merged = {key: len(self._adapter_names) + slot for slot, key in enumerate(keys)}
        self._fill_adapters()

    def _merge(self, key: tuple[tuple[str, float], ...]) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
        """sum_i alpha_i s_i B_i A_i as one adapter: A and B side by side, so nothing is approximated."""
        paths = sorted({path for name, _ in key for path in self.library.policies[name].factors})
        merged = {}
        for path in paths:
            parts = [
                (self.library.policies[name].factors[path], weight)
                for name, weight in key
                if path in self.library.policies[name].factors
            ]
            a = torch.cat([f.a.float() for f, _ in parts])
            b = torch.cat([f.b.float() * (weight * f.scale) for f, weight in parts], dim=1)
            merged[path] = (a, b, 1.0)
        return merged


def _merge_key(persona: Persona) -> tuple[tuple[str, float], ...]:
    return tuple(sorted((name, weight) for name, weight in persona.policies.items() if weight))
