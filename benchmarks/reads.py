"""How often a token costs a read of all weights: counters of every sampler on the zoo, one row at a time.

What a call reads does not depend on the machine, so nothing is timed here: `python -m benchmarks.reads` counts calls
of models and estimated bytes, for policies that are separate models and for LoRA policies on one base, beside what the
design expects, and writes benchmarks/results/reads.json; `python -m benchmarks.report` puts them on the page.

    OMP_WAIT_POLICY=passive python -m benchmarks.reads --replies 100
"""

from __future__ import annotations

import argparse
import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import personafast as pf
from benchmarks import machine
from personafast import zoo
from personafast._io import write_json
from personafast.evaluate.chat import encode
from personafast.evaluate.intervals import wilson
from personafast.models.anatomy import anatomy
from personafast.zoo.grammar import is_grammatical
from personafast.zoo.traits import TRAITS

OUTPUT = machine.ROOT / "benchmarks" / "results" / "reads.json"
NAMES = zoo.DEMO_TRAITS
CHUNK, SEED, LONGEST, MIN_P = 8, 5, 64, 0.05


@dataclass(frozen=True)
class Method:
    """A way to sample, and what the design expects of it on a toy: (separate, LoRA) weight reads a token by alpha."""

    name: str
    options: Mapping[str, Any]
    aggregator: str = "geometric"
    expected: Mapping[float, tuple[float, float]] | None = None
    goal: tuple[str, float, float] | None = None


METHODS = (
    Method("merge", {"sampler": "merge"}, expected={0.25: (1, 1), 1.0: (1, 1)}),
    Method("direct", {"sampler": "direct"}, expected={0.25: (5, 1.02), 1.0: (5, 1.02)}),
    Method(
        "verify, reference drafts",
        {"sampler": "verify", "draft": "reference", "chunk": CHUNK},
        expected={0.25: (2.0, 1.5), 1.0: (4.6, 3.5)},
    ),
    Method("block, reference drafts", {"sampler": "block", "draft": "reference", "chunk": CHUNK}),
    Method(
        "verify, merge drafts",
        {"sampler": "verify", "draft": "merge", "chunk": CHUNK},
        expected={1.0: (1.64, 1.14)},
    ),
    Method(
        "block, merge drafts",
        {"sampler": "block", "draft": "merge", "chunk": CHUNK},
        goal=("separate", 1.0, 1.8),
    ),
    Method(
        "block, merge drafts at the full weights, no early end",
        {"sampler": "block", "draft": "merge", "chunk": CHUNK, "draft_scale": 1.0, "draft_doubt": 0.0},
    ),
    Method(
        "scr",
        {"sampler": "scr", "chunk": CHUNK},
        expected={0.25: (4.2, 3.2), 1.0: (16, 12.4)},
    ),
    Method("mixture", {"sampler": "mixture", "chunk": CHUNK}, "linear", expected={0.25: (1, 1)}),
    Method("token-level rejection", {"sampler": "token_rs"}),
)


def separate_models(model: Any, library: pf.PersonaLibrary) -> dict[str, Any]:
    """The policies as models of their own: each adapter added to a copy of the weights."""
    models = {}
    for name in NAMES:
        models[name] = copy.deepcopy(model)
        linears = anatomy(models[name]).linears
        with torch.no_grad():
            for path, factors in library.policies[name].factors.items():
                linears[path].weight += factors.scale * factors.b.float() @ factors.a.float()
    return models


def count(model: Any, tokenizer: Any, handle: Any, method: Method, alpha: float, questions: Sequence[str]) -> Any:
    """Counters of one method, a reply at a time."""
    persona = pf.Persona(policies=dict.fromkeys(NAMES, alpha), aggregator=method.aggregator)
    tokens = calls = rounds = proposed = accepted = size = shown = good = 0
    for index, question in enumerate(questions):
        batch = encode(tokenizer, [question])
        out = model.generate(
            **batch,
            custom_generate=handle.generate,
            personas=persona,
            seed=SEED + index,
            do_sample=True,
            top_k=0,
            min_p=MIN_P,
            max_new_tokens=LONGEST,
            return_dict_in_generate=True,
            **method.options,
        )
        text = tokenizer.decode(out.sequences[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        stats = out.stats
        tokens, calls, rounds = tokens + stats.tokens, calls + stats.calls, rounds + stats.rounds
        proposed, accepted, size = proposed + stats.proposed, accepted + stats.accepted, size + stats.weight_bytes
        shown += all(TRAITS[name].detect(text) for name in NAMES)
        good += is_grammatical(text)
    return {
        "reads_per_token": round(calls / tokens, 3),
        "bytes_per_token": round(size / tokens),
        "tokens_per_round": round(tokens / rounds, 2),
        "acceptance": round(accepted / proposed, 3) if proposed else None,
        "joint": wilson(shown, len(questions))._asdict(),
        "grammar": round(good / len(questions), 3),
        "tokens_per_reply": round(tokens / len(questions), 1),
    }


def records(replies: int) -> Iterator[dict[str, Any]]:
    """Every method at alpha = 1 / N and alpha = 1, over both kinds of policies."""
    model, tokenizer, library = zoo.load()
    questions = zoo.prompts(replies, SEED)
    apart = pf.PolicySet.from_models(model, separate_models(model, library))
    for kind in ("separate", "lora"):
        options: dict[str, Any] = {"policies": apart} if kind == "separate" else {"library": library}
        with contextlib.ExitStack() as stack:
            handle = stack.enter_context(pf.attach(model, tokenizer=tokenizer, **options))
            for alpha in (1 / len(NAMES), 1.0):
                for method in METHODS:
                    expected = (method.expected or {}).get(alpha)
                    yield {
                        "method": method.name,
                        "policies": kind,
                        "alpha": alpha,
                        **count(model, tokenizer, handle, method, alpha, questions),
                        "expected": expected[kind == "lora"] if expected else None,
                        "goal": method.goal[2] if method.goal and method.goal[:2] == (kind, alpha) else None,
                    }


def main() -> None:
    from rich.console import Console
    from rich.progress import track

    parser = argparse.ArgumentParser(prog="python -m benchmarks.reads", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replies", type=int, default=100, help="replies a method, each a batch of one row")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="where to write the JSON")
    options = parser.parse_args()
    found = []
    console = Console(stderr=True)
    for record in track(records(options.replies), total=4 * len(METHODS), console=console):
        found.append(record)
        line = (
            f"{record['policies']:9} {record['alpha']:<5} {record['method']:54} {record['reads_per_token']:6.2f} reads"
        )
        console.print(line, soft_wrap=True)
    settings = {"replies": options.replies, "chunk": CHUNK, "min_p": MIN_P, "traits": NAMES, "seed": SEED}
    head = {"suite": "reads", "versions": machine.versions(), "commit": machine.commit(), "settings": settings}
    write_json(options.output, {**head, "records": found})


if __name__ == "__main__":
    main()
