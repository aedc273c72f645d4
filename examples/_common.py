"""What the experiments share: the zoo, running one method, and results as a table, a plot, JSON and Markdown."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads take cores from each other

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from personafast import Persona, PersonafastError, attach, zoo
from personafast._io import atomic_path, write_json
from personafast.cli.progress import progress_bar
from personafast.density.scr import ScrOptions
from personafast.evaluate import newcombe_difference, wilson
from personafast.evaluate.chat import encode
from personafast.zoo.grammar import is_grammatical
from personafast.zoo.traits import TRAITS

MIN_P, TEMPERATURE, MAX_NEW_TOKENS = 0.05, 1.0, 64  # the same for every method
BETWEEN = 3  # methods between two runs of `direct`
GREEDY = 8  # questions of the check that comes before any timing
INK, COLOURS = "#1f2933", ("#1c5fa8", "#c2452d", "#2e7d4f", "#8a5fb0", "#b8860b")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Method:
    """One row of a table: who speaks, and how it is sampled.

    `options` go to `generate` as they are; `exact` says that the sampler claims the token-level target, so that without
    sampling it has to write what `direct` writes.
    """

    name: str
    how: str
    persona: Persona | None
    sampler: str = "direct"
    options: Mapping[str, Any] = field(default_factory=dict)
    exact: bool = False


@dataclass(frozen=True)
class Column:
    """One column: its title and what it says of a record."""

    title: str
    cell: Callable[[Mapping[str, Any]], str]
    short: Callable[[Mapping[str, Any]], str] | None = None  # on a narrow terminal


class Stage:
    """The zoo with its questions. `library` may be added to before `measure`."""

    def __init__(self, traits: Sequence[str], replies: int, seed: int) -> None:
        self.model, self.tokenizer, self.library = zoo.load()
        self.traits, self.seed = list(traits), seed
        self.questions = zoo.prompts(replies, seed)

    def measure(self, methods: Sequence[Method], repeats: int, progress: Progress) -> list[dict[str, Any]]:
        """A record for each method: what its replies show, and what they cost beside the method called `direct`.

        First every exact method is checked, then all methods reply to all questions `repeats` times, in turns. The
        replies are the same every time; only the clock differs. `direct` runs before every third method and at the end,
        and a method's speed is compared with the two runs of it that are nearest: the machine's own speed drifts.

        Raises:
            RuntimeError: an exact method did not write what `direct` writes, or a repeat wrote something else.
        """
        with ExitStack() as stack:
            handle = stack.enter_context(attach(self.model, self.library, tokenizer=self.tokenizer))
            few = encode(self.tokenizer, zoo.prompts(GREEDY, self.seed), self.model.device)
            batch = encode(self.tokenizer, self.questions, self.model.device)
            for method in methods:
                if method.exact:
                    progress(f"{method.name}: check")
                    self._check(handle, method, few)
            self._reply(handle, methods[0], batch)  # allocates and warms up
            first: dict[str, Any] = {}
            seconds: dict[str, list[float]] = {method.name: [] for method in methods}
            anchors: dict[str, list[float]] = {method.name: [] for method in methods}

            def timed(method: Method, repeat: int) -> float:
                progress(f"{method.name}: {len(self.questions)} replies, {repeat + 1} of {repeats}")
                began = time.perf_counter()
                out = self._reply(handle, method, batch)
                took = time.perf_counter() - began
                if not torch.equal(first.setdefault(method.name, out).sequences, out.sequences):
                    raise RuntimeError(f"{method.name}: the same seed gave other replies")
                return took

            direct = next(method for method in methods if method.name == "direct")
            others = [method for method in methods if method is not direct]
            for repeat in range(repeats):
                before = timed(direct, repeat)
                seconds["direct"].append(before)
                for start in range(0, len(others), BETWEEN):
                    some = others[start : start + BETWEEN]
                    for method in some:
                        seconds[method.name].append(timed(method, repeat))
                    after = timed(direct, repeat)
                    for method in some:
                        anchors[method.name].append((before + after) / 2)
                    before = after
                    seconds["direct"].append(after)
        anchors["direct"] = seconds["direct"]
        prompt = batch["input_ids"].shape[1]
        records = [self._record(method, first[method.name], prompt) for method in methods]
        _add_timing(records, seconds, anchors)
        return records

    def count(self, methods: Sequence[Method], progress: Progress) -> list[dict[str, Any]]:
        """A record for each method without its timing: what its replies show, asked once."""
        records = []
        with attach(self.model, self.library, tokenizer=self.tokenizer) as handle:
            batch = encode(self.tokenizer, self.questions, self.model.device)
            for method in methods:
                progress(f"{method.name}: {len(self.questions)} replies")
                records.append(self._record(method, self._reply(handle, method, batch), batch["input_ids"].shape[1]))
        return records

    def _reply(self, handle: Any, method: Method, batch: Mapping[str, torch.Tensor], sampling: bool = True) -> Any:
        return self.model.generate(
            **batch,
            custom_generate=handle.generate,
            personas=[method.persona] * len(batch["input_ids"]),
            sampler=method.sampler,
            **method.options,
            seed=self.seed,
            do_sample=sampling,
            **({"temperature": TEMPERATURE, "top_k": 0} if sampling else {}),
            min_p=MIN_P,
            max_new_tokens=MAX_NEW_TOKENS,
            return_dict_in_generate=True,
        )

    def _check(self, handle: Any, method: Method, batch: Mapping[str, torch.Tensor]) -> None:
        """Greedy decoding has one right answer, whatever the sampler."""
        plain = Method("direct", "", method.persona)
        found, wanted = (self._reply(handle, each, batch, sampling=False).sequences for each in (method, plain))
        if not torch.equal(found, wanted):
            raise RuntimeError(f"{method.name}: without sampling it writes something else than direct")

    def _record(self, method: Method, out: Any, start: int) -> dict[str, Any]:
        texts = [t.strip() for t in self.tokenizer.batch_decode(out.sequences[:, start:], skip_special_tokens=True)]
        shown = {name: [TRAITS[name].detect(text) for text in texts] for name in self.traits}
        joint = sum(all(row) for row in zip(*shown.values(), strict=True))
        stats = out.stats
        return {
            "name": method.name,
            "how": method.how,
            "traits": {name: wilson(sum(hits), len(texts))._asdict() for name, hits in shown.items()},
            "shown": {name: sum(hits) for name, hits in shown.items()},
            "joint": wilson(joint, len(texts))._asdict(),
            "joint_count": joint,
            "grammar": wilson(sum(map(is_grammatical, texts)), len(texts))._asdict(),
            "tokens": stats.tokens,
            "forwards_per_token": stats.forwards_per_token,
            "tokens_per_round": stats.tokens_per_round,
            "acceptance": stats.acceptance,
            "clipped_mass": stats.clipped_mass,
            "sample": texts[0],
        }


def _add_timing(
    records: Sequence[dict[str, Any]], seconds: Mapping[str, Sequence[float]], anchors: Mapping[str, Sequence[float]]
) -> None:
    """Medians over the repeats, of tokens/s and of their ratios to those of `direct` about the same time."""
    tokens = {record["name"]: record["tokens"] for record in records}
    for record in records:
        name = record["name"]
        speeds = [tokens[name] / each for each in seconds[name]]
        beside = [speed * each / tokens["direct"] for speed, each in zip(speeds, anchors[name], strict=True)]
        record["timing"] = {
            "tokens_per_s": statistics.median(speeds),
            "relative_to_direct": statistics.median(beside),
            "relative_low": min(beside),
            "relative_high": max(beside),
        }


def scr(chunk: int = 4) -> dict[str, Any]:
    """The published settings: W = 20, gamma = 1.2; what the paper leaves open has its documented default."""
    return {"scr_options": ScrOptions(chunk=chunk, window=20, gamma=1.2)}


def difference(records: Sequence[Mapping[str, Any]], one: str, other: str, replies: int) -> dict[str, float]:
    """Joint presence of one method less that of another, with Newcombe limits."""
    counts = {record["name"]: record["joint_count"] for record in records}
    return newcombe_difference(counts[one], replies, counts[other], replies)._asdict()


def by_name(records: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The records of a table by their names."""
    return {record["name"]: record for record in records}


def arguments(doc: str, *, name: str, replies: int, traits: Sequence[str], repeats: int = 3) -> argparse.ArgumentParser:
    """The options every experiment has."""
    parser = argparse.ArgumentParser(description=doc.strip().splitlines()[0])
    parser.add_argument("--replies", type=int, default=replies, help=f"replies a method ({replies})")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"timed repeats, whose medians count ({repeats})")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same replies (0)")
    parser.add_argument("--traits", nargs="+", default=list(traits), metavar="TRAIT", help=" ".join(traits))
    outputs(parser, name)
    return parser


def outputs(parser: argparse.ArgumentParser, name: str) -> None:
    """The options for where results go."""
    parser.add_argument("--json", metavar="PATH", help="write the results there; - prints them and nothing else")
    plot = f"personafast-{name}.png"
    parser.add_argument("--plot", metavar="PATH", help=f"where the plot goes ({plot}; none with --json -)")
    parser.set_defaults(default_plot=plot)


def grid(parser: argparse.ArgumentParser, seeds: Sequence[int], sparsities: Sequence[float]) -> None:
    """The options of experiments with masks: seeds and sparsities."""
    numbers = " ".join(map(str, seeds))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds), metavar="SEED", help=f"({numbers})")
    numbers = " ".join(map(str, sparsities))
    parser.add_argument(
        "--sparsities", type=float, nargs="+", default=list(sparsities), metavar="S", help=f"({numbers})"
    )


def check_grid(args: argparse.Namespace) -> None:
    """Refuse seeds and sparsities that cannot work, and put the sparsities in order.

    Raises:
        PersonafastError: naming the option and the mend.
    """
    args.sparsities = sorted(set(args.sparsities))
    for sparsity in args.sparsities:
        if not 0 < sparsity < 1:
            raise PersonafastError(f"--sparsities {sparsity:g}: give numbers between 0 and 1")
    if min(args.seeds) < 0 or len(set(args.seeds)) != len(args.seeds):
        raise PersonafastError(f"--seeds {' '.join(map(str, args.seeds))}: give different ones of 0 or more")


def check(args: argparse.Namespace, *, at_least: int = 2, at_most: int | None = None, together: bool = True) -> None:
    """Refuse what cannot work before any work is done; settles where the plot goes.

    `together`: the traits are to share a reply, so opposites are refused.

    Raises:
        PersonafastError: naming the option and the mend.
    """
    for option in ("replies", "repeats"):
        if getattr(args, option, 1) < 1:
            raise PersonafastError(f"--{option} {getattr(args, option)}: give at least 1")
    if getattr(args, "seed", 0) < 0:
        raise PersonafastError(f"--seed {args.seed}: give 0 or more")
    for name in args.traits:
        if name not in TRAITS:
            raise PersonafastError(f"--traits: {name!r} is not one of {', '.join(sorted(TRAITS))}")
        if together and TRAITS[name].opposite in args.traits:
            raise PersonafastError(f"--traits: {name} and {TRAITS[name].opposite} never share a reply; choose others")
    count = len(args.traits)
    if len(set(args.traits)) != count or count < at_least or (at_most is not None and count > at_most):
        wanted = f"exactly {at_least}" if at_most == at_least else f"{at_least} or more"
        raise PersonafastError(f"--traits: {' '.join(args.traits)}; give {wanted} different ones")
    check_outputs(args)


def check_outputs(args: argparse.Namespace) -> None:
    """Refuse places that results cannot go to; settles where the plot goes.

    Raises:
        PersonafastError: naming the option and the mend.
    """
    drawing = importlib.util.find_spec("matplotlib") is not None
    if args.plot is not None and not drawing:
        raise PersonafastError("--plot: matplotlib is missing; `pip install personafast[eval]` brings it")
    if args.plot is None and args.json != "-":
        args.plot = args.default_plot if drawing else None
        if not drawing:
            print("No plot: matplotlib is missing; `pip install personafast[eval]` brings it.", file=sys.stderr)
    for option in ("json", "plot"):
        path = getattr(args, option)
        if path not in (None, "-") and not Path(path).resolve().parent.is_dir():
            raise PersonafastError(f"--{option} {path}: its folder does not exist; make it first")


def settings(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    """What every method of a run shares; all but `machine` decides what it writes."""
    return {
        "traits": list(args.traits),
        "replies": args.replies,
        "repeats": args.repeats,
        "seed": args.seed,
        "temperature": TEMPERATURE,
        "min_p": MIN_P,
        "alpha": 1.0,
        "max_new_tokens": MAX_NEW_TOKENS,
        **more,
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """What a run ran with; no figure but the timings follows from it."""
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def conditions(result: Mapping[str, Any]) -> str:
    """The settings in one sentence."""
    s = result["settings"]
    asked = (
        f"{s['replies']} replies a method in one batch, temperature {s['temperature']:g}, min-p {s['min_p']:g}, "
        f"weights {s['alpha']:g}, seed {s['seed']}; 95 % Wilson intervals"
    )
    if not all("timing" in record for record in result["methods"]):
        return f"{asked}."
    return f"{asked}; speed: tokens/s beside `direct`, median and range of {s['repeats']} repeats taken in turns."


def run(main: Callable[[Sequence[str] | None], None], argv: Sequence[str] | None = None) -> int:
    """Run an experiment; 0 when done, 2 after one line about what the caller can mend."""
    try:
        main(argv)
    except (PersonafastError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


class Steps:
    """A progress bar on stderr over a known number of steps."""

    def __init__(self, total: int) -> None:
        self._bar, self._total = progress_bar(), total

    def __enter__(self) -> Progress:
        self._bar.start()
        self._task = self._bar.add_task("loading the zoo", total=self._total)
        self._begun = -1
        return self._step

    def _step(self, what: str) -> None:
        self._begun += 1
        self._bar.update(self._task, description=what, completed=self._begun)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


def steps(methods: Sequence[Method], repeats: int) -> int:
    """How many steps `Stage.measure` takes."""
    runs = len(methods) + -(-(len(methods) - 1) // BETWEEN)
    return sum(method.exact for method in methods) + repeats * runs


@dataclass(frozen=True)
class Section:
    """One table of a report."""

    title: str
    columns: Sequence[Column]
    records: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Report:
    """What is said of a result, wherever it is said."""

    sections: Sequence[Section]
    findings: Sequence[str]
    draw: Callable[[Any], None]
    conditions: str | None = None  # instead of those of `conditions`


def deliver(args: argparse.Namespace, result: Mapping[str, Any], report: Report) -> None:
    """Print, write and draw a result as its options ask."""
    if args.json == "-":
        print(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        show(result, report)
    if args.json not in (None, "-"):
        write_json(Path(args.json), dict(result))
    if args.plot is not None:
        draw(report, Path(args.plot))
        print(f"The same as a plot: {args.plot}", file=sys.stderr)


def show(result: Mapping[str, Any], report: Report, console: Console | None = None) -> None:
    """Print the tables and what follows from them."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=160)
    for section in report.sections:
        table = _table(section, narrow=False)
        if console.measure(table, options=console.options.update_width(1000)).maximum > console.width:
            table = _table(section, narrow=True)
        console.print(table)
        console.print()
    for line in [_conditions(result, report).replace("`", ""), *report.findings]:
        console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _conditions(result: Mapping[str, Any], report: Report) -> str:
    return conditions(result) if report.conditions is None else report.conditions


def _table(section: Section, narrow: bool) -> Table:
    table = Table(
        title=section.title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False,
        padding=0 if narrow else (0, 1), collapse_padding=True,
    )  # fmt: skip
    for index, column in enumerate(section.columns):
        title = column.title.replace("[", "\\[")
        table.add_column(title.replace(" ", "\n") if narrow else title, justify="right" if index else "left")
    for record in section.records:
        table.add_row(*((narrow and column.short or column.cell)(record) for column in section.columns))
    return table


def draw(report: Report, path: Path) -> None:
    """Write a report's plot as a PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    report.draw(figure)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def markdown(result: Mapping[str, Any], report: Report) -> str:
    """The tables and findings of a report as Markdown."""
    blocks = []
    for section in report.sections:
        rows = [[column.title for column in section.columns], ["---", *["---:"] * (len(section.columns) - 1)]]
        rows += [[column.cell(record) for column in section.columns] for record in section.records]
        blocks.append(f"{section.title}:\n\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows))
    return "\n\n".join([*blocks, _conditions(result, report), *(f"- {line}" for line in report.findings)]).replace(
        "\n\n- ", "\n- "
    )


def percent(value: float | None, digits: int = 0) -> str:
    """A share in per cent; a dash where there is none."""
    return "-" if value is None else f"{100 * value:.{digits}f} %"


def interval(value: Mapping[str, float]) -> str:
    """A share with its limits."""
    return f"{100 * value['rate']:.0f} % [{100 * value['low']:.0f}, {100 * value['high']:.0f}]"


def points(value: Mapping[str, float]) -> str:
    """A difference of shares with its limits."""
    return f"{100 * value['rate']:+.0f} points (95 % interval {100 * value['low']:+.0f} to {100 * value['high']:+.0f})"


def speed(record: Mapping[str, Any]) -> float:
    """Tokens/s beside `direct`."""
    return float(record["timing"]["relative_to_direct"])


def forwards(record: Mapping[str, Any]) -> float:
    """Rows of one model run for a token that stays."""
    return float(record["forwards_per_token"])


JOINT = Column("all [95 %]", lambda r: interval(r["joint"]))
GRAMMAR = Column("grammar", lambda r: interval(r["grammar"]), lambda r: percent(r["grammar"]["rate"]))
SPEED = Column(
    "speed",
    lambda r: "{relative_to_direct:.2f} [{relative_low:.2f}, {relative_high:.2f}]".format(**r["timing"]),
    lambda r: f"{speed(r):.2f}",
)
TOKENS_PER_S = Column("tokens/s", lambda r: f"{r['timing']['tokens_per_s']:,.0f}")
FORWARDS = Column("forwards a token", lambda r: f"{forwards(r):.2f}")
PER_ROUND = Column("tokens a round", lambda r: f"{r['tokens_per_round']:.2f}")
ACCEPTANCE = Column("accepted", lambda r: percent(r["acceptance"]))
CLIPPED = Column("clipped", lambda r: percent(r["clipped_mass"], 1))


def trait_columns(traits: Sequence[str]) -> list[Column]:
    """Presence of each trait."""
    return [
        Column(
            name,
            lambda r, name=name: interval(r["traits"][name]),
            lambda r, name=name: percent(r["traits"][name]["rate"]),
        )
        for name in traits
    ]


def bars_of_joint(axes: Any, records: Sequence[Mapping[str, Any]]) -> None:
    """Joint presence with its interval as a bar a method, grammar as a mark."""
    for row, record in enumerate(records):
        joint = record["joint"]
        axes.barh(row, 100 * joint["rate"], color=COLOURS[0], height=0.6, alpha=0.35)
        axes.plot([100 * joint["low"], 100 * joint["high"]], [row, row], color=COLOURS[0], lw=2)
        axes.plot(100 * record["grammar"]["rate"], row, "|", color=COLOURS[1], ms=11, mew=2)
    axes.set_yticks(range(len(records)), [record["name"] for record in records], color=INK)
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.set_xlim(0, 102)
    axes.set_title("all traits at once, % (bar, 95 %)   |  grammar", size=10, color=INK)


def bars_of(axes: Any, records: Sequence[Mapping[str, Any]], value: Callable[[Any], float], title: str) -> None:
    """One number a method, written on its bar."""
    for row, record in enumerate(records):
        axes.barh(row, value(record), color=COLOURS[2], height=0.6, alpha=0.35)
        axes.text(0, row, f" {value(record):.2f}", va="center", size=9, color=INK)
    axes.set_yticks([])
    axes.set_ylim(len(records) - 0.5, -0.5)
    axes.set_title(title, size=10, color=INK)
