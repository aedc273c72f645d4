"""Vectors in the residual stream: how much of two traits does a coefficient give, one at a time and blended?

A persona vector is a difference of mean activations, added to the residual stream times a coefficient (BILLY, arXiv
2510.10157, whose coefficient is 2). A blend of two is one row a block, so it costs what one costs.

Measured here, on the built-in zoo: how often a reply shows each trait and both (by detectors, with Wilson intervals),
and whether it is still grammatical, at growing coefficients, for each vector alone and for their blend. A coefficient
of a blend is that of each of its vectors: nothing is shared out.

What to expect: more of the trait with every step, until the text collapses: the stream is then mostly vector.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import _common as c

from personafast import Persona, PersonafastError
from personafast.evaluate import newcombe_difference

COEFFICIENTS = (0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)
# Replies have collapsed where fewer than this share are grammatical.
COLLAPSE = 0.5
BLEND = "blend"


def methods(traits: Sequence[str], coefficients: Sequence[float], blocks: Sequence[int]) -> list[c.Method]:
    """Every vector alone and the blend, at every coefficient."""
    sides = {**{name: [name] for name in traits}, BLEND: list(traits)}
    return [
        c.Method(
            f"{side} {coefficient:g}",
            f"{' + '.join(names)}, {coefficient:g} each",
            Persona(vectors=dict.fromkeys(names, coefficient), blocks=tuple(blocks)),
        )
        for side, names in sides.items()
        for coefficient in coefficients
    ]


def curve(records: Sequence[Mapping[str, Any]], side: str) -> list[Mapping[str, Any]]:
    """The records of a vector, or of the blend, by growing coefficient."""
    return [record for record in records if record["side"] == side]


def before_collapse(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The records of a curve up to the first whose text has collapsed."""
    kept = []
    for record in records:
        if record["grammar"]["rate"] < COLLAPSE:
            break
        kept.append(record)
    return kept


def falls(records: Sequence[Mapping[str, Any]], trait: str, replies: int) -> list[str]:
    """The steps of a curve at which a trait shows less often, beyond what chance explains (95 %)."""
    found = []
    for low, high in pairwise(records):
        step = newcombe_difference(high["shown"][trait], replies, low["shown"][trait], replies)
        if step.high < 0:
            found.append(f"{trait} from {low['coefficient']:g} to {high['coefficient']:g}")
    return found


def report(result: Mapping[str, Any]) -> c.Report:
    """The tables, the plot and what follows."""
    records, settings = result["methods"], result["settings"]
    traits, replies, at = settings["traits"], settings["replies"], settings["at"]
    curves = {side: curve(records, side) for side in (*traits, BLEND)}
    there = {side: next(r for r in of if r["coefficient"] == at) for side, of in curves.items()}

    def more(trait: str) -> str:
        """How often the blend shows a trait, less how often either vector alone does."""
        shown = {side: record["shown"][trait] for side, record in there.items()}
        against = [
            f"{c.points(newcombe_difference(shown[BLEND], replies, shown[alone], replies)._asdict())} against {alone} "
            "alone"
            for alone in traits
        ]
        return f"{trait} in {c.percent(there[BLEND]['traits'][trait]['rate'])} of replies, {' and '.join(against)}"

    monotone = []
    for side, of in curves.items():
        kept = before_collapse(of)
        fallen = [each for name in (traits if side == BLEND else [side]) for each in falls(kept, name, replies)]
        end = f"up to {kept[-1]['coefficient']:g}, the last before collapse"
        monotone.append(f"{side}: {'falls at ' + ', '.join(fallen) if fallen else 'no step down'} {end}")
    findings = [
        f"At {at:g}, where {c.percent(there[BLEND]['grammar']['rate'])} are grammatical, the blend shows "
        f"{more(traits[0])}; {more(traits[1])}.",
        f"More of the trait with every step (95 %): {'; '.join(monotone)}. Collapse: fewer than "
        f"{c.percent(COLLAPSE)} of replies are grammatical.",
        "Vectors push, they do not choose: where a trait shows often, grammar has begun to go, and a blend pushes with "
        "the sum of its vectors. Density ratios (`tone`, above) keep what the reference finds fluent.",
    ]
    columns = [
        c.Column("vector", lambda r: r["side"]),
        c.Column("coefficient", lambda r: f"{r['coefficient']:g}"),
        *c.trait_columns(traits),
        c.JOINT,
        c.GRAMMAR,
    ]

    def draw(figure: Any) -> None:
        for axes, (side, of) in zip(figure.subplots(1, 3, sharey=True), curves.items(), strict=True):
            _curves(axes, of, traits)
            axes.set_title(" + ".join(traits) if side == BLEND else f"{side} alone", size=10, color=c.INK)
            axes.set_xlabel("coefficient", color=c.INK)
        figure.axes[0].set_ylabel("% of replies (band: 95 %)", color=c.INK)
        figure.axes[0].legend(frameon=False)

    return c.Report([c.Section(f"Replies that show {' and '.join(traits)}", columns, records)], findings, draw)


def _curves(axes: Any, records: Sequence[Mapping[str, Any]], traits: Sequence[str]) -> None:
    places = [record["coefficient"] for record in records]
    series = {name: [record["traits"][name] for record in records] for name in traits}
    series |= {"both": [r["joint"] for r in records], "grammatical": [r["grammar"] for r in records]}
    for (name, values), colour in zip(series.items(), (*c.COLOURS[:3], "#8a8f98"), strict=True):
        style = "--" if name == "grammatical" else "-"
        axes.plot(places, [100 * v["rate"] for v in values], style, color=colour, label=name, lw=1.8)
        low, high = ([100 * v[side] for v in values] for side in ("low", "high"))
        axes.fill_between(places, low, high, color=colour, alpha=0.12, lw=0)
    axes.set_ylim(-2, 102)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = c.arguments(__doc__, name="steering", replies=400, traits=("curious", "cautious"), repeats=1)
    parser.add_argument("--coefficients", type=float, nargs="+", default=list(COEFFICIENTS), metavar="C")
    parser.add_argument("--at", type=float, default=2.5, help="coefficient at which the blend is compared (2.5)")
    parser.add_argument("--blocks", type=int, nargs="+", default=[3], metavar="B", help="0-based blocks steered (3)")
    args = parser.parse_args(argv)
    c.check(args, at_least=2, at_most=2)
    args.coefficients = sorted(set(args.coefficients))
    if args.at not in args.coefficients:
        raise PersonafastError(f"--at {args.at:g}: not one of --coefficients; add it there")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    args = parse(argv)
    rows = methods(args.traits, args.coefficients, args.blocks)
    with c.Steps(len(rows)) as progress:
        records = c.Stage(args.traits, args.replies, args.seed).count(rows, progress)
    for record in records:
        side, _, coefficient = record["name"].partition(" ")
        record |= {"side": side, "coefficient": float(coefficient)}
    chosen = c.settings(args, coefficients=args.coefficients, at=args.at, blocks=args.blocks)
    result = {"experiment": "steering", "settings": chosen, "methods": records}
    c.deliver(args, result, report(result))


if __name__ == "__main__":
    sys.exit(c.run(main))
