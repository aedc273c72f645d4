"""`personafast vectors blend`: what a blend of vectors is like, and the blend as a vector of its own."""

from __future__ import annotations

import json
from dataclasses import replace as replace_fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from personafast.cli.options import assignments
from personafast.errors import PersonafastError

if TYPE_CHECKING:
    from personafast.vectors import BlendReport, BlockReport

MOST_BLOCKS = 4  # that are shown in full

EXAMPLE = """\
**Do two personas get on? Look before you blend:**

`personafast vectors blend --vector warm=1 --vector formal=0.5`

**Keep the blend, neither vector ruling and each adding only what is its own:**

`personafast vectors blend --library my-personas --vector warm=1 --vector formal=1 --normalize match
--orthogonalise symmetric --name warm-formal`
"""


def blend(
    vector: Annotated[
        list[str] | None, typer.Option(metavar="NAME=COEF", help="A vector and its coefficient; repeat to blend.")
    ] = None,
    library: Annotated[
        Path | None, typer.Option(help="Folder of a PersonaLibrary; the built-in model's own by default.")
    ] = None,
    normalize: Annotated[
        str,
        typer.Option(
            help="`none`: vectors as they are, so the longest rules. `unit`: each of norm 1 at every block. `match`: "
            "all at their mean norm, so that none rules and coefficients keep their size."
        ),
    ] = "none",
    orthogonalise: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="First make the vectors orthogonal, at their own norms: `symmetric` treats all alike, `gram_schmidt` "
            "keeps the first and takes from each what earlier ones have.",
        ),
    ] = None,
    block: Annotated[
        list[str] | None, typer.Option(metavar="N", help="Act at this block; repeat, or `all`; else each vector's own.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Save the blend in the library as a vector of this name.")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="Let --name take the place of a vector there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Report on a blend of vectors: which one rules, which pull against each other, what survives. Save it on request.

    Without --name nothing is written.
    """
    from personafast.cli.vectors.choosing import choose_blocks, choose_vectors, open_library
    from personafast.vectors import blend_report, blended_vector
    from personafast.vectors import orthogonalise as make_orthogonal

    coefficients = assignments("--vector", vector or [])
    if not coefficients:
        raise PersonafastError("--vector: none given; name at least one, as in --vector warm=1")
    if name is not None and library is None:
        raise PersonafastError(f"--name {name!r}: the built-in library is not written to; give --library FOLDER")
    opened = open_library(library)
    vectors = choose_vectors(opened, list(coefficients), "--vector")
    if name is not None and name in opened.vectors and not replace:
        raise PersonafastError(f"--name {name!r}: is in the library; give another name, or add --replace")
    if orthogonalise is not None:
        acting = [each for each, coefficient in coefficients.items() if coefficient]
        vectors |= make_orthogonal(vectors, acting, method=orthogonalise) if acting else {}
    blocks = choose_blocks(block or [], next(iter(vectors.values())).directions.shape[0])
    report = blend_report(vectors, coefficients, blocks=blocks, normalize=normalize)
    if name is not None:
        assert library is not None
        made = blended_vector(vectors, coefficients, blocks=blocks, normalize=normalize)
        if orthogonalise is not None:
            made = replace_fields(made, metadata={**made.metadata, "orthogonalise": orthogonalise})
        opened.add_vector(name, made)
        opened.save_pretrained(library)
    if as_json:
        typer.echo(json.dumps({**report.as_dict(), "orthogonalise": orthogonalise, "saved": name}, ensure_ascii=False))
        return
    show(report, Console())
    if name is not None:
        typer.echo(f"{library}: {name} saved")


def show(report: BlendReport, console: Console) -> None:
    """Print what every block holds, or of many blocks a line each and the one that loses most; then the warnings."""
    if len(report.blocks) > MOST_BLOCKS:
        _show_overview(report, console)
        _show_block(report, max(report.blocks, key=lambda block: block.cancelled), console)
    else:
        for block in report.blocks:
            _show_block(report, block, console)
    for warning in report.warnings:
        console.print(Text(f"! {warning}", style="bold"), soft_wrap=not console.is_terminal)
    if not report.warnings:
        console.print("Nothing to beware of: no two vectors oppose each other, none rules, little cancels.")


def _show_overview(report: BlendReport, console: Console) -> None:
    from personafast.cli.vectors.tables import print_grid

    names = [name for name in report.coefficients if any(name in block.norms for block in report.blocks)]
    cells = [
        [
            f"{block.norm:.2f}",
            f"{100 * block.cancelled:.0f} %",
            f"{block.ruler} {100 * block.shares[block.ruler]:.0f} %",
            *(_percent(block.survives.get(name)) for name in names),
        ]
        for block in report.blocks
    ]
    columns = ["norm", "cancelled", "longest", *(f"{name} survives" for name in names)]
    print_grid(console, "Every block", "block", [str(block.block) for block in report.blocks], columns, cells)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _show_block(report: BlendReport, block: BlockReport, console: Console) -> None:
    from personafast.cli.vectors.heat import cosine_cell
    from personafast.cli.vectors.tables import print_grid

    names = list(block.norms)
    cells: list[list[str | Text]] = []
    for name in names:
        cells.append(
            [
                f"{report.coefficients[name]:g}",
                f"{block.norms[name]:.2f}",
                f"{100 * block.shares[name]:.0f} %",
                _percent(block.survives[name]),
                *(cosine_cell(block.cosines[name][other], console) for other in names),
            ]
        )
    print_grid(
        console,
        f"Block {block.block}: norm {block.norm:.2f} of {sum(block.norms.values()):.2f}, "
        f"{100 * block.cancelled:.0f} % cancelled",
        "vector",
        names,
        ["coef", "norm", "share", "survives", *(f"cos {name}" for name in names)],
        cells,
    )
