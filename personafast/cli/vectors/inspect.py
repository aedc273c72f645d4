"""`personafast vectors inspect`: how long vectors are, and how alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from personafast.errors import PersonafastError

if TYPE_CHECKING:
    from personafast.vectors import PersonaVector

EXAMPLE = """\
**Which personas of the built-in model are alike, and which opposed?**

`personafast vectors inspect --plot vectors.png`

**Three vectors of your own, compared at block 12:**

`personafast vectors inspect warm formal casual --library my-personas --block 12`
"""


def inspect(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Vectors to look at; else all.")
    ] = None,
    library: Annotated[
        Path | None, typer.Option(help="Folder of a PersonaLibrary; the built-in model's own by default.")
    ] = None,
    block: Annotated[
        str | None, typer.Option(metavar="N", help="Compare directions here; else where most of them act.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw norms and cosines into this file.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object, with the cosines of every block.")
    ] = False,
) -> None:
    """Show where vectors act, their norms at every block, and the cosines between them."""
    from personafast.cli.vectors.choosing import choose_blocks, choose_vectors, open_library, usual_block
    from personafast.cli.vectors.plotting import check_plot
    from personafast.vectors.blend import check_shapes

    check_plot(plot)
    vectors = choose_vectors(open_library(library), names or [], "NAME")
    check_shapes(vectors)
    count = next(iter(vectors.values())).directions.shape[0]
    if block == "all":
        raise PersonafastError("--block all: directions are compared at one block; give its number, or --json for all")
    asked = choose_blocks([block] if block is not None else [], count)
    facts = measure(vectors, asked[0] if asked else usual_block(list(vectors.values())))
    if plot is not None:
        from personafast.cli.vectors.inspect_figure import save

        save(facts, plot)
    if as_json:
        typer.echo(json.dumps(facts, ensure_ascii=False))
        return
    show(facts, Console())
    if plot is not None:
        typer.echo(f"The same as a figure: {plot}")


def measure(vectors: Mapping[str, PersonaVector], block: int) -> dict[str, Any]:
    """Everything there is to see, as plain JSON values; `cosines` is [block][vector][vector], None where undefined."""
    import torch

    from personafast.vectors import cosines
    from personafast.vectors.similarity import number

    stacked = torch.stack([vector.directions for vector in vectors.values()])
    return {
        "block": block,
        "vectors": {
            name: {
                "blocks": list(vector.blocks),
                "hook_point": vector.hook_point,
                "missing": {str(missing): why for missing, why in vector.missing.items()},
                "metadata": dict(vector.metadata),
                "norms": [float(f"{norm:.6g}") for norm in vector.norms.tolist()],
            }
            for name, vector in vectors.items()
        },
        "cosines": [
            [
                [None if number(value) is None else round(value, 6) for value in line]
                for line in cosines(stacked[:, index]).tolist()
            ]
            for index in range(stacked.shape[1])
        ],
    }


def show(facts: Mapping[str, Any], console: Console) -> None:
    """Print where the vectors come from, their norms and their cosines."""
    from personafast.cli.vectors.heat import cosine_cell
    from personafast.cli.vectors.tables import print_grid

    vectors, names, block = facts["vectors"], list(facts["vectors"]), facts["block"]
    columns = ["acts at", "read at", "method"]
    origins = [
        [_runs(vector["blocks"]), vector["hook_point"], str(vector["metadata"].get("method", "not said"))]
        for vector in vectors.values()
    ]
    print_grid(console, "Vectors", "", names, columns, origins)
    count = len(facts["cosines"])
    longest = max(max(vector["norms"]) for vector in vectors.values())
    digits = next((digits for digits, below in ((4, 1), (2, 100), (1, 1000)) if longest < below), 0)
    norms = [
        [
            "- "
            if str(index) in vector["missing"]
            else f"{vector['norms'][index]:.{digits}f}{'*' if index in vector['blocks'] else ' '}"
            for vector in vectors.values()
        ]
        for index in range(count)
    ]
    print_grid(console, "Norms by block (* acts here)", "block", [str(index) for index in range(count)], names, norms)
    table = [[cosine_cell(cosine, console) for cosine in line] for line in facts["cosines"][block]]
    print_grid(console, f"Cosines at block {block}", "", names, names, table)


def _runs(blocks: list[int]) -> str:
    """0, 1, 2, 5 as "0-2, 5"."""
    runs: list[list[int]] = []
    for block in sorted(set(blocks)):
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
