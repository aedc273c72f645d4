"""`attach`: personas for a Hugging Face model, and the handle that carries them."""

from __future__ import annotations

import contextlib
import functools
import operator
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from personafast.cast import Cast
from personafast.density.auto import Call, choose
from personafast.density.scr import ScrOptions
from personafast.errors import PersonafastError
from personafast.library import PersonaLibrary
from personafast.models.anatomy import anatomy
from personafast.models.generating import GenerateNote
from personafast.models.patch import Patch
from personafast.models.places import Prompts
from personafast.options import DRAFTS, Options
from personafast.persona import Persona

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from personafast.generate import PersonaGenerateOutput
    from personafast.policies import PolicySet

_MARK = "_personafast_handle"
# Arguments transformers prepares for a decoding loop that this one makes anew.
_PREPARED = {"attention_mask", "position_ids", "cache_position", "past_key_values", "use_cache", "logits_to_keep"}


def attach(
    model: PreTrainedModel,
    library: PersonaLibrary | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    policies: PolicySet | None = None,
    max_personas: int = 64,
    keep_dense: bool = True,
    graphs: bool | None = None,
) -> PersonaHandle:
    """Give a Hugging Face decoder personas.

    Nothing about the model's weights or state-dict names changes, but that weights which lie as [in, out] (GPT-2's
    Conv1D) are turned in memory while a mask covers them: their values and shape stay, their strides do not. Rows
    without a persona compute what they did before, up to rounding: on a CPU, linears with few rows run on our own
    kernel, which reads their weights faster.

    Args:
        model: a transformers causal LM of any family whose blocks can be found by structure, PEFT-wrapped or not.
        library: vectors, masks and policies; may be left out when only `Persona(prompts=...)` is used.
        tokenizer: needed for prompt personas and stop strings; taken from the model's own folder when left out.
        policies: policies in memory (adapters of a live PEFT model, separate models, prompts) that personas may name
            beside those of the library; their reference must be this model.
        max_personas: most different vector blends in one call, and as many operations other than additions; a bank
            holds that many rows a steered block. A persona of several steps may need several of them.
        keep_dense: False keeps of the masked linears only what the library's one mask keeps, 9 bits a weight at 16 bit
            and 50 %: every row then speaks through that mask, and `detach` cannot bring the rest back. What is saved
            is the masked model. Wrap the model with PEFT before attaching, not after.
        graphs: record decoding and scoring passes once and replay them, over a cache of fixed size: CUDA graphs. None
            for where they pay, on a GPU. On a CPU `True` replays operator by operator, which is slower, for tests.

    Returns:
        The handle: `generate`, `detach`, and a context manager that detaches.

    Raises:
        UnsupportedModelError: the structure was not understood; nothing is patched.
        PersonafastError: the library was made for another model, the model has personas attached already, or
            keep_dense=False with a library that has not exactly one mask, or a soft one.

    Example:
        >>> with personafast.attach(model, library) as personas:
        ...     out = model.generate(**batch, custom_generate=personas.generate,
        ...                          personas=[personafast.Persona(vectors={"creative": 1.0}), None])
    """
    if max_personas < 1:
        raise PersonafastError(f"max_personas: {max_personas} is not at least 1")
    if not isinstance(model, nn.Module):
        raise PersonafastError(f"model: expected a transformers causal LM, got {type(model).__name__}")
    if _MARK in model.__dict__:
        raise PersonafastError("model: personas are attached already; call detach() on the first handle")
    from personafast.policies import PolicySet as Policies

    if library is not None and not isinstance(library, PersonaLibrary):
        raise PersonafastError(f"library: expected a PersonaLibrary or None, got {type(library).__name__}")
    if policies is not None and not isinstance(policies, Policies):
        raise PersonafastError(f"policies: expected a PolicySet or None, got {type(policies).__name__}")
    parts = anatomy(model)
    library = library if library is not None else PersonaLibrary(parts.shape)
    library.check(parts)
    if not keep_dense and len(library.masks) != 1:
        raise PersonafastError(
            f"keep_dense: the library has {len(library.masks)} masks, and keep_dense=False keeps the weights of one; "
            "make a library with that mask alone"
        )
    if not keep_dense and (gamma := next(iter(library.masks.values())).gamma):
        raise PersonafastError(
            f"keep_dense: the mask {next(iter(library.masks))!r} is soft, gamma {gamma:g}, and needs every weight; use "
            "keep_dense=True, or the mask's with_metadata(gamma=0)"
        )
    if policies is not None and model is not policies.model and model is not policies.reference:
        raise PersonafastError("policies: their reference is another model; attach to the one they were made from")
    only_mask = None if keep_dense else next(iter(library.masks))
    patch = Patch(model, parts, max_personas)
    return PersonaHandle(model, library, tokenizer, patch, policies, only_mask, _recorder(model, graphs))


def _recorder(model: nn.Module, graphs: bool | None) -> Any:
    device = next(model.parameters()).device
    if graphs is False or (graphs is None and device.type != "cuda"):
        return None
    from personafast.models.graphs import recorder

    return recorder(device)


class PersonaHandle:
    """A model with personas. Made by `attach`.

    Attributes:
        library: what the personas may name.
        model: the model they are attached to.
        cast: the banks, and the rows that personas make; for decoding loops of your own.
    """

    def __init__(
        self,
        model: nn.Module,
        library: PersonaLibrary,
        tokenizer: Any,
        patch: Patch,
        policies: PolicySet | None = None,
        only_mask: str | None = None,
        recorder: Any = None,
    ) -> None:
        self.model = model
        self.library = library
        self._tokenizer = tokenizer
        self._only_mask = only_mask
        self.cast = Cast(patch, library, policies, only_mask, lambda: self.tokenizer, recorder)
        self._forward_rows: contextlib.ExitStack | None = None
        self._scopes: list[PersonaScope] = []
        self._hooks: list[Any] = []
        self._note: GenerateNote | None = None
        try:
            self.cast.install()
            self._note = GenerateNote(model, patch.steering)
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
        if self._note is not None:
            self._note.remove()
        lost = self.cast.remove()
        self.model.__dict__.pop(_MARK, None)
        if lost:
            warnings.warn(
                f"detach: the dense weights were given up (keep_dense=False); the model keeps those of mask "
                f"{self._only_mask!r} and zeros elsewhere. Load it again for the rest",
                stacklevel=2,
            )

    @contextlib.contextmanager
    def using(
        self, personas: Persona | Sequence[Persona | None], prompt_lengths: Sequence[int] | None = None
    ) -> Iterator[PersonaScope]:
        """Let every forward pass inside the `with` carry these personas, one a row: for stock `generate` and training.

        Only vectors and masks act in a plain forward pass; density ratios need `generate`. A batch that is a multiple
        of the personas (beams, `num_return_sequences`) repeats each.

        Steps that act by position or schedule need to know where the prompts end. Inside of `model.generate` that is
        known; otherwise the pass with an empty cache holds the prompts, and nothing else, unless `prompt_lengths` says
        how many tokens they have, padding left out: give it where a pass holds prompt and response, as in training.

        Args:
            personas: one a row, None for the plain model, or one for all rows.
            prompt_lengths: tokens of every row's prompt.

        Returns:
            The scope, whose `set` changes the personas between passes.

        Raises:
            PersonafastError: a persona has policies or prompts, or names something the library lacks; a prompt length
                that is negative, or not one a row.
        """
        self._check_attached()
        scope = PersonaScope(self, personas, prompt_lengths)
        self._scopes.append(scope)
        try:
            yield scope
        finally:
            self._scopes.remove(scope)
            scope._rows.close()

    def speaking(self) -> contextlib.AbstractContextManager[None]:
        """Within this `with` the reference speaks without the PEFT adapters that are policies here.

        `generate` and `MPGLogitsProcessor` enter it by themselves.
        """
        self._check_attached()
        return contextlib.nullcontext() if self.cast.policies is None else self.cast.policies.bypass()

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
        chunk: int | None = None,
        draft: Any = "auto",
        draft_scale: float = 0.85,
        draft_doubt: float = 0.05,
        retries: int = 64,
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
            sampler: how to draw from the target.

                - "direct": every token exactly, one forward pass over reference and policies each.
                - "verify", "block": a draft of `chunk` tokens is scored at once, and as much of it stands as keeps the
                  text exact, token by token (arXiv 2211.17192) or as a block (arXiv 2403.10444), which keeps more.
                - "mixture": the linear rule. One policy, drawn by the weights, writes `chunk` tokens, or with `carry`
                  the whole text; exact for that chunk-level target. min_p and the temperature act on the policy that
                  speaks.
                - "token_rs": exact rejection sampling token by token, the baseline of arXiv 2511.01891.
                - "scr": that paper's chunks, approximate: the bound is estimated (`scr_options`).
                - "merge": the policies' weight updates added into one model, the baseline without ratios.
                - "auto": the cheapest exact one; `stats.notes` says why.

            seed: seed of the call; row r uses a hash of it and r. Default: drawn from torch's generator.
            seeds: the rows' own seeds instead.
            min_p: support mask of every row: keep a token whose probability under at least one member is at least
                this share of that member's largest. Default 0.05 for rows with policies or prompts, 0 for others.
                Rows that are one model (no ratios, or "merge") have stock min-p, after the temperature.
            policy_temperature: divides the logits of every member before the ratios; `temperature` acts on the target.
            carry: the ratios are those of the whole text so far, not of the next token alone. Under the linear rule one
                policy then speaks the whole text; the geometric rule is the same either way.
            chunk: tokens drafted by "verify" and "block" (default 8), spoken by one policy in "mixture" (default 1,
                the token-level target), proposed by "scr" (default 4). Only for the last two does the target depend
                on it.
            draft: what "verify" and "block" draft with: "reference" (or the persona's base), "merge", "ngram" (words
                that followed the last ones earlier in the row), a small model with the same vocabulary, or a `Drafter`.
                Any draft leaves the target as it is. "auto" takes the merge where the policies can be merged.
            draft_scale: a merge drafts with this share of the persona's weights. Updates that are added disturb each
                other, the more the more there are; a little less of them comes nearer to the target (docs/density.md).
            draft_doubt: a draft ends where it would rather be refused than stand, a token of probability p standing
                with p / (p + draft_doubt (1 - p)); 0 always drafts `chunk` tokens.
            retries: proposals of "token_rs" before the token is drawn from the target itself, which is as exact.
            scr_options: all of the open parameters of "scr"; overrides `chunk` and `carry` there.
            logits_processor: act on the target. "verify" and "block" call them at drafted places too, so they may hold
                no state there and must bear a text that they forbid.
            stop_strings: texts that end a row.
            streamer: a transformers streamer; give it through `bind`, `model.generate` keeps its own to itself.
            prepared: what transformers prepares for a decoding loop; `attention_mask` is used.

        Returns:
            int64 [B, L + new], or `PersonaGenerateOutput` with `return_dict_in_generate=True`.

        Raises:
            PersonafastError: naming the argument and the mend.
        """
        from personafast.density.stopping import StopStrings
        from personafast.generate import decode, row_prompts

        self._check_call(model, generation_config, prepared)
        processors: Any = logits_processor if logits_processor is not None else []
        scr = scr_options
        if scr is None:
            scr = ScrOptions(chunk=ScrOptions.chunk if chunk is None else chunk, carry=carry)
        options = Options(
            sampler=sampler,
            seed=seed,
            seeds=seeds,
            min_p=min_p,
            policy_temperature=policy_temperature,
            carry=carry,
            chunk=chunk,
            draft=draft,
            draft_scale=draft_scale,
            draft_doubt=draft_doubt,
            retries=retries,
            scr=scr,
        )
        criteria = list(stopping_criteria or ())
        if stop_strings:
            criteria.append(StopStrings(self.tokenizer, stop_strings))
        prompts = row_prompts(input_ids, prepared.get("attention_mask"))
        spread = self.cast.spread(personas, len(prompts), generation_config.num_return_sequences or 1)
        options = self._settle(options, spread, processors, generation_config)
        with self.speaking(), self._drafting(options.draft) as drafting:
            return decode(
                self.cast.patch,
                self.cast.rows(spread, prompts, options.sampler, drafting, options.draft_scale),
                input_ids,
                replace(options, draft=drafting),
                generation_config,
                processors,
                criteria,
                streamer,
            )

    def _settle(
        self, options: Options, personas: Sequence[Persona | None], processors: Sequence[Any], config: Any
    ) -> Options:
        """Decide what the caller left open."""
        given = [persona for persona in personas if persona is not None and persona.has_ratios]
        mergeable = bool(given) and all(self.cast.mergeable(persona) for persona in given)
        if options.sampler == "auto":
            from personafast.generate import processor_of_steps, warper_of_targets

            call = Call(
                rows=len(personas),
                members=1 + max((len(p.policies) + len(p.prompts) for p in given), default=0),
                ratios=bool(given),
                separate=any(self.cast.separate(persona) for persona in given),
                mixture=all(_is_mixture(persona) for persona in given),
                sampling=bool(config.do_sample),
                other_warpers=warper_of_targets(processors, config),
                mergeable=mergeable,
                by_row=self.cast.goes_on_by_row(given, int(config.max_length)),
            )
            choice = choose(call)
            options = replace(options, sampler=choice.sampler, notes=(choice.why,))
            stateful = processor_of_steps(processors)
            if choice.sampler == "block" and stateful is not None:
                why = f"auto: direct, since {stateful} must see every token once, and drafts show it others"
                options = replace(options, sampler="direct", notes=(why,))
        if options.sampler in ("verify", "block"):
            if isinstance(options.draft, str) and options.draft == "auto":
                options = replace(options, draft="merge" if mergeable else "reference")
        elif options.sampler != "merge":
            options = replace(options, draft="reference")
        return options

    @contextlib.contextmanager
    def _drafting(self, draft: Any) -> Iterator[Any]:
        """Let a draft model, if one is given, run through a patch."""
        if not isinstance(draft, nn.Module):
            if not isinstance(draft, str) and not all(hasattr(draft, name) for name in ("draft", "commit", "keep")):
                raise PersonafastError(
                    f"draft: expected one of {', '.join(DRAFTS)}, a model or a Drafter, got {type(draft).__name__}"
                )
            yield draft
            return
        known = self.cast.patch_of(draft)
        own = known or Patch(draft, anatomy(draft), 1)
        _check_vocabulary(own, self.cast.patch)
        try:
            if known is None:
                own.install()
            yield own
        finally:
            if known is None:
                own.remove()

    def _check_attached(self) -> None:
        if self.model.__dict__.get(_MARK) is not self:
            raise PersonafastError("personas: this handle is detached; attach again")

    def _check_call(self, model: Any, config: Any, prepared: dict[str, Any]) -> None:
        self._check_attached()
        self.cast.patch.parts.check_attention_only("personas")
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

    def _before_forward(self, _: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        personas, lengths = kwargs.pop("personas", None), kwargs.pop("prompt_lengths", None)
        if personas is None:
            if lengths is not None:
                raise PersonafastError("prompt_lengths: given without personas; leave it out, or give both")
            return None
        self._forward_rows = contextlib.ExitStack()
        self._forward_rows.enter_context(self.using(personas, lengths))
        return args, kwargs

    def _after_forward(self, *_: Any) -> None:
        if self._forward_rows is not None:
            rows, self._forward_rows = self._forward_rows, None
            rows.close()


class PersonaScope:
    """What `PersonaHandle.using` has put in force, until its `with` ends.

    Attributes:
        handle: the attached model.
    """

    def __init__(
        self,
        handle: PersonaHandle,
        personas: Persona | Sequence[Persona | None],
        prompt_lengths: Sequence[int] | None,
    ) -> None:
        self.handle = handle
        self._rows = contextlib.ExitStack()
        # Begun inside of a generation, of which a callback makes passes of its own.
        self._prompts = Prompts(outer=handle.cast.patch.steering.generation)
        self._personas: Persona | Sequence[Persona | None] = ()
        self._put(personas, prompt_lengths)

    def set(self, personas: Persona | Sequence[Persona | None], prompt_lengths: Sequence[int] | None = None) -> None:
        """From the next forward pass on carry these personas; other coefficients are another `Persona`.

        Prompts that an earlier pass of the scope held are remembered, so that personas may change while a text is
        written, between two passes over one cache.

        Args:
            personas: one a row, or one for all rows.
            prompt_lengths: tokens of every row's prompt; None leaves them as they were known.

        Raises:
            PersonafastError: as `PersonaHandle.using`, and those from before stay in force; or the `with` has ended, or
                has another one inside it.
        """
        scopes = self.handle._scopes
        if not scopes or scopes[-1] is not self:
            why = "another one is in force inside it" if self in scopes else "it has ended"
            raise PersonafastError(f"set: these personas belong to a `with personas.using(...)`, and {why}")
        # Their rows of the bank are those that the new ones may take.
        self._rows.close()
        try:
            self._put(personas, prompt_lengths)
        except BaseException:
            self._put(self._personas)
            raise

    def _put(self, personas: Persona | Sequence[Persona | None], prompt_lengths: Sequence[int] | None = None) -> None:
        prompts = self._prompts
        if isinstance(personas, Persona):
            rows = len(prompt_lengths) if isinstance(prompt_lengths, Sequence) else 1
            given: list[Persona | None] = [personas] * rows
        elif isinstance(personas, Sequence) and not isinstance(personas, str):
            given = list(personas)
        else:
            raise PersonafastError(f"personas: expected a Persona or one a row, got {type(personas).__name__}")
        if prompt_lengths is not None:
            prompts = Prompts(_prompt_lengths(prompt_lengths, len(given)))
        slots = self.handle.cast.plain_rows(given, prompts)
        self._rows.enter_context(self.handle.cast.patch.rows(slots))
        self._personas, self._prompts = given, prompts


def _prompt_lengths(given: Sequence[int], rows: int) -> list[int]:
    try:
        lengths = [operator.index(length) for length in given]
    except TypeError:
        raise PersonafastError(f"prompt_lengths: expected one whole number a row, got {given!r}") from None
    if len(lengths) != rows:
        raise PersonafastError(f"prompt_lengths: {len(lengths)} given for {rows} rows; give one a row")
    if min(lengths, default=0) < 0:
        raise PersonafastError(f"prompt_lengths: {min(lengths)} is negative; give the number of tokens")
    return lengths


def _is_mixture(persona: Persona) -> bool:
    weights = [*persona.policies.values(), *persona.prompts.values()]
    return persona.aggregator == "linear" and persona.base is None and min(weights) >= 0


def _check_vocabulary(draft: Patch, target: Patch) -> None:
    sizes = [patch.parts.shape.vocab_size for patch in (draft, target)]
    if sizes[0] != sizes[1]:
        raise PersonafastError(
            f"draft: the model has a vocabulary of {sizes[0]} tokens, the reference one of {sizes[1]}; give one that "
            "shares the reference's tokenizer"
        )
