"""Named policies over one reference, in memory: adapters of a PEFT model, separate checkpoints, system prompts."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from personafast.density.lora import LoraPolicy
from personafast.density.peft_lora import live_policies
from personafast.errors import PersonafastError, UnsupportedModelError
from personafast.models.anatomy import Anatomy, anatomy
from personafast.models.checkpoint import load_model, local_tokenizer
from personafast.models.merged import check_mergeable, merge_models
from personafast.models.wrappers import bypass, unwrapped, wrapped_layers

KINDS = ("adapter", "model", "prompt")
# Merged models kept; each may hold as many weights as the reference.
_MERGED = 2


@dataclass(frozen=True, eq=False)
class Policy:
    """One member of a set: a distribution pi_i over the reference's vocabulary.

    Attributes:
        name: what `Persona(policies={name: weight})` calls it.
        kind: "adapter", "model" or "prompt".
        lora: the low-rank change of the reference, of an adapter.
        model: the checkpoint, of a separate model.
        prompt: the system text that the member sees; of a prompt policy, all that sets it apart.
    """

    name: str
    kind: str
    lora: LoraPolicy | None = None
    model: nn.Module | None = None
    prompt: str | None = None


class PolicySet:
    """Named policies pi_i over one reference pi_0. Made by `from_adapters`, `from_models`, `from_prompts` and `|`.

    A library holds what is on disk; this holds what is in memory. A set does not change after it was made.

    Attributes:
        model: what `generate` is called on: the PEFT wrapper where there is one.
        reference: the transformers model inside. Where the set has adapters, pi_0 is this model without any of them;
            otherwise it is the model as it speaks, with an adapter that is active in it.
        members: name -> `Policy`.

    Example:
        >>> judge = PolicySet.from_models(model, {"judge": "checkpoints/judge"})
        >>> policies = (judge | PolicySet.from_prompts(model, {"pirate": "You are a pirate."}))
        >>> with pf.attach(model, policies=policies, tokenizer=tokenizer) as personas:
        ...     out = model.generate(**batch, custom_generate=personas.generate,
        ...                          personas=pf.Persona(policies={"judge": 1.0, "pirate": 0.5}))
    """

    def __init__(self, model: Any, members: Sequence[Policy]) -> None:
        self.model = model
        self.reference = unwrapped(model)
        self.members: Mapping[str, Policy] = MappingProxyType({member.name: member for member in members})
        self._merges: dict[Any, nn.Module] = {}

    @classmethod
    def from_adapters(cls, model: Any, names: Sequence[str] | None = None) -> PolicySet:
        """Policies out of LoRA adapters that a live model holds, of any ranks, scales and target modules.

        The factors are copied: training that goes on afterwards does not reach the set.

        Args:
            model: a `PeftModel`, or a transformers model with adapters of its own (`add_adapter`, `load_adapter`).
            names: which adapters; all of them by default.

        Raises:
            PersonafastError: an unknown name; an adapter that is merged into the base, has changed its weights
                (PiSSA and kin), is more than plain LoRA (DoRA, biases, saved modules), or adapts other modules than
                the linears of the blocks.
        """
        chosen = [names] if isinstance(names, str) else names
        if chosen is not None and not len(chosen):
            raise PersonafastError("names: empty; name at least one adapter, or leave it out for all of them")
        inner = unwrapped(model)
        policies = live_policies(model, inner, _decoder(inner), chosen)
        return cls(model, [Policy(name, "adapter", lora=lora) for name, lora in policies.items()])

    @classmethod
    def from_models(
        cls,
        reference: Any,
        models: Mapping[str, Any] | Sequence[Any],
        *,
        names: Sequence[str] | None = None,
        tokenizers: Mapping[str, Any] | Sequence[Any] | None = None,
        reference_tokenizer: Any = None,
    ) -> PolicySet:
        """Policies that are separate checkpoints, trained from the reference or at least over its vocabulary.

        Tokenizers are compared where both are known: given here, or saved in the models' own local folders. Nothing is
        looked up on the network.

        Args:
            reference: pi_0, a transformers causal LM.
            models: name -> model or local folder; or a sequence of them with `names`. A folder is loaded at the
                reference's dtype and device.
            names: of a sequence's models; a folder's name by default.
            tokenizers: of the models, by name or in their order.
            reference_tokenizer: of the reference.

        Raises:
            FormatError: a folder is missing or does not hold a whole causal LM in safetensors.
            UnsupportedModelError: a model is no causal decoder.
            PersonafastError: vocabularies, tokenizers or devices differ, or a model is built around the reference.
        """
        given = _named(models, names)
        known = _tokenizers(given, tokenizers)
        inner = unwrapped(reference)
        parts = _decoder(inner)
        # A tokenizer loads much faster than a model: what can be refused by it is refused first.
        first = reference_tokenizer if reference_tokenizer is not None else local_tokenizer(inner)
        members = []
        for name, model in given.items():
            own = known.get(name)
            _check_tokenizer(name, own if own is not None else local_tokenizer(model), first)
            if isinstance(model, (str, Path)):
                model = load_model(f"models[{name!r}]", Path(model), like=inner)
            _check_model(name, model, inner, parts)
            members.append(Policy(name, "model", model=model))
        return cls(reference, members)

    @classmethod
    def from_prompts(cls, model: Any, prompts: Mapping[str, str]) -> PolicySet:
        """Policies that are the model itself under a system text, r_i = pi(. | text_i, Y) / pi(. | Y); no training.

        Args:
            model: a transformers causal LM with a chat template, PEFT-wrapped or not.
            prompts: name -> system text. (`Persona.prompts` is keyed by the text.)

        Raises:
            PersonafastError: a name or a text is empty.
        """
        _decoder(unwrapped(model))
        given = _texts(prompts)
        return cls(model, [Policy(name, "prompt", prompt=text) for name, text in given.items()])

    def with_prompts(self, prompts: Mapping[str, str]) -> PolicySet:
        """The set with system texts for some members, which they see in addition to what sets them apart.

        A policy that was trained under a persona prompt speaks as it should only when it sees that prompt. A member's
        earlier text is replaced.

        Raises:
            PersonafastError: a name that is not in the set, or an empty text.
        """
        given = _texts(prompts)
        for name in given:
            self._check_name("prompts", name)
        members = [replace(m, prompt=given[m.name]) if m.name in given else m for m in self.members.values()]
        return PolicySet(self.model, members)

    def __or__(self, other: PolicySet) -> PolicySet:
        """The members of both; they need one reference and different names."""
        if not isinstance(other, PolicySet):
            return NotImplemented
        if self.reference is not other.reference:
            raise PersonafastError(
                "policies: the two sets have different references; make both from the same model object"
            )
        for name in self.members:
            if name in other.members:
                raise PersonafastError(f"policies: both sets have a policy {name!r}; give one of them another name")
        model = self.model if self.model is not self.reference else other.model
        return PolicySet(model, [*self.members.values(), *other.members.values()])

    def __getitem__(self, name: str) -> Policy:
        self._check_name("policies", name)
        return self.members[name]

    def __len__(self) -> int:
        return len(self.members)

    def __iter__(self) -> Iterator[str]:
        return iter(self.members)

    def __contains__(self, name: object) -> bool:
        return name in self.members

    def __repr__(self) -> str:
        groups = []
        for kind in KINDS:
            found = [
                member.name + (" (with a system text)" if member.prompt and kind != "prompt" else "")
                for member in self.members.values()
                if member.kind == kind
            ]
            if found:
                groups.append(f"{kind}s: {', '.join(found)}")
        return f"PolicySet({'; '.join(groups) or 'empty'}; reference: {type(self.reference).__name__})"

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The separate models, each once."""
        return tuple({id(m.model): m.model for m in self.members.values() if m.model is not None}.values())

    def bypass(self) -> AbstractContextManager[None]:
        """Within this `with` the reference speaks without the adapters it holds, where the set has adapters.

        The same numbers as PEFT's `disable_adapter()`, for less: no flags and no checks a layer. A set without
        adapters leaves the model as it speaks. Enter it around a whole generation; it may be nested.

        Raises:
            PersonafastError: an adapter has been merged into the base since.
        """
        if any(member.kind == "adapter" for member in self.members.values()):
            return bypass(self.reference)
        return contextlib.nullcontext()

    def merged(self, weights: Mapping[str, float]) -> nn.Module:
        """theta_0 + sum_i alpha_i (theta_i - theta_0) of separate models: the baseline without ratios, and a draft.

        A new model, on the reference's device and in its dtype; parameters that no model changes are the reference's
        own. System texts of the members have no part in it. The last two weightings are kept, for as long as no
        parameter is changed.

        Args:
            weights: name -> alpha_i; members that are not named have none.

        Raises:
            PersonafastError: an unknown name, a weight that is not finite, a member of non-zero weight that is no
                separate model, adapters in the reference, or models that differ in their parameters.
        """
        if not isinstance(weights, Mapping):
            raise PersonafastError(f"weights: expected a mapping of name to number, got {type(weights).__name__}")
        checked: dict[str, float] = {}
        for name, weight in weights.items():
            self._check_name("weights", name)
            if not isinstance(weight, Real) or not math.isfinite(weight):
                raise PersonafastError(f"weights[{name!r}]: {weight!r} is not a finite number")
            if weight and self.members[name].kind != "model":
                raise PersonafastError(
                    f"merged: {name!r} is {_article(self.members[name].kind)}, and only separate models add up to "
                    "another; sampler='merge' adds adapters, and a prompt has no weights"
                )
            if weight:
                checked[name] = float(weight)
        if next(wrapped_layers(self.reference), None) is not None:
            raise PersonafastError("merged: the reference holds PEFT adapters; make the set from the plain model")
        models = {name: (self._model(name), weight) for name, weight in sorted(checked.items())}
        weighted = tuple((name, alpha, _state(model)) for name, (model, alpha) in models.items())
        key = (_state(self.reference), weighted)
        found = self._merges.pop(key, None)
        if found is None:
            while len(self._merges) >= _MERGED:
                del self._merges[next(iter(self._merges))]
            found = merge_models(self.reference, models)
        self._merges[key] = found  # the last used stands last
        return found

    def can_merge(self, names: Iterable[str]) -> bool:
        """Whether `merged` can add these members, which need not be of the reference's architecture."""
        if next(wrapped_layers(self.reference), None) is not None:
            return False
        try:
            check_mergeable(self.reference, {name: self._model(name) for name in names})
        except PersonafastError:
            return False
        return True

    def _model(self, name: str) -> nn.Module:
        model = self.members[name].model
        assert model is not None
        return model

    def _check_name(self, what: str, name: str) -> None:
        if name not in self.members:
            listing = ", ".join(sorted(self.members)) or "none"
            raise PersonafastError(f"{what}: no policy {name!r} in the set; there are: {listing}")


def _named(given: Mapping[str, Any] | Sequence[Any], names: Sequence[str] | None) -> dict[str, Any]:
    if isinstance(given, Mapping):
        if names is not None:
            raise PersonafastError("names: models has names already; leave them out")
        return _usable("models", given)
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise PersonafastError(f"models: expected a mapping by name or a sequence, got {type(given).__name__}")
    if names is None:
        names = [Path(item).name if isinstance(item, (str, Path)) else "" for item in given]
        if not all(names):
            raise PersonafastError(f"names: models[{names.index('')}] has no name; give names=, or a mapping by name")
    if len(names) != len(given):
        raise PersonafastError(f"names: {len(names)} given for {len(given)} models; give every model one")
    if len(set(names)) != len(names):
        raise PersonafastError(f"names: {', '.join(names)} are not all different; give every model one of its own")
    return _usable("models", dict(zip(names, given, strict=True)))


def _usable(what: str, given: Mapping[str, Any]) -> dict[str, Any]:
    if not given:
        raise PersonafastError(f"{what}: empty; name at least one policy")
    for name in given:
        if not isinstance(name, str) or not name.strip():
            raise PersonafastError(f"{what}: {name!r} is not a usable name; give a text that is not empty")
    return dict(given)


def _texts(prompts: Mapping[str, str]) -> dict[str, str]:
    if not isinstance(prompts, Mapping):
        raise PersonafastError(f"prompts: expected a mapping of name to system text, got {type(prompts).__name__}")
    for name, text in _usable("prompts", prompts).items():
        if not isinstance(text, str) or not text.strip():
            raise PersonafastError(f"prompts[{name!r}]: the system text is empty; write what the persona is")
    return dict(prompts)


def _tokenizers(models: Mapping[str, Any], given: Mapping[str, Any] | Sequence[Any] | None) -> dict[str, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        if len(given) != len(models):
            raise PersonafastError(f"tokenizers: {len(given)} given for {len(models)} models; give one a model")
        return dict(zip(models, given, strict=True))
    for name in given:
        if name not in models:
            raise PersonafastError(f"tokenizers: no model {name!r}; there are: {', '.join(sorted(models))}")
    return dict(given)


def _check_tokenizer(name: str, own: Any, reference: Any) -> None:
    if own is None or reference is None or own is reference:
        return
    theirs, ours = own.get_vocab(), reference.get_vocab()
    if theirs == ours:
        return
    token = min(theirs.items() ^ ours.items(), key=lambda item: (item[1], item[0]))[0]
    raise PersonafastError(
        f"models[{name!r}]: its tokenizer is not the reference's: token {token!r} is {theirs.get(token, 'none')} there "
        f"and {ours.get(token, 'none')} in the reference; use a policy trained from this reference"
    )


def _decoder(model: Any) -> Anatomy:
    """The parts of a model that a policy's ratio can be taken of."""
    parts = anatomy(model)
    parts.check_attention_only("model")
    return parts


def _check_model(name: str, model: Any, reference: nn.Module, expected: Anatomy) -> None:
    if not isinstance(model, nn.Module):
        raise PersonafastError(f"models[{name!r}]: expected a model or a local folder, got {type(model).__name__}")
    try:
        parts = _decoder(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"models[{name!r}]: {str(error).removeprefix('model: ')}") from None
    if model is reference:
        warnings.warn(
            f"models[{name!r}]: this is the reference itself, whose ratio is 1 everywhere", UserWarning, stacklevel=3
        )
    elif parts.blocks[0] is expected.blocks[0]:
        raise PersonafastError(
            f"models[{name!r}]: shares its layers with the reference; use PolicySet.from_adapters for adapters on one "
            "model, or load the checkpoint a second time"
        )
    for what, theirs, ours in (
        ("a vocabulary of", parts.shape.vocab_size, expected.shape.vocab_size),
        ("logits over", _width(model), _width(reference)),
    ):
        if theirs is not None and ours is not None and theirs != ours:
            raise PersonafastError(
                f"models[{name!r}]: {what} {theirs} tokens, the reference has {ours}; use a policy trained from this "
                "reference (or resize_token_embeddings where only the padding differs)"
            )
    theirs_at, ours_at = _device(f"models[{name!r}]", model), _device("reference", reference)
    if theirs_at != ours_at:
        raise PersonafastError(
            f"models[{name!r}]: on {theirs_at}, the reference on {ours_at}; move it with .to({str(ours_at)!r})"
        )


def _width(model: Any) -> int | None:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None


def _device(what: str, model: nn.Module) -> torch.device:
    for path, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UnsupportedModelError(
                f"{what}: {path} is not in memory (meta: offloaded or not loaded); load the model whole"
            )
    return next(model.parameters()).device


def _state(model: nn.Module) -> tuple[tuple[int, int], ...]:
    """What tells that a parameter has been written to or exchanged."""
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())


def _article(kind: str) -> str:
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
