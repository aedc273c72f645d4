"""A specialised reference: what if a policy proposes in the reference's place?

The paper (arXiv 2511.01891) also proposes from a specialised model instead of the plain reference, while the ratios
stay those to the plain one. Proposals that show a trait already have less to be refused for; it reports that this pays.

Measured here, on the built-in zoo: the base is the reference, one of the first two policies, or the merge of both; the
traits the base does not bring are joined as ratios over the plain reference, by scr under the linear rule (as
published) and under the geometric one, and by block with the base as draft. Under the geometric rule a policy as base
is one more factor pi_i / pi_0, so the token-level target is the same whichever policy proposes, and for block, being
exact, only the cost may change. Under the linear rule the target changes: it is the base times a mixture of the rest.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import _common as c
import torch

from personafast import Persona, PersonaLibrary
from personafast.density.lora import LoraFactors, LoraPolicy

PLAIN = "reference"


def bases(traits: Sequence[str]) -> list[tuple[str, ...]]:
    """The traits that each base brings: none, the first, the second, and both."""
    return [(), *((name,) for name in traits[:2]), tuple(traits[:2])]


def name_of(base: Sequence[str]) -> str:
    """What a base is called."""
    return "+".join(base) or PLAIN


def methods(traits: Sequence[str]) -> list[c.Method]:
    """The rows of the table; a sampler's rows follow each other."""
    rows = [c.Method("direct", "geometric rule, token by token", Persona(policies={name: 1.0 for name in traits}))]
    for sampler, rule in (("scr", "linear"), ("scr", "geometric"), ("block", "geometric")):
        for base in bases(traits):
            rest = {name: 1.0 for name in traits if name not in base}
            persona = Persona(policies=rest, aggregator=rule, base=name_of(base) if base else None)
            options = c.scr() if sampler == "scr" else {"chunk": 8, "draft": "reference"}
            label = f"{sampler} {rule}" if sampler == "scr" else sampler
            how = f"{label}, proposing from {name_of(base)}, ratios of {' and '.join(rest)}"
            rows.append(c.Method(f"{label}: {name_of(base)}", how, persona, sampler, options, exact=sampler == "block"))
    return rows


def add_merge(library: PersonaLibrary, names: Sequence[str]) -> None:
    """Add the sum of some policies' weight updates as a policy: their factors side by side."""
    policies = [library.policies[name] for name in names]
    factors = {}
    for path in sorted({path for policy in policies for path in policy.factors}):
        parts = [policy.factors[path] for policy in policies if path in policy.factors]
        a, b = torch.cat([p.a for p in parts]), torch.cat([p.b * p.scale for p in parts], dim=1)
        factors[path] = LoraFactors(a, b, 1.0)
    library.add_policy(name_of(names), LoraPolicy(factors, vocab_size=policies[0].vocab_size))


def report(result: Mapping[str, Any]) -> c.Report:
    """The table, the plot and what follows."""
    records, s = result["methods"], result["settings"]
    of, traits = c.by_name(records), s["traits"]
    columns = [
        c.Column("sampler: base", lambda r: r["name"]), *c.trait_columns(traits), c.JOINT, c.GRAMMAR, c.SPEED,
        c.TOKENS_PER_S, c.FORWARDS, c.PER_ROUND, c.ACCEPTANCE, c.CLIPPED,
    ]  # fmt: skip
    findings = []
    for label in ("scr linear", "scr geometric", "block"):
        plain = of[f"{label}: {PLAIN}"]
        singles = [of[f"{label}: {name}"] for name in traits[:2]]
        merged = of[f"{label}: {name_of(traits[:2])}"]
        findings.append(
            f"{label}, joint presence: {c.percent(plain['joint']['rate'])} from the reference, "
            f"{', '.join(c.percent(r['joint']['rate']) for r in singles)} from {' and '.join(traits[:2])}, "
            f"{c.percent(merged['joint']['rate'])} from their merge; tokens a round "
            f"{plain['tokens_per_round']:.2f}, {', '.join(format(r['tokens_per_round'], '.2f') for r in singles)} and "
            f"{merged['tokens_per_round']:.2f}; tokens/s beside the reference's "
            f"{', '.join(format(c.speed(r) / c.speed(plain), '.2f') for r in singles)} and "
            f"{c.speed(merged) / c.speed(plain):.2f}."
        )
    spread = [c.difference(records, f"block: {name}", "direct", s["replies"]) for name in (PLAIN, *traits[:2])]
    findings.append(
        "block keeps the target of direct whichever policy proposes: joint presence less direct's "
        f"{', '.join(c.points(d) for d in spread)}. With the merge as base the target is another: a merge is not the "
        "product of its policies."
    )

    def draw(figure: Any) -> None:
        both, rounds, fast = figure.subplots(1, 3, width_ratios=[2, 1, 1])
        c.bars_of_joint(both, records)
        c.bars_of(rounds, records, lambda r: r["tokens_per_round"], "tokens a round")
        c.bars_of(fast, records, c.speed, "speed beside direct")

    return c.Report([c.Section(f"Replies that show {', '.join(traits)}", columns, records)], findings, draw)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    parser = c.arguments(__doc__, name="reference_swap", replies=100, repeats=2, traits=("formal", "warm", "curious"))
    args = parser.parse_args(argv)
    c.check(args, at_least=3)
    rows = methods(args.traits)
    with c.Steps(c.steps(rows, args.repeats)) as progress:
        stage = c.Stage(args.traits, args.replies, args.seed)
        add_merge(stage.library, args.traits[:2])
        records = stage.measure(rows, args.repeats, progress)
    result = {"experiment": "reference_swap", "settings": c.settings(args), "methods": records}
    c.deliver(args, result, report(result))


if __name__ == "__main__":
    sys.exit(c.run(main))
