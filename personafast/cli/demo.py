"""`personafast demo`: every method on the built-in model, side by side."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from personafast.cli.options import finite
from personafast.cli.progress import progress_bar
from personafast.errors import PersonafastError

EXAMPLE = """\
**Compare two other traits and keep the figures:**

`personafast demo --traits casual,precise --json > figures.json`
"""


def demo(
    replies: Annotated[int, typer.Option(min=1, help="Replies a method; 400 give intervals of about ±4 points.")] = 400,
    traits: Annotated[
        str | None, typer.Option(help="Comma-separated traits to blend; `personafast zoo info` lists them.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Weight of every policy; 1 is each trait at full strength.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="The same min-p for every method.")] = 0.05,
    temperature: Annotated[float, typer.Option(help="The same temperature for every method.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same replies.")] = 0,
    output: Annotated[Path, typer.Option(help="Where to draw the figure.")] = Path("personafast-demo.png"),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and draw nothing.")] = False,
) -> None:
    """Compare every way to blend traits, in under a minute, offline, without a GPU.

    The built-in model answers the same questions by each method. Detectors count which traits show in a reply, all of
    them at once, and a grammar that knows nothing of traits judges fluency.
    """
    finite("--alpha", alpha, low=0.0)
    finite("--min-p", min_p, low=0.0, high=1.0)
    if finite("--temperature", temperature, low=0.0) == 0:
        raise PersonafastError("--temperature 0: the methods are compared by drawing; give a number above 0")
    chosen = None if traits is None else [name.strip() for name in traits.split(",")]
    draws = not as_json and importlib.util.find_spec("matplotlib") is not None
    if draws and not output.parent.is_dir():
        raise PersonafastError(f"--output {output}: the folder {output.parent} does not exist; make it first")

    result = run(replies=replies, chosen=chosen, alpha=alpha, min_p=min_p, temperature=temperature, seed=seed)
    if as_json:
        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
        return
    from personafast.cli.demo_table import show

    show(result)
    if draws:
        from personafast.cli.demo_figure import save

        save(result, output)
        typer.echo(f"The same as a figure: {output}")
    else:
        typer.echo("No figure: matplotlib is missing; `pip install personafast[eval]` brings it.", err=True)


def run(
    *, replies: int, chosen: list[str] | None, alpha: float, min_p: float, temperature: float, seed: int
) -> dict[str, Any]:
    """Measure every method on the zoo, with a progress bar over methods."""
    from personafast import zoo
    from personafast.evaluate.demo import METHOD_NAMES, measure
    from personafast.zoo.grammar import is_grammatical
    from personafast.zoo.traits import TRAITS

    with progress_bar() as bar:
        task = bar.add_task("loading the model", total=len(METHOD_NAMES))
        model, tokenizer, library = zoo.load()

        def progress(name: str) -> None:
            bar.update(task, description=f"{name}: {replies} replies", completed=METHOD_NAMES.index(name))

        return measure(
            model,
            tokenizer,
            library,
            chosen=list(zoo.DEMO_TRAITS) if chosen is None else chosen,
            traits=TRAITS,
            questions=zoo.prompts(replies, seed),
            is_grammatical=is_grammatical,
            alpha=alpha,
            min_p=min_p,
            temperature=temperature,
            seed=seed,
            progress=progress,
        )
