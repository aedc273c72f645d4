"""`personafast vectors extract`: read persona vectors off a model."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personafast.cli.progress import progress_bar
from personafast.errors import PersonafastError

if TYPE_CHECKING:
    from personafast.library import PersonaLibrary
    from personafast.vectors import PersonaVector

EXAMPLE = """\
**A trait file, as the persona_vectors project writes them; run it again if it was interrupted:**

`personafast vectors extract --model path/to/instruct-model --traits evil=evil.json --library personas`

**Pairs of texts, one `{"positive": ..., "negative": ...}` a line, by repeng's method:**

`personafast vectors extract --pairs calm=calm.jsonl --method pca_center --positions response_last --library personas`
"""


def extract(
    library: Annotated[Path, typer.Option(help="Folder of a PersonaLibrary to add to, or to make.")],
    model: Annotated[
        str, typer.Option(help="Checkpoint folder, hub name, or `zoo`, the small built-in model.")
    ] = "zoo",
    traits: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="Trait file with instruction and questions; may be repeated."),
    ] = None,
    pairs: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]FILE", help="Pairs of texts, a .jsonl file; may be repeated."),
    ] = None,
    responses: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="POS.csv NEG.csv", help="Collected responses of both sides; needs `--name`."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Trait of `--responses`, and the column of its scores if there is one.")
    ] = None,
    method: Annotated[str, typer.Option(help="`mean_diff`, `pca_diff`, `pca_center` or `logistic`.")] = "mean_diff",
    positions: Annotated[
        str, typer.Option(help="`response_avg`, `prompt_avg`, `prompt_last` or `response_last`.")
    ] = "response_avg",
    scale: Annotated[
        str, typer.Option(help="`gap`: coefficient 1 spans the two sides' means. `unit`: length 1.")
    ] = "gap",
    block: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Block to act on unless a persona says otherwise, from 0; may be repeated."),
    ] = None,
    per_question: Annotated[
        int, typer.Option(min=1, help="Responses to every question under every pair of system prompts.")
    ] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest response, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="Divides the logits of responses; 0 takes the likeliest.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Draw responses from the likeliest tokens up to this sum.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Same seed, same responses, whatever the batch size.")] = 0,
    judge: Annotated[
        str | None,
        typer.Option(metavar="MODULE:FUNCTION", help="function(question, response, trait) -> score from 0 to 100."),
    ] = None,
    coherence: Annotated[str | None, typer.Option(metavar="MODULE:FUNCTION", help="The same for coherence.")] = None,
    threshold: Annotated[
        float, typer.Option(help="Least score of a positive response; negatives stay below 100 minus it.")
    ] = 50.0,
    coherence_threshold: Annotated[float, typer.Option(help="Least coherence of both responses of a pair.")] = 50.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts a forward; may change when a run is resumed.")] = 32,
    state: Annotated[
        Path | None,
        typer.Option(
            help="Folder to resume from; kept if given, else a hidden one beside the library, removed at the end."
        ),
    ] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Replace vectors that have these names.")] = False,
    dtype: Annotated[str, typer.Option(help="`auto`, `float32`, `bfloat16` or `float16`.")] = "auto",
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:N`.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Extract persona vectors from texts that show a trait and texts that do not.

    For a trait file the model first answers the questions itself, under the system prompts of both sides. An
    interrupted run goes on where it stopped when the command is given again.
    """
    from personafast.library import PersonaLibrary
    from personafast.vectors import Responses, Sampling, TextPairs, TraitPrompts, extract_vectors

    sources: dict[str, Any] = {}
    for option, values, read in (
        ("--traits", traits, TraitPrompts.from_file),
        ("--pairs", pairs, TextPairs.from_jsonl),
    ):
        for value in values or []:
            trait, path = _named(value)
            _once(option, trait, sources)
            sources[trait] = read(path)
    if (responses is None) != (name is None):
        raise PersonafastError("--responses and --name go together; give both, the trait's name and its two CSV files")
    if responses is not None and name is not None:
        _once("--name", name, sources)
        sources[name] = Responses.from_csv(*responses, name)
    if not sources:
        raise PersonafastError("--traits: nothing to extract from; give --traits, --pairs or --responses")
    sampling = Sampling(per_question, max_new_tokens, temperature, top_p, seed)
    judges = {"judge": _callable("--judge", judge), "coherence": _callable("--coherence", coherence)}
    named = PersonaLibrary.from_pretrained(library) if library.is_dir() and any(library.iterdir()) else None
    taken = sorted(set(sources) & set(named.vectors)) if named is not None else []
    if taken and not replace:
        raise PersonafastError(
            f"--library {library}: has {', '.join(taken)} already; add --replace, or take another name"
        )

    from personafast.cli.loading import load_model
    from personafast.models.anatomy import anatomy
    from personafast.vectors.state import trait_folder

    network, tokenizer, _ = load_model(model, dtype, device)
    parts = anatomy(network)
    if named is None:
        named = PersonaLibrary(parts.shape)
    named.check(parts)
    work = state or library.resolve().parent / f".{library.resolve().name}.extract"
    with progress_bar() as bar:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done)

        found = extract_vectors(
            network,
            tokenizer,
            sources,
            method=method,
            positions=positions,
            scale=scale,
            blocks=tuple(block or ()),
            batch_size=batch_size,
            sampling=sampling,
            threshold=threshold,
            coherence_threshold=coherence_threshold,
            state=work,
            on_progress=show,
            **judges,
        )
    _save(named, found, library)
    if state is None:
        for trait in found:
            shutil.rmtree(trait_folder(work, trait), ignore_errors=True)
        if not any(work.iterdir()):
            work.rmdir()
    _report(found, library, as_json)


def _named(value: str) -> tuple[str, Path]:
    """(name, file) of "name=file", or of a file alone, whose name is then the trait's, without "trait_"."""
    name, separator, path = value.partition("=")
    if separator and "/" not in name:
        return name, Path(path)
    return Path(value).stem.removeprefix("trait_"), Path(value)


def _once(option: str, name: str, sources: Mapping[str, Any]) -> None:
    if name in sources:
        raise PersonafastError(f"{option}: the trait {name!r} is given twice; name one of them otherwise, as NAME=FILE")


def _callable(option: str, place: str | None) -> Any:
    if place is None:
        return None
    module, separator, name = place.partition(":")
    if not separator or not module or not name:
        raise PersonafastError(f"{option} {place!r}: expected MODULE:FUNCTION, as in 'my_judges:score'")
    # A script's own folder is importable, the folder a command is run in is not.
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise PersonafastError(f"{option} {place!r}: cannot be imported ({error}); check the names") from None
    finally:
        sys.path.pop(0)
    if not callable(found):
        raise PersonafastError(f"{option} {place!r}: is not callable; name a function")
    return found


def _save(library: PersonaLibrary, found: Mapping[str, PersonaVector], folder: Path) -> None:
    for name, vector in found.items():
        library.add_vector(name, vector)
    library.save_pretrained(folder)


def _report(found: Mapping[str, PersonaVector], folder: Path, as_json: bool) -> None:
    if as_json:
        cards = {
            name: {"blocks": list(vector.blocks), "norms": [round(norm, 4) for norm in vector.norms.tolist()]}
            | dict(vector.metadata)
            for name, vector in found.items()
        }
        typer.echo(json.dumps({"library": str(folder), "vectors": cards}, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for name, vector in found.items():
        facts: Any = vector.metadata
        table = Table(title=f"{name}: {facts['method']} at {facts['positions']}", title_justify="left")
        for heading in ("block", "norm", "split-half cosine", "separation", ""):
            table.add_column(heading, justify="left" if heading == "" else "right")
        for block, norm in enumerate(vector.norms.tolist()):
            notes = ["acts here"] * (block in vector.blocks) + ["separates best"] * (block == facts["best_block"])
            figures = [facts[key][block] for key in ("split_half_cosine", "separation")]
            shown = ["-" if figure is None else f"{figure:.2f}" for figure in figures]
            table.add_row(str(block), f"{norm:.3f}", *shown, ", ".join(notes))
        console.print(table)
        console.print(_counts(facts), highlight=False, soft_wrap=True)
    console.print(f"{folder}: {', '.join(found)} added", highlight=False, soft_wrap=True)


def _counts(facts: Mapping[str, Any]) -> str:
    line = f"{facts['positive']} positive and {facts['negative']} negative texts"
    counts = facts.get("filter")
    if counts is None:
        return line
    dropped = [
        f"{counts[key]} {what}" for key, what in (("empty", "empty"), ("filtered", "filtered")) if counts.get(key)
    ]
    return f"{line}: {counts['kept']} of {counts['pairs']} pairs kept" + (f", {', '.join(dropped)}" if dropped else "")
