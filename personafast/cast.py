"""Who speaks in each row: personas become members of a model's banks, of other models, and of a row's target."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from personafast.density.lora import LoraPolicy
from personafast.density.model_scorer import Member
from personafast.density.prompting import SystemPrompts
from personafast.errors import PersonafastError
from personafast.library import PersonaLibrary
from personafast.models.anatomy import anatomy
from personafast.models.context import goes_on_by_row
from personafast.models.patch import Patch
from personafast.models.places import Prompts
from personafast.models.rows import NOBODY, RowSlots
from personafast.models.steps import Steps
from personafast.persona import Persona
from personafast.recipes import place
from personafast.row import Row

if TYPE_CHECKING:
    from personafast.policies import Policy, PolicySet

# Merged policies kept in the banks; each holds the concatenated ranks of what it merges.
_MERGED = 8
# Merged models kept beside the separate ones; each is a whole set of weights.
_MERGED_MODELS = 2
Key = tuple[tuple[str, float], ...]


class Cast:
    """The banks of one attached model, and the rows that its personas make.

    Args:
        patch: the model with its banks.
        library: vectors, masks and LoRA policies.
        policies: policies in memory beside the library's, or None.
        only_mask: the mask whose weights are all there is (keep_dense=False), or None.
        tokenizer: gives the tokenizer, for prompts.
        recorder: what records passes of the models, or None: see `Patch.use_graphs`.
    """

    def __init__(
        self,
        patch: Patch,
        library: PersonaLibrary,
        policies: PolicySet | None,
        only_mask: str | None,
        tokenizer: Callable[[], Any],
        recorder: Any = None,
    ) -> None:
        self.patch = patch
        self._recorder = recorder
        self.library = library
        self.policies = policies
        self.only_mask = only_mask
        self._tokenizer = tokenizer
        self._kept = None if only_mask is None else library.masks[only_mask]
        self._prompts: SystemPrompts | None = None
        self._adapter_names: list[str] = []
        self._merged: dict[Key, int] = {}
        self._models: dict[int, Patch] = {}
        self._merged_models: dict[Key, Patch] = {}
        self._addable: dict[str, bool] = {}
        self._seen: int | None = None

    def install(self) -> None:
        """Plug into the model and, for separate policies, into theirs."""
        self.patch.install()
        self.patch.use_graphs(self._recorder)
        if self.only_mask is not None:
            self.patch.compress(self.library.masks[self.only_mask].words)
        for policy in self._members.values():
            if policy.model is not None and id(policy.model) not in self._models:
                self._models[id(policy.model)] = _installed(policy.model, self._recorder)
        self.refresh()

    def remove(self) -> bool:
        """Take everything out again; whether dense weights had been given up."""
        for patch in [*self._models.values(), *self._merged_models.values()]:
            patch.remove()
        self._models.clear()
        self._merged_models.clear()
        return self.patch.remove()

    def refresh(self) -> None:
        """Fill the banks with the masks and policies that are in the library now."""
        if self._seen == self.library.version:
            return
        self.library.check(self.patch.parts)
        if self.only_mask is not None and self.library.masks[self.only_mask] is not self._kept:
            raise PersonafastError(
                f"masks[{self.only_mask!r}]: another mask now, but only the weights of the one before were kept "
                "(keep_dense=False); load the model again and attach"
            )
        for name in self._members:
            if name in self.library.policies:
                raise PersonafastError(
                    f"policies[{name!r}]: the library has a policy of that name too; rename one of them"
                )
        in_memory = [name for name, policy in self._members.items() if policy.lora is not None]
        for name in in_memory:
            self._lora(name).check(name, self.patch.parts)
        names = [*sorted(self.library.policies), *in_memory]
        self._adapter_names += [name for name in names if name not in self._adapter_names]
        self._merged = {}
        if self.only_mask is None:
            self._hold_masks()
        self._fill_adapters()
        self._seen = self.library.version

    def spread(self, personas: Any, rows: int, repeats: int = 1) -> list[Persona | None]:
        """One persona a row, from one for all, one a row, or one for each `repeats` rows that follow each other."""
        self.refresh()
        given = list(personas) if isinstance(personas, Sequence) and not isinstance(personas, str) else [personas]
        if len(given) not in {1, rows, rows // repeats}:
            raise PersonafastError(
                f"personas: {len(given)} given for {rows // repeats} rows; give one a row (None for the plain model)"
            )
        for persona in given:
            if persona is not None and not isinstance(persona, Persona):
                raise PersonafastError(f"personas: expected Persona or None, got {type(persona).__name__}")
            self._check_only_mask(persona)
            if persona is not None:
                self.library.check_persona(persona, self._members)
                self._check_mechanisms(persona)
        mixtures = {tuple(sorted(persona.mask_shares.items())) for persona in given if persona is not None}
        self.patch.masks.mixtures.check_room(sum(len(parts) > 1 for parts in mixtures))
        # num_return_sequences repeats each row in place.
        return [persona for persona in given for _ in range(rows // len(given))]

    def separate(self, persona: Persona) -> bool:
        """Whether a policy of the persona is a model of its own."""
        return any(self._is_model(name) for name in _named(persona))

    def goes_on_by_row(self, personas: Iterable[Persona], length: int) -> bool:
        """Whether rows of these personas, of up to `length` tokens, may accept different numbers of tokens."""
        models = {id(self.patch): self.patch.model}
        for persona in personas:
            for name in _named(persona):
                model = self._members[name].model if name in self._members else None
                if model is not None:
                    models[id(model)] = model
        return all(goes_on_by_row(model, length) for model in models.values())

    def mergeable(self, persona: Persona) -> bool:
        """Whether the persona's policies, prompts left aside, can be added into one set of weights."""
        return self._of_one_kind(persona) and all(self._can_add(name) for name, _ in self._merge_key(persona, 1.0))

    def rows(
        self,
        personas: Sequence[Persona | None],
        prompts: Sequence[list[int]],
        sampler: str,
        draft: str | Patch,
        draft_scale: float = 1.0,
    ) -> list[Row]:
        """What decoding needs of every row.

        Args:
            personas: one a row.
            prompts: token ids a row, without padding.
            sampler: "merge" makes one member of each row.
            draft: "merge" gives the rows that can be merged that draft, a patch all rows the model in it.
            draft_scale: share of the weights that a merge drafts with.
        """
        merging = draft == "merge" or sampler == "merge"
        if merging:
            scale = 1.0 if sampler == "merge" else draft_scale
            self._merge_all([persona for persona in personas if persona is not None], scale, strict=sampler == "merge")
        all_steps = self.steps(personas)
        rows = []
        for persona, prompt, steps in zip(personas, prompts, all_steps, strict=True):
            persona = persona or Persona()
            merged = self._merged_member(persona, prompt, steps, scale) if merging else None
            if sampler == "merge":
                reference = Member(prompt, steps, self._mask_slot(persona), NOBODY)
                rows.append(Row(merged or reference, (), (), persona.has_ratios))
                continue
            if isinstance(draft, Patch):
                merged = Member(prompt, (), NOBODY, NOBODY, draft, "the draft model")
            rows.append(self._row(persona, prompt, steps, merged))
        return rows

    def plain_rows(self, personas: Sequence[Persona | None], prompts: Prompts | None = None) -> RowSlots:
        """What rows carry in plain forward passes, where ratios cannot act."""
        given = self.spread(personas, len(personas))
        for persona in given:
            if persona is not None and persona.has_ratios:
                raise PersonafastError(
                    "personas: policies and prompts act through generate(custom_generate=personas.generate); a plain "
                    "forward pass takes vectors and masks only"
                )
        masks = [NOBODY if persona is None else self._mask_slot(persona) for persona in given]
        return RowSlots.of(self.steps(given), masks, [NOBODY] * len(given), prompts)

    def patch_of(self, model: nn.Module) -> Patch | None:
        """The patch of the reference's model or of a separate policy's, or None for another model."""
        return self.patch if model is self.patch.model else self._models.get(id(model))

    def steps(self, personas: Sequence[Persona | None]) -> list[Steps]:
        """The steps of every row; blends that are not in the banks are put there."""
        return place(personas, self.library.vectors, self.patch.steering)

    @property
    def _members(self) -> Mapping[str, Policy]:
        return self.policies.members if self.policies is not None else {}

    def _is_model(self, name: str) -> bool:
        return name in self._members and self._members[name].model is not None

    def _is_prompt(self, name: str) -> bool:
        return name in self._members and self._members[name].kind == "prompt"

    def _lora(self, name: str) -> LoraPolicy:
        found = self._members[name].lora if name in self._members else self.library.policies[name]
        assert found is not None
        return found

    def _check_only_mask(self, persona: Persona | None) -> None:
        if self.only_mask is None or (persona is not None and list(persona.mask_shares) == [self.only_mask]):
            return
        what = "a mixture of masks" if persona is not None and len(persona.mask_shares) > 1 else persona
        raise PersonafastError(
            f"personas: {what} does not speak through mask {self.only_mask!r}, but only its weights were "
            f"kept (keep_dense=False); give Persona(mask={self.only_mask!r}) or attach with keep_dense=True"
        )

    def _check_mechanisms(self, persona: Persona) -> None:
        names = [name for name in _named(persona) if self._is_model(name)]
        if names and (persona.mask is not None or persona.steps):
            raise PersonafastError(
                f"personas: policies[{names[0]!r}] is a model of its own, which vectors and masks of the reference "
                "cannot reach; leave them out, or use LoRA policies"
            )

    def _row(self, persona: Persona, prompt: list[int], steps: Steps, draft: Member | None) -> Row:
        mask = self._mask_slot(persona)
        members, weights = [], []
        for name, weight in persona.policies.items():
            if weight:
                members.append(self._policy(name, prompt, steps, mask))
                weights.append(weight)
        for text, weight in persona.prompts.items():
            if weight:
                ids = self._system_prompts().insert(prompt, text)
                members.append(Member(ids, steps, mask, NOBODY, None, f"prompts[{text!r}]"))
                weights.append(weight)
        base = None if persona.base is None else self._policy(persona.base, prompt, steps, mask)
        reference = Member(prompt, steps, mask, NOBODY)
        return Row(reference, members, weights, persona.has_ratios, persona.aggregator, persona.p, base, draft)

    def _policy(self, name: str, prompt: list[int], steps: Steps, mask: int) -> Member:
        text = self._members[name].prompt if name in self._members else None
        if text is not None:
            prompt = self._system_prompts().insert(prompt, text)
        label = f"policies[{name!r}]"
        if self._is_model(name):
            model = self._members[name].model
            return Member(prompt, (), NOBODY, NOBODY, self._models[id(model)], label)
        adapter = NOBODY if self._is_prompt(name) else self._adapter_names.index(name)
        return Member(prompt, steps, mask, adapter, None, label)

    def _mask_slot(self, persona: Persona) -> int:
        shares = persona.mask_shares
        # A mask whose weights are all there is needs no slot.
        if not shares or self.only_mask is not None:
            return NOBODY
        if len(shares) == 1:
            return self.patch.masks.slots[next(iter(shares))]
        return self.patch.mixture(sorted(shares.items()))

    def _system_prompts(self) -> SystemPrompts:
        if self._prompts is None:
            self._prompts = SystemPrompts(self._tokenizer())
        return self._prompts

    def _hold_masks(self) -> None:
        self.patch.set_masks(self.library.masks)
        for name, mask in self.library.masks.items():
            words = self.patch.masks.words_of(name)
            if words is not None:
                mask.rest_on(words)

    def _fill_adapters(self) -> None:
        adapters = [
            {path: (f.a, f.b, f.scale) for path, f in self._lora(name).factors.items()} for name in self._adapter_names
        ]
        for key in self._merged:
            adapters.append(self._merge(key))
        self.patch.set_adapters(adapters)

    def _merge_all(self, personas: Iterable[Persona], scale: float, strict: bool) -> None:
        """See that every persona's merged policy is at hand; the oldest ones leave when they are too many.

        `strict` refuses what has no weights to add; otherwise that is left out of the merge.
        """
        needed: list[Key] = []
        of_models: list[Key] = []
        for persona in personas:
            if strict and (any(persona.prompts.values()) or any(map(self._is_prompt, _named(persona)))):
                raise PersonafastError("sampler: 'merge' adds weights, and prompts have none; use 'direct'")
            if strict and persona.base is not None:
                raise PersonafastError("sampler: 'merge' has no base; leave Persona(base=...) out or use 'direct'")
            if not self._of_one_kind(persona):
                if strict and any(persona.policies.values()):
                    raise PersonafastError(
                        "sampler: 'merge' cannot add LoRA policies to separate models; use policies of one kind"
                    )
                continue
            if not strict and not self.mergeable(persona):
                continue
            key = self._merge_key(persona, scale)
            (of_models if self._of_models(dict(key)) else needed).append(key)
        of_models = list(dict.fromkeys(of_models))
        # A draft may be any model: rows beyond the merges that are kept have the reference's.
        self._merge_models(of_models if strict else of_models[:_MERGED_MODELS])
        needed = list(dict.fromkeys(needed))
        if all(key in self._merged for key in needed):
            return
        kept = [key for key in self._merged if key not in needed]
        keys = kept[max(0, len(kept) + len(needed) - _MERGED) :] + needed
        self._merged = {key: len(self._adapter_names) + slot for slot, key in enumerate(keys)}
        self._fill_adapters()

    def _of_one_kind(self, persona: Persona) -> bool:
        names = [name for name, weight in persona.policies.items() if weight and not self._is_prompt(name)]
        return bool(names) and len({self._is_model(name) for name in names}) == 1

    def _can_add(self, name: str) -> bool:
        """Whether a policy's weights fit the reference's; a separate model's may be of another architecture."""
        if not self._is_model(name):
            return True
        if name not in self._addable:
            assert self.policies is not None
            self._addable[name] = self.policies.can_merge([name])
        return self._addable[name]

    def _merge_key(self, persona: Persona, scale: float) -> Key:
        weights = {name: weight for name, weight in persona.policies.items() if weight and not self._is_prompt(name)}
        base = persona.base
        if base is not None and not self._is_prompt(base) and self._is_model(base) == self._of_models(weights):
            # What stands in front of the ratios is one more update at full weight, if it is of the same kind.
            weights[base] = weights.get(base, 0.0) + 1.0
        return tuple(sorted((name, scale * weight) for name, weight in weights.items()))

    def _of_models(self, names: Iterable[str]) -> bool:
        # Not `separate`: a base may be a model of its own beside LoRA policies.
        return any(self._is_model(name) for name in names)

    def _merge_models(self, keys: Sequence[Key]) -> None:
        """See that these merges of separate models, made of the weights that those have now, are at hand."""
        for old in [key for key in self._merged_models if key not in keys]:
            if len(self._merged_models.keys() | set(keys)) > _MERGED_MODELS:
                self._merged_models.pop(old).remove()
        for key in keys:
            assert self.policies is not None
            model = self.policies.merged(dict(key))
            known = self._merged_models.get(key)
            if known is not None and known.model is model:
                continue
            if known is not None:
                known.remove()
            self._merged_models[key] = _installed(model, self._recorder)

    def _merged_member(self, persona: Persona, prompt: list[int], steps: Steps, scale: float) -> Member | None:
        if not self.mergeable(persona):
            return None
        mask, key = self._mask_slot(persona), self._merge_key(persona, scale)
        if key in self._merged_models:
            return Member(prompt, (), NOBODY, NOBODY, self._merged_models[key], "the merge")
        if self._of_models(dict(key)):
            return None
        return Member(prompt, steps, mask, self._merged[key], None, "the merge")

    def _merge(self, key: Key) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
        """sum_i alpha_i s_i B_i A_i as one adapter: A and B side by side, so nothing is approximated."""
        policies = [(self._lora(name), weight) for name, weight in key]
        merged = {}
        for path in sorted({path for policy, _ in policies for path in policy.factors}):
            parts = [(policy.factors[path], weight) for policy, weight in policies if path in policy.factors]
            a = torch.cat([f.a.float() for f, _ in parts])
            b = torch.cat([f.b.float() * (weight * f.scale) for f, weight in parts], dim=1)
            merged[path] = (a, b, 1.0)
        return merged


def _named(persona: Persona) -> list[str]:
    """Names of the policies that take part."""
    names = [name for name, weight in persona.policies.items() if weight]
    return names if persona.base is None else [*names, persona.base]


def _installed(model: nn.Module, recorder: Any) -> Patch:
    patch = Patch(model, anatomy(model), 1)
    patch.install()
    patch.use_graphs(recorder)
    return patch
