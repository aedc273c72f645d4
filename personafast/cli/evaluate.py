"""`personafast eval choice`: which of two answers a model, a mask or a steered model gives."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personafast.cli.options import assignments
from personafast.cli.progress import progress_bar
from personafast.errors import FormatError, PersonafastError

if TYPE_CHECKING:
    from personafast.evaluate.choice import Choices
    from personafast.persona import Persona

app = typer.Typer(help="Measure how well a persona shows.", no_args_is_help=True)

DENSE = "dense"

EXAMPLE = """\
**Do two opposing masks move the answers, and what do they cost in general ability?**

`personafast eval choice --items power_test_mc.csv --model path/to/model --library personas/ --mask seek --mask reject
--text held_out.txt`

**The same with a persona prompt beside them, for a script:**

`personafast eval choice --items mcqa.json --model path/to/model --system "You are an introvert." --label I --json`
"""


@app.callback()
def _group() -> None:
    """Measure how well a persona shows."""


@app.command("choice", epilog=EXAMPLE)
def choice(
    items: Annotated[
        Path, typer.Option(help="CSV of `question, A, B, matching` or `question, matching, not_matching`, or JSON.")
    ],
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub name, or `zoo`.")] = "zoo",
    library: Annotated[
        Path | None, typer.Option(help="Folder of a PersonaLibrary; with `zoo`, its own by default.")
    ] = None,
    mask: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Measure this mask of the library; repeat for more.")
    ] = None,
    vector: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=COEF", help="Measure this blend of persona vectors; repeat to blend."),
    ] = None,
    system: Annotated[
        str | None, typer.Option(help="A persona prompt: everybody is measured without it and with it.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="Label to count: `matching`, or a pole such as `I`; all of them by default."),
    ] = None,
    normalise: Annotated[
        str, typer.Option(help="An answer's log-probability by `token`, by `character`, or `none`.")
    ] = "token",
    text: Annotated[
        Path | None, typer.Option(help="Held-out text, whose perplexity says what general ability costs.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens of a window of the held-out text.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers scored at once.")] = 32,
    dtype: Annotated[str, typer.Option(help="`auto`, `float32`, `bfloat16` or `float16`.")] = "auto",
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:N`.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Two-way choice items: how often each speaker prefers the answer that shows a trait.

    An answer's score is its length-normalised log-probability as the reply to the question; the likelier one is the
    choice, and a tie is neither. The dense model is always measured; differences to it are over the same items.
    """
    from personafast.cli.loading import load_model
    from personafast.evaluate.choice import NORMALISATIONS
    from personafast.evaluate.items import read_items
    from personafast.handle import attach
    from personafast.library import PersonaLibrary

    if normalise not in NORMALISATIONS:
        raise PersonafastError(f"--normalise {normalise!r}: choose one of {', '.join(NORMALISATIONS)}")
    asked = read_items(items)
    labels = _labels(items, {name for item in asked for name in item.labels}, label or [])
    held_out = _text(text)
    speakers = _speakers(mask or [], assignments("--vector", vector or []))
    net, tokenizer, own = load_model(model, dtype, device)
    if library is not None:
        own = PersonaLibrary.from_pretrained(library)
    prompts = [None] if system is None else [None, system]
    settings = {"normalise": normalise, "batch_size": batch_size}
    found: list[tuple[dict[str, Any], Choices]] = []
    with attach(net, own, tokenizer=tokenizer) as handle, _bar(len(asked) * len(speakers) * len(prompts)) as step:
        for name, persona in speakers.items():
            with handle.using([persona]):
                for prompt in prompts:
                    row = {"speaker": name, "system": prompt is not None}
                    found.append((row, _choices(net, tokenizer, asked, prompt, settings, name, step)))
                if held_out is not None:
                    found[-len(prompts)][0]["perplexity"] = _perplexity(net, tokenizer, held_out, window)
    report = _report(found, labels)
    apart = _mask_differences(own, mask or [])
    if apart:
        report["mask_differences"] = apart
    report = {"items": str(items), "count": len(asked), "model": model, "system": system, **settings, **report}
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _show(report, labels)


def _choices(
    net: Any, tokenizer: Any, asked: Sequence[Any], prompt: str | None, settings: Any, name: str, step: Any
) -> Choices:
    from personafast.evaluate.choice import choose

    begun = step(name, 0)
    return choose(net, tokenizer, asked, system=prompt, on_items=lambda done: step(name, done, begun), **settings)


def _perplexity(net: Any, tokenizer: Any, held_out: str, window: int) -> dict[str, float]:
    from personafast.evaluate.perplexity import perplexity

    return perplexity(net, tokenizer, held_out, window=window)._asdict()


def _speakers(masks: Sequence[str], vectors: Mapping[str, float]) -> dict[str, Persona | None]:
    from personafast.persona import Persona

    speakers: dict[str, Persona | None] = {DENSE: None}
    for name in masks:
        if f"mask {name}" in speakers:
            raise PersonafastError(f"--mask {name}: given twice; name it once")
        speakers[f"mask {name}"] = Persona(mask=name)
    if vectors:
        blend = " + ".join(f"{coefficient:g} {name}" for name, coefficient in vectors.items())
        speakers[f"vectors {blend}"] = Persona(vectors=vectors)
    return speakers


def _labels(path: Path, known: set[str], wanted: Sequence[str]) -> list[str]:
    from personafast.evaluate.items import MATCHING, OTHER

    for name in wanted:
        if name not in known:
            raise PersonafastError(f"--label {name!r}: no item of {path} has it; there are {', '.join(sorted(known))}")
    if wanted:
        return list(dict.fromkeys(wanted))
    # The other answer's share is what is left.
    return [MATCHING] if known == {MATCHING, OTHER} else sorted(known)


def _mask_differences(library: Any, names: Sequence[str]) -> list[dict[str, Any]]:
    """In what share of the weights each two of the masks differ, by class of modules and in all."""
    from personafast.masks.report import differences, totals

    return [
        {
            "first": first,
            "second": second,
            **{row.path: row.share for row in totals(differences(library.masks[first], library.masks[second]))},
        }
        for first, second in combinations(names, 2)
    ]


def _text(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise FormatError(f"--text {path}: no such file; check the path") from None
    except UnicodeDecodeError:
        raise FormatError(f"--text {path}: not UTF-8 text; save it as UTF-8") from None


@contextlib.contextmanager
def _bar(total: int) -> Iterator[Any]:
    """Gives `step(name, done, begun)`, which moves a bar and returns how far it had come."""
    with progress_bar() as bar:
        task = bar.add_task("loading", total=total)
        reached = 0

        def step(name: str, done: int, begun: int | None = None) -> int:
            nonlocal reached
            reached = (reached if begun is None else begun) + done
            bar.update(task, description=name, completed=reached)
            return reached

        yield step


def _report(found: Sequence[tuple[dict[str, Any], Choices]], labels: Sequence[str]) -> dict[str, Any]:
    """Shares of every label by speaker, and their differences to the dense model without the persona prompt."""
    baseline = found[0][1]
    rows = []
    for row, choices in found:
        entry: dict[str, Any] = {**row, "labels": {}}
        for name in labels:
            share = choices.share(name)._asdict()
            figures = {**share, "items": len(choices.hits(name)), "margin": choices.margin(name)}
            if choices is not baseline:
                figures["less_dense"] = choices.less(baseline, name)._asdict()
            entry["labels"][name] = figures
        rows.append(entry)
    return {"rows": rows}


def _show(report: Mapping[str, Any], labels: Sequence[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['count']} items of {report['items']}", title_justify="left")
    table.add_column("speaker")
    for name in labels:
        for heading in (f"{name} [95 %]", "less dense", "margin"):
            table.add_column(heading, justify="right")
    if any("perplexity" in row for row in report["rows"]):
        table.add_column("perplexity [95 %]", justify="right")
    for row in report["rows"]:
        cells = [row["speaker"] + (" + prompt" if row["system"] else "")]
        for name in labels:
            figures = row["labels"][name]
            less = figures.get("less_dense")
            cells += [_percent(figures), "" if less is None else _points(less), f"{figures['margin']:+.3f}"]
        if "perplexity" in row:
            value = row["perplexity"]
            cells.append(f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]")
        table.add_row(*cells)
    console = Console()
    console.print(table)
    if "mask_differences" in report:
        _show_differences(console, report["mask_differences"])


def _show_differences(console: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table

    classes = list(dict.fromkeys(key for row in rows for key in row if key not in ("first", "second")))
    table = Table(title="Masks differ in % of weights", title_justify="left")
    table.add_column("masks")
    for name in classes:
        table.add_column(name, justify="right")
    for row in rows:
        shares = (f"{100 * row[name]:.3f}" if name in row else "" for name in classes)
        table.add_row(f"{row['first']}, {row['second']}", *shares)
    console.print(table)


def _percent(value: Mapping[str, float]) -> str:
    return f"{100 * value['rate']:.1f} % \\[{100 * value['low']:.0f}, {100 * value['high']:.0f}]"


def _points(value: Mapping[str, float]) -> str:
    return f"{100 * value['rate']:+.1f} \\[{100 * value['low']:+.0f}, {100 * value['high']:+.0f}]"
