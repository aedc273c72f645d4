"""One comparison for all methods: the same questions, sampling settings and number of replies for each.

Nothing here knows the zoo: model, traits and the grammar check are handed in, so the same table can be had for any
model whose traits have detectors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from personafast.errors import PersonafastError
from personafast.evaluate.chat import encode
from personafast.evaluate.intervals import newcombe_difference, wilson
from personafast.handle import attach
from personafast.library import PersonaLibrary
from personafast.persona import Persona

METHOD_NAMES = ("reference", "policy", "prompt", "vectors", "mask", "merge", "linear", "scr", "direct")


class Trait(Protocol):
    """A trait with a programmatic detector."""

    @property
    def prompt(self) -> str:
        """The system prompt that asks for the trait."""

    def detect(self, text: str) -> bool:
        """Whether `text` shows the trait."""

    def spans(self, text: str) -> Sequence[tuple[int, int]]:
        """The (start, end) character positions that show it."""


@dataclass(frozen=True)
class Method:
    """One row of the table: who speaks, and by which sampler."""

    name: str
    persona: Persona | None
    sampler: str
    how: str


def methods(
    chosen: Sequence[str], prompts: Mapping[str, str], *, alpha: float, mask: str, coefficient: float
) -> list[Method]:
    """The nine methods of the comparison, in the order of `METHOD_NAMES`.

    Args:
        chosen: traits that every blend should show at once; each names a vector and a policy of the library.
        prompts: system prompt of each trait.
        alpha: weight of every density ratio.
        mask: the one mask of the `mask` method; masks are not blended.
        coefficient: weight of every persona vector.
    """
    policies = {name: alpha for name in chosen}
    first = chosen[0]
    return [
        Method("reference", None, "direct", "the model as it is"),
        Method("policy", Persona(policies={first: alpha}), "direct", f"one policy alone: {first}"),
        Method(
            "prompt",
            Persona(prompts={prompts[name]: alpha for name in chosen}),
            "direct",
            "system prompts, geometric rule",
        ),
        Method(
            "vectors", Persona(vectors={name: coefficient for name in chosen}), "direct", "sum of the persona vectors"
        ),
        Method("mask", Persona(mask=mask), "direct", f"one persona mask: {mask}"),
        Method("merge", Persona(policies=policies), "merge", "policies merged into one set of weights"),
        Method("linear", Persona(policies=policies, aggregator="linear"), "direct", "linear rule, token by token"),
        Method("scr", Persona(policies=policies, aggregator="linear"), "scr", "linear rule, chunk by chunk"),
        Method("direct", Persona(policies=policies), "direct", "geometric rule, token by token"),
    ]


def measure(
    model: Any,
    tokenizer: Any,
    library: PersonaLibrary,
    *,
    chosen: Sequence[str],
    traits: Mapping[str, Trait],
    questions: Sequence[str],
    is_grammatical: Callable[[str], bool],
    alpha: float = 1.0,
    coefficient: float = 1.0,
    mask: str | None = None,
    min_p: float = 0.05,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    samples: int = 2,
    progress: Callable[[str], None] = lambda name: None,
) -> dict[str, Any]:
    """Answer every question by every method and count which traits show.

    All replies of a method are one batch. Everything but the timings is a function of the arguments.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer, with a chat template.
        library: vectors, masks and policies named after the traits.
        chosen: names of at least two traits, each with a vector and a policy in the library.
        traits: detectors by name; holds at least the chosen ones.
        questions: one user message a reply.
        is_grammatical: judges fluency, independent of the traits.
        alpha: weight of every density ratio.
        coefficient: weight of every persona vector.
        mask: mask of the `mask` method; by default the first chosen trait that has one.
        min_p: support mask, the same for every method.
        temperature: of the target, the same for every method.
        max_new_tokens: longest reply.
        seed: of the draws, the same for every method.
        samples: the first replies of each method to keep, unselected.
        progress: called with each method's name before it runs.

    Returns:
        {"chosen", "settings", "methods": [{"name", "traits": {name: {"rate", "low", "high"}}, "joint": {...},
        "grammar", "tokens_per_s", "forwards_per_token", "samples": [{"prompt", "reply", "spans": {trait: [[start,
        end]]}}]}]}.
        Rates are shares of replies with 95 % Wilson limits; `settings["direct_minus_merge"]` is the difference of the
        joint rates with Newcombe limits. A forward is one row of one model.

    Raises:
        PersonafastError: an unknown trait, fewer than two traits, no question, no mask for the `mask` method.
    """
    chosen = list(dict.fromkeys(chosen))
    for name in chosen:
        if name not in traits:
            raise PersonafastError(f"traits: unknown trait {name!r}; choose from {', '.join(sorted(traits))}")
        for kind, names in (("vector", library.vectors), ("policy", library.policies)):
            if name not in names:
                raise PersonafastError(f"traits: the library has no {kind} for {name!r}; choose another trait")
    if len(chosen) < 2:
        raise PersonafastError("traits: a blend needs at least two different traits; name two or more")
    if not questions:
        raise PersonafastError("questions: there is none; give at least one")
    if mask is None:
        mask = next((name for name in chosen if name in library.masks), None)
    if mask is None:
        raise PersonafastError(f"traits: the library has no mask for any of {', '.join(chosen)}; name one with mask=")

    rows = methods(
        chosen, {name: traits[name].prompt for name in chosen}, alpha=alpha, mask=mask, coefficient=coefficient
    )
    settings: dict[str, Any] = {
        "replies": len(questions),
        "min_p": min_p,
        "temperature": temperature,
        "top_k": 0,
        "alpha": alpha,
        "vector_coefficient": coefficient,
        "mask": mask,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "confidence": 0.95,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "how": {method.name: method.how for method in rows},
    }
    batch = encode(tokenizer, questions, model.device)
    start = batch["input_ids"].shape[1]
    joint_counts: dict[str, int] = {}
    results = []
    with attach(model, library, tokenizer=tokenizer) as personas:

        def reply(method: Method, inputs: dict[str, torch.Tensor]) -> Any:
            return model.generate(
                **inputs,
                custom_generate=personas.generate,
                personas=[method.persona] * len(inputs["input_ids"]),
                sampler=method.sampler,
                seed=seed,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                min_p=min_p,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
            )

        # First calls allocate and warm threads up; that belongs to no method's speed.
        reply(rows[0], {key: value[:2] for key, value in batch.items()})
        for method in rows:
            progress(method.name)
            began = time.perf_counter()
            out = reply(method, batch)
            seconds = time.perf_counter() - began
            texts = [
                text.strip() for text in tokenizer.batch_decode(out.sequences[:, start:], skip_special_tokens=True)
            ]
            shown = {name: [traits[name].detect(text) for text in texts] for name in chosen}
            joint_counts[method.name] = sum(all(row) for row in zip(*shown.values(), strict=True))
            results.append(
                {
                    "name": method.name,
                    "traits": {name: wilson(sum(hits), len(texts))._asdict() for name, hits in shown.items()},
                    "joint": wilson(joint_counts[method.name], len(texts))._asdict(),
                    "grammar": sum(map(is_grammatical, texts)) / len(texts),
                    "tokens_per_s": out.stats.tokens / seconds,
                    "forwards_per_token": out.stats.forwards_per_token,
                    "samples": [
                        {
                            "prompt": question,
                            "reply": text,
                            "spans": {name: [list(span) for span in traits[name].spans(text)] for name in chosen},
                        }
                        for question, text in zip(questions[:samples], texts[:samples], strict=True)
                    ],
                }
            )
    n = len(questions)
    settings["direct_minus_merge"] = newcombe_difference(joint_counts["direct"], n, joint_counts["merge"], n)._asdict()
    return {"chosen": chosen, "settings": settings, "methods": results}
