"""Masks: do weights left out by a persona's calibration text make the model speak as that persona?

A persona subnetwork keeps the weights that the persona's own texts use most and drops the others; nothing is trained
(arXiv 2602.07164, section 3). The paper judges masks of large models by choice tests; here a model has to write.

Measured here, on the built-in zoo: how often free replies show a trait (by its detector, with Wilson intervals) under
the mask made from that trait's calibration texts, against random masks of the same sparsity and the model without any
mask; and how well the two masks of the opposing pair formal and casual are told apart, plain against contrastive. Every
seed draws its own calibration texts, random masks and questions. Noise makes detectors fire too, so each figure stands
beside the share of grammatical replies, and of replies that are grammatical and show the trait.

Settings were picked on seed 0, which is not among the reported ones. Tried there, besides the kinds below: the other
statistics; tokens of prompts too; calibration without the trait's system prompt; four times the texts; groups by layer
and global; attention alone, MLP alone, single projections and single blocks; soft gates. `docs/examples.md` says how it
went.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import _common as c

from personafast import Persona, PersonafastError, PersonaLibrary, attach, zoo
from personafast.evaluate import newcombe_difference, wilson
from personafast.evaluate.chat import encode
from personafast.masks import CalibrationStatistics, PersonaMask, build_mask, build_opposing_masks, calibrate
from personafast.models.reading import TokenizedText
from personafast.zoo.corpus import contrast
from personafast.zoo.grammar import is_grammatical
from personafast.zoo.traits import TRAITS

PAIR = ("formal", "casual")
SPARSITIES = (0.1, 0.3, 0.4, 0.5, 0.6)
SEEDS = (1, 2, 3)
DENSE = "no mask"
ALL, DOWN = "all linears", "down_proj"
CALIBRATION_SEED = 7_000_003


@dataclass(frozen=True)
class Kind:
    """One way to make masks: `score` over the linears of `where`, from the statistic A."""

    score: str
    where: str
    statistic: str = "mean_abs"

    @property
    def name(self) -> str:
        return self.score if self.statistic == "mean_abs" else f"{self.score}, {self.statistic}"

    @property
    def contrastive(self) -> bool:
        return self.score.startswith("contrastive")

    def options(self, sparsity: float) -> dict[str, Any]:
        chosen = sparsity if self.where == ALL else {f"*.{self.where}": sparsity}
        return {"score": self.score, "statistic": self.statistic, "sparsity": chosen}


KINDS = (
    Kind("random", ALL),
    Kind("wanda", ALL),
    Kind("contrastive_wanda", ALL),
    Kind("contrastive_sparse", ALL),
    Kind("random", DOWN),
    Kind("wanda", DOWN, "l2"),
    Kind("contrastive_sparse", DOWN, "l2"),
)
# Picked on seed 0: the most of the traits while most replies are grammatical.
CHOSEN, AT = KINDS[-1], 0.5
PLAIN = KINDS[-2].name
COLOURS = dict(
    zip(("random", "wanda", "contrastive_wanda", "contrastive_sparse"), ("#8a8f98", *c.COLOURS), strict=False)
)


@dataclass(frozen=True)
class Mask:
    """A mask to be heard: the trait it is to show, and the one it was made against, if that is its opposite."""

    bits: PersonaMask | None
    trait: str
    opposite: str | None = None


class Trial:
    """One seed: its calibration texts, its random masks, its questions."""

    def __init__(self, model: Any, tokenizer: Any, traits: Sequence[str], texts: int, seed: int) -> None:
        self.model, self.tokenizer, self.traits, self.seed = model, tokenizer, list(traits), seed
        self.sides = {name: self._calibrated(name, texts) for name in dict.fromkeys([*self.traits, *PAIR])}

    def _calibrated(self, name: str, texts: int) -> tuple[CalibrationStatistics, CalibrationStatistics]:
        """Statistics of replies with the trait under its system prompt, and of replies without it under none."""
        drawn = contrast(name, random.Random(CALIBRATION_SEED + 1000 * self.seed + list(TRAITS).index(name)))
        positive, negative = zip(*itertools.islice(drawn, texts), strict=True)
        first, second = (
            calibrate(self.model, [TokenizedText.from_chat(self.tokenizer, each.messages()) for each in side])
            for side in (positive, negative)
        )
        return first, second

    def masks(self, kind: Kind, sparsity: float) -> list[Mask]:
        """The mask of every trait, and, unless they are random, those of the opposing pair."""
        options, found = kind.options(sparsity), []
        for index, name in enumerate(self.traits):
            positive, negative = self.sides[name]
            more = {"against": negative} if kind.contrastive else {"seed": 100 * self.seed + index}
            found.append(Mask(build_mask(self.model, positive, **options, **more), name))
        one, other = (self.sides[name][0] for name in PAIR)
        if kind.contrastive:
            pair = build_opposing_masks(self.model, one, other, **options)
        elif kind.score != "random":
            pair = tuple(build_mask(self.model, side, **options) for side in (one, other))
        else:
            return found
        return [*found, Mask(pair[0], *PAIR), Mask(pair[1], *PAIR[::-1])]

    def hear(self, masks: Sequence[Mask], replies: int) -> list[dict[str, Any]]:
        """What the replies under every mask show, all in one batch; counts, one entry a mask."""
        library = PersonaLibrary()
        speakers: list[Persona | None] = []
        for index, mask in enumerate(masks):
            if mask.bits is not None:
                library.add_mask(str(index), mask.bits)
            speakers.append(None if mask.bits is None else Persona(mask=str(index)))
        with attach(self.model, library, tokenizer=self.tokenizer) as handle:
            batch = encode(self.tokenizer, zoo.prompts(replies, self.seed) * len(masks), self.model.device)
            out = self.model.generate(
                **batch,
                custom_generate=handle.generate,
                personas=[speaker for speaker in speakers for _ in range(replies)],
                seed=self.seed,
                do_sample=True,
                temperature=c.TEMPERATURE,
                top_k=0,
                min_p=c.MIN_P,
                max_new_tokens=c.MAX_NEW_TOKENS,
            )
        written = self.tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        texts = [text.strip() for text in written]
        return [self._counted(mask, texts[index * replies : (index + 1) * replies]) for index, mask in enumerate(masks)]

    def _counted(self, mask: Mask, texts: Sequence[str]) -> dict[str, Any]:
        sound = [is_grammatical(text) for text in texts]
        shown = [TRAITS[mask.trait].detect(text) for text in texts]
        found = {
            "trait": mask.trait,
            "replies": len(texts),
            "shown": sum(shown),
            "grammatical": sum(sound),
            "both": sum(a and b for a, b in zip(shown, sound, strict=True)),
        }
        if mask.opposite is not None:
            found |= {"opposite": mask.opposite, "opposite_shown": sum(map(TRAITS[mask.opposite].detect, texts))}
        return found


def trials(args: argparse.Namespace, progress: c.Progress) -> Iterator[dict[str, Any]]:
    """A record for every kind of mask, sparsity and seed, and one a seed for the model without masks."""
    model, tokenizer, _ = zoo.load()
    for seed in args.seeds:
        progress(f"seed {seed}: calibration")
        trial = Trial(model, tokenizer, args.traits, args.texts, seed)
        progress(f"seed {seed}: no mask")
        none = [Mask(None, name) for name in args.traits]
        yield {"name": DENSE, "where": "-", "sparsity": 0.0, "seed": seed, "masks": trial.hear(none, args.replies)}
        for kind, sparsity in itertools.product(KINDS, args.sparsities):
            progress(f"seed {seed}: {kind.name}, {kind.where}, {sparsity:g}")
            heard = trial.hear(trial.masks(kind, sparsity), args.replies)
            yield {"name": kind.name, "where": kind.where, "sparsity": sparsity, "seed": seed, "masks": heard}


Counts = Mapping[str, Any]


def pooled(masks: Sequence[Counts]) -> dict[str, Any]:
    """Several masks' counts as one."""
    found = {key: sum(mask[key] for mask in masks) for key in ("replies", "shown", "grammatical", "both")}
    if all("opposite" in mask for mask in masks):
        found["opposite_shown"] = sum(mask["opposite_shown"] for mask in masks)
    return found


class Heard:
    """The records of a result, by what they are."""

    def __init__(self, records: Sequence[Mapping[str, Any]]) -> None:
        self.records = records

    def of(self, where: str, name: str, sparsity: float, *, trait: str | None = None, pair: bool = False) -> Any:
        """Counts over all seeds and traits, of one trait, or of the opposing pair; None where there are none."""
        found = [
            mask
            for record in self.records
            if (record["where"], record["name"], record["sparsity"]) == (where, name, sparsity)
            for mask in record["masks"]
            if ("opposite" in mask) == pair and trait in (None, mask["trait"])
        ]
        return pooled(found) if found else None

    def dense(self, trait: str | None = None) -> Any:
        """Counts of the model without a mask."""
        return self.of("-", DENSE, 0.0, trait=trait)


def rate(counts: Counts, what: str = "shown") -> dict[str, float]:
    """A share of the replies with its limits."""
    return wilson(counts[what], counts["replies"])._asdict()


def less(one: Counts, other: Counts, what: str = "shown") -> dict[str, float]:
    """A difference of two shares with its limits."""
    return newcombe_difference(one[what], one["replies"], other[what], other["replies"])._asdict()


def separation(pair: Counts) -> dict[str, float]:
    """How much more often the masks of the pair show their own trait than the other's; limits as of separate shares."""
    return newcombe_difference(pair["shown"], pair["replies"], pair["opposite_shown"], pair["replies"])._asdict()


def apart(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """The difference of two independent estimates with limits, by the rule of Newcombe's method 10."""
    difference = one["rate"] - other["rate"]
    return {
        "rate": difference,
        "low": difference - math.hypot(one["rate"] - one["low"], other["high"] - other["rate"]),
        "high": difference + math.hypot(one["high"] - one["rate"], other["rate"] - other["low"]),
    }


def report(result: Mapping[str, Any]) -> c.Report:
    """The tables, the plot and what follows."""
    settings, heard = result["settings"], Heard(result["methods"])
    sweep, pairs, singles = [], [], []
    dense = heard.dense()
    for kind, sparsity in itertools.product(KINDS, settings["sparsities"]):
        counts = heard.of(kind.where, kind.name, sparsity)
        row = {"where": kind.where, "name": kind.name, "sparsity": sparsity, "counts": counts}
        row["random"] = None if kind.score == "random" else heard.of(kind.where, "random", sparsity)
        sweep.append(row)
        if kind.score != "random":
            plain = next(each for each in KINDS if (each.score, each.where) == ("wanda", kind.where))
            pair, against = (heard.of(kind.where, each.name, sparsity, pair=True) for each in (kind, plain))
            pairs.append({**row, "counts": pair, "plain": against if kind.contrastive else None})
    for trait in settings["traits"]:
        found = {
            name: heard.of(CHOSEN.where, name, settings["at"], trait=trait) for name in (CHOSEN.name, "random", PLAIN)
        }
        singles.append({"trait": trait, "dense": heard.dense(trait), **found})
    sections = [
        c.Section("Replies that show the trait of their mask, all traits together", _sweep_columns(dense), sweep),
        c.Section(f"Trait by trait, {CHOSEN.name} on {CHOSEN.where} at {settings['at']:g}", _single_columns(), singles),
        c.Section(
            f"The opposing pair {' and '.join(PAIR)} (contrastive masks are made against each other)",
            _pair_columns(),
            pairs,
        ),
    ]
    findings = [*_carried(heard, settings, singles), *_separated(pairs)]
    said = (
        f"{settings['replies']} replies a mask and seed, seeds {', '.join(map(str, settings['seeds']))}, each with its "
        f"own {settings['texts']} calibration texts a side, random masks and questions; temperature "
        f"{settings['temperature']:g}, min-p {settings['min_p']:g}; 95 % intervals (Wilson, differences by Newcombe)."
    )
    return c.Report(sections, findings, lambda figure: _draw(figure, settings, sweep, pairs, dense), said)


def _carried(heard: Heard, settings: Mapping[str, Any], singles: Sequence[Mapping[str, Any]]) -> list[str]:
    own, blind, plain = (heard.of(CHOSEN.where, name, settings["at"]) for name in (CHOSEN.name, "random", PLAIN))
    dense, sound = heard.dense(), c.percent(rate(own, "grammatical")["rate"])
    clear = [
        row["trait"]
        for row in singles
        if less(row[CHOSEN.name], row["random"])["low"] > 0 and less(row[CHOSEN.name], row["dense"])["low"] > 0
    ]
    rest = [row["trait"] for row in singles if row["trait"] not in clear]
    asked = zoo.info()["quality"]["prompts"]
    prompt = sum(asked[each][each] for each in settings["traits"]) / len(settings["traits"])
    return [
        f"{CHOSEN.name} on {CHOSEN.where} at {settings['at']:g} shows its trait in {c.percent(rate(own)['rate'], 1)} "
        f"of replies, {c.points(less(own, blind))} against random masks of the same sparsity and "
        f"{c.points(less(own, dense))} against no mask; {sound} of replies are grammatical.",
        f"Grammatical replies that show it: {c.points(less(own, blind, 'both'))} against random masks and "
        f"{c.points(less(own, dense, 'both'))} against no mask.",
        f"The plain mask there ({PLAIN}): {c.points(less(plain, blind))} and {c.points(less(plain, dense))}.",
        f"Trait by trait, both intervals clear of 0: {', '.join(clear) or 'none'}; not: {', '.join(rest) or 'none'}.",
        f"A system prompt that asks for the trait gets it in {c.percent(prompt)} of this model's replies, so a mask is "
        "no substitute for one here.",
    ]


def _separated(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    better: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in pairs:
        if row["plain"] is None:
            continue
        gain = apart(separation(row["counts"]), separation(row["plain"]))
        verdict = "better" if gain["low"] > 0 else "worse" if gain["high"] < 0 else "no clear difference"
        of = better.setdefault((row["where"], row["name"]), {})
        of.setdefault(verdict, []).append(f"{row['sparsity']:g}")
    return [
        f"Told apart against the plain masks on {where}, {name}: "
        + "; ".join(f"{verdict} at {', '.join(at)}" for verdict, at in of.items())
        + "."
        for (where, name), of in better.items()
    ]


def _kind_columns() -> list[c.Column]:
    return [
        c.Column("linears", lambda r: r["where"]),
        c.Column("mask", lambda r: r["name"]),
        c.Column("sparsity", lambda r: f"{r['sparsity']:g}"),
    ]


def _sweep_columns(dense: Counts) -> list[c.Column]:
    return [
        *_kind_columns(),
        c.Column("shows it [95 %]", lambda r: c.interval(rate(r["counts"]))),
        c.Column("less random", lambda r: "-" if r["random"] is None else _points(less(r["counts"], r["random"]))),
        c.Column("less no mask", lambda r: _points(less(r["counts"], dense))),
        c.Column("grammar", lambda r: c.percent(rate(r["counts"], "grammatical")["rate"])),
        c.Column("shows it, grammatical", lambda r: c.interval(rate(r["counts"], "both"))),
    ]


def _single_columns() -> list[c.Column]:
    name = CHOSEN.name
    return [
        c.Column("trait", lambda r: r["trait"]),
        c.Column("no mask", lambda r: c.interval(rate(r["dense"]))),
        c.Column("random", lambda r: c.interval(rate(r["random"]))),
        c.Column(PLAIN, lambda r: c.interval(rate(r[PLAIN]))),
        c.Column(name, lambda r: c.interval(rate(r[name]))),
        c.Column("less random", lambda r: _points(less(r[name], r["random"]))),
        c.Column("less no mask", lambda r: _points(less(r[name], r["dense"]))),
        c.Column("grammar", lambda r: c.percent(rate(r[name], "grammatical")["rate"])),
    ]


def _pair_columns() -> list[c.Column]:
    return [
        *_kind_columns(),
        c.Column("own trait", lambda r: c.interval(rate(r["counts"]))),
        c.Column("the other's", lambda r: c.interval(rate(r["counts"], "opposite_shown"))),
        c.Column("apart", lambda r: _points(separation(r["counts"]))),
        c.Column(
            "less plain",
            lambda r: "-" if r["plain"] is None else _points(apart(separation(r["counts"]), separation(r["plain"]))),
        ),
        c.Column("grammar", lambda r: c.percent(rate(r["counts"], "grammatical")["rate"])),
    ]


def _points(value: Mapping[str, float]) -> str:
    return f"{100 * value['rate']:+.0f} [{100 * value['low']:+.0f}, {100 * value['high']:+.0f}]"


def _draw(figure: Any, settings: Mapping[str, Any], sweep: Any, pairs: Any, dense: Counts) -> None:
    places = settings["sparsities"]
    *panels, last = figure.subplots(1, 3)
    for axes, where in zip(panels, (ALL, DOWN), strict=True):
        for kind in KINDS:
            if kind.where != where:
                continue
            colour, mine = COLOURS[kind.score], [row["counts"] for row in sweep if _is(row, kind)]
            _band(axes, places, [rate(counts) for counts in mine], colour, kind.name)
            axes.plot(places, [100 * rate(counts, "grammatical")["rate"] for counts in mine], ":", color=colour, lw=1.2)
        axes.axhline(100 * rate(dense)["rate"], color=c.INK, lw=0.8)
        axes.set_title(f"{where}: trait (lines), grammar (dots), %", size=9, color=c.INK)
        axes.set_ylim(-2, 102)
    for kind in KINDS:
        mine = [separation(row["counts"]) for row in pairs if _is(row, kind)]
        if mine:
            style = "--" if kind.where == ALL else "-"
            _band(last, places, mine, COLOURS[kind.score], f"{kind.name}: {kind.where}", style)
    last.set_title(f"{' and '.join(PAIR)} told apart, points", size=9, color=c.INK)
    for axes in (*panels, last):
        axes.set_xlabel("sparsity", color=c.INK)
        axes.legend(frameon=False, fontsize=7)


def _is(row: Mapping[str, Any], kind: Kind) -> bool:
    return (row["where"], row["name"]) == (kind.where, kind.name)


def _band(axes: Any, places: Any, values: Any, colour: str, label: str, style: str = "-") -> None:
    axes.plot(places, [100 * value["rate"] for value in values], style, color=colour, label=label, lw=1.8)
    low, high = ([100 * value[end] for value in values] for end in ("low", "high"))
    axes.fill_between(places, low, high, color=colour, alpha=0.12, lw=0)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--replies", type=int, default=60, help="replies a mask and seed (60)")
    parser.add_argument("--traits", nargs="+", default=list(TRAITS), metavar="TRAIT", help=" ".join(TRAITS))
    parser.add_argument("--texts", type=int, default=96, help="calibration texts a side (96)")
    parser.add_argument("--at", type=float, default=AT, help=f"sparsity of the table trait by trait ({AT:g})")
    c.grid(parser, SEEDS, SPARSITIES)
    c.outputs(parser, "masks")
    args = parser.parse_args(argv)
    c.check(args, at_least=1, together=False)
    c.check_grid(args)
    if args.texts < 2:
        raise PersonafastError(f"--texts {args.texts}: give at least 2")
    if args.at not in args.sparsities:
        raise PersonafastError(f"--at {args.at:g}: not one of --sparsities; add it there")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run the experiment."""
    args = parse(argv)
    with c.Steps(len(args.seeds) * (2 + len(KINDS) * len(args.sparsities))) as progress:
        records = list(trials(args, progress))
    settings = {
        "traits": args.traits,
        "replies": args.replies,
        "texts": args.texts,
        "seeds": args.seeds,
        "sparsities": args.sparsities,
        "at": args.at,
        "temperature": c.TEMPERATURE,
        "min_p": c.MIN_P,
        "max_new_tokens": c.MAX_NEW_TOKENS,
        "machine": c.machine(),
    }
    result = {"experiment": "masks", "settings": settings, "methods": records}
    c.deliver(args, result, report(result))


if __name__ == "__main__":
    sys.exit(c.run(main))
