"""`personafast masks build`: calibration texts in, masks of a library out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personafast.cli.masks.common import check_model
from personafast.cli.options import assignments
from personafast.cli.progress import progress_bar
from personafast.errors import PersonafastError

if TYPE_CHECKING:
    from personafast.masks import CalibrationStatistics, PersonaMask

EXAMPLE = (
    "**Two opposing masks of the built-in model from one file of answers:**\n\n"
    "`personafast masks build --model zoo --csv power.csv --against power.csv --name seek --opposite reject "
    "--library my-masks --sparsity attention=0.3,mlp=0.5`"
)


def build(
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub name, or `zoo`.")],
    name: Annotated[str, typer.Option(help="Name of the mask in the library.")],
    library: Annotated[Path, typer.Option(help="Library folder to add it to; made if it is not there.")],
    texts: Annotated[
        Path | None,
        typer.Option(help="The persona's texts: one a line (or paragraphs), or a .jsonl or .json file of records."),
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="The persona's texts as a table with columns question, matching, not_matching.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="The opposing persona's texts; of the file given above, its other side. Its mask is written too."
        ),
    ] = None,
    opposite: Annotated[
        str | None, typer.Option(help="Name of the opposing persona's mask; not-NAME if not given.")
    ] = None,
    containing: Annotated[str, typer.Option(help="Use only texts whose prompt holds this.")] = "",
    score: Annotated[
        str | None,
        typer.Option(
            help="wanda, contrastive_wanda, contrastive_sparse, magnitude or random; by default wanda, and with "
            "--against contrastive_wanda."
        ),
    ] = None,
    statistic: Annotated[str, typer.Option(help="mean_abs, l2 or sample_l2.")] = "mean_abs",
    group: Annotated[str, typer.Option(help="Compare weights within a row, a layer, or global.")] = "row",
    sparsity: Annotated[
        str, typer.Option(help="Share dropped: a number, or by class and path, as in attention=0.3,mlp=0.6.")
    ] = "0.5",
    gamma: Annotated[float, typer.Option(help="What dropped weights are multiplied with: 0 drops them whole.")] = 0.0,
    tokens: Annotated[str, typer.Option(help="Count the tokens of the `response`, or `all`.")] = "response",
    experts: Annotated[bool, typer.Option("--experts", help="Also mask experts fused into one parameter.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the score `random`.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts at once.")] = 16,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of a text that are used, from its start.")] = 512,
    statistics: Annotated[
        Path | None,
        typer.Option(help="File that the statistics are kept in; an interrupted calibration goes on from it."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, or for example cpu or cuda:0.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Cut a persona's subnetwork out of a model: which weights its texts use most. No training.

    With --against, both personas get masks, each against the other.
    """
    from personafast.cli.loading import load_model
    from personafast.library import PersonaLibrary
    from personafast.masks import PersonaMask, build_mask, build_opposing_masks, read_texts
    from personafast.masks.build import check_options
    from personafast.masks.sparsity import resolve
    from personafast.masks.targets import find_targets
    from personafast.models.anatomy import anatomy

    source = _source(texts, csv)
    # Whatever can be refused is refused before the calibration, which may take hours.
    score = score or ("wanda" if against is None else "contrastive_wanda")
    check_options(score=score, statistic=statistic, group=group, gamma=gamma, seed=seed)
    if against is None and score.startswith("contrastive"):
        raise PersonafastError(f"--score {score}: needs the opposing persona's texts; give --against")
    if against is None and opposite is not None:
        raise PersonafastError("--opposite: names the mask of --against; give both")
    wanted = _sparsity(sparsity)
    own = read_texts(source, containing=containing)
    other = None
    opposite = opposite or f"not-{name}"
    if against is not None:
        same = against.resolve() == source.resolve()
        other = read_texts(against, side="negative" if same else "positive", containing=containing)
        if len(other) != len(own):
            raise PersonafastError(f"--against {against}: {len(other)} texts against {len(own)}; give equally many")
        if opposite == name:
            raise PersonafastError(f"--opposite {opposite!r}: is the mask's own name; give another")
    for key in (name, opposite):
        PersonaLibrary().add_mask(key, PersonaMask({}, {}))  # refuses what cannot be a name
    target = PersonaLibrary.from_pretrained(library) if (library / "library.json").is_file() else None

    net, tokenizer, _ = load_model(model, dtype, device, dense=True)
    shape = anatomy(net).shape
    if target is None:
        target = PersonaLibrary(shape)
    check_model(library, target, shape)
    resolve(net, find_targets(net), wanted)
    common: dict[str, Any] = {"tokens": tokens, "batch_size": batch_size, "max_length": max_length}
    gathered = _gather(net, tokenizer, own, statistics, name, common)
    options: dict[str, Any] = {
        "score": score,
        "statistic": statistic,
        "group": group,
        "sparsity": wanted,
        "gamma": gamma,
        "seed": seed,
        "experts": experts,
    }
    made = {}
    if other is None:
        made[name] = build_mask(net, gathered, **options)
    else:
        file = statistics and statistics.with_name(f"{statistics.stem}.opposite{statistics.suffix}")
        opposing = _gather(net, tokenizer, other, file, opposite, common)
        made[name], made[opposite] = build_opposing_masks(net, gathered, opposing, **options)
    for key, mask in made.items():
        target.add_mask(key, mask)
    target.save_pretrained(library)
    _report(made, library, gathered, as_json)


def _source(texts: Path | None, csv: Path | None) -> Path:
    if (texts is None) == (csv is None):
        raise PersonafastError("--texts, --csv: give the persona's texts by one of them")
    source = texts or csv
    assert source is not None
    if csv is not None and csv.suffix != ".csv":
        raise PersonafastError(f"--csv {csv}: not a .csv file; give other files with --texts")
    return source


def _sparsity(text: str) -> float | dict[str, float]:
    try:
        return float(text)
    except ValueError:
        return assignments("--sparsity", [part.strip() for part in text.split(",")])


def _gather(
    net: Any, tokenizer: Any, texts: list[Any], file: Path | None, name: str, options: dict[str, Any]
) -> CalibrationStatistics:
    from personafast.masks import calibrate

    with progress_bar() as bar:
        task = bar.add_task(f"calibrate {name}", total=None)

        def report(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        return calibrate(net, tokenizer, texts, progress=report, save_to=file, **options)


def _report(made: dict[str, PersonaMask], library: Path, gathered: CalibrationStatistics, as_json: bool) -> None:
    facts = {
        "library": str(library),
        "texts": gathered.samples,
        "tokens": gathered.tokens,
        "masks": {
            name: {
                "kept": mask.kept,
                "linears": len(mask.words),
                "bytes": sum(words.numel() * words.element_size() for words in mask.words.values()),
                **mask.metadata,
            }
            for name, mask in made.items()
        },
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    for name, mask in made.items():
        typer.echo(f"{name}: keeps {100 * mask.kept:.2f} % of {len(mask.words)} linears, in {library}")
        for key, what in (
            ("left_out", "left out, experts fused into one parameter"),
            ("unseen", "reached by no token"),
        ):
            listed = mask.metadata.get(key)
            if isinstance(listed, list):
                typer.echo(f"{what}: {', '.join(listed)}", err=True)
    if len(made) == 2:
        first, second = made.values()
        both = sum(first.size_of(path) for path in first.words)
        differ = sum(first.difference(second).kept_of(p) + second.difference(first).kept_of(p) for p in first.words)
        typer.echo(f"they differ in {100 * differ / both:.2f} % of the weights; Jaccard {first.overlap(second):.4f}")
