"""`personafast vectors project`: how far every token of a text points along persona vectors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from personafast.cli.options import read_prompts
from personafast.cli.progress import progress_bar
from personafast.errors import PersonafastError

if TYPE_CHECKING:
    from personafast.vectors import Projection

EXAMPLE = """\
**Where does a reply sound warm, and where formal?**

`personafast vectors project --vector warm --vector formal --prompt "may i paint the bike?"
--text "my friend, you should paint the bike with love."`

**One persona through all blocks of your own model, as a figure:**

`personafast vectors project --model path/to/model --library my-personas --vector warm --block all
--texts-file replies.txt --plot warm.png`
"""


def project(
    text: Annotated[list[str] | None, typer.Option(help="A text to look at; may be repeated.")] = None,
    texts_file: Annotated[
        Path | None, typer.Option(help='One text a line, or a .jsonl file with {"text": ...} a line.')
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What the user says before: every text is then the assistant's reply to it.")
    ] = None,
    model: Annotated[
        str, typer.Option(help="Checkpoint folder, hub name, or `zoo`, the small built-in model.")
    ] = "zoo",
    library: Annotated[
        Path | None, typer.Option(help="Folder of a PersonaLibrary; with `zoo`, its own by default.")
    ] = None,
    vector: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A vector to project on; repeat for several, else all.")
    ] = None,
    block: Annotated[
        list[str] | None,
        typer.Option(metavar="N", help="Read the output of this block; repeat, or `all`; else where each vector acts."),
    ] = None,
    cosine: Annotated[
        bool, typer.Option("--cosine", help="Show cosines, which compare between blocks, instead of projections.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the heat map into this file.")] = None,
    dtype: Annotated[str, typer.Option(help="`auto`, `float32`, `bfloat16` or `float16`.")] = "auto",
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda` or `cuda:N`.")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts a forward pass.")] = 32,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with every number.")] = False,
) -> None:
    """Show, token by token, how far a text points along persona vectors: h . v / |v| at the output of a block.

    Every token stands above its numbers, on blue below zero and on red above.
    """
    from personafast.cli.vectors.choosing import choose_blocks, choose_vectors
    from personafast.cli.vectors.plotting import check_plot
    from personafast.library import PersonaLibrary

    check_plot(plot)
    texts = _texts(text, texts_file)
    if prompt is not None and not prompt.strip():
        raise PersonafastError("--prompt: the prompt is empty; say what the user asks, or leave it out")
    named = PersonaLibrary.from_pretrained(library) if library is not None else None

    from personafast.cli.loading import load_model
    from personafast.vectors import project as run

    network, tokenizer, own = load_model(model, dtype, device)
    if prompt is not None and tokenizer.chat_template is None:
        raise PersonafastError("--prompt: the model's tokenizer has no chat template; write all of it into --text")
    vectors = choose_vectors(named or own, vector or [], "--vector")
    blocks = choose_blocks(block or [], next(iter(vectors.values())).directions.shape[0])
    asked: list[Any] = list(texts)
    if prompt is not None:
        asked = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": each}] for each in texts]
    with progress_bar() as bar:
        task = bar.add_task("reading", total=len(texts))
        found = run(
            network,
            tokenizer,
            asked,
            vectors,
            blocks=blocks,
            batch_size=batch_size,
            on_texts=lambda count: bar.advance(task, count),
        )
    if plot is not None:
        from personafast.cli.vectors.project_figure import save

        save(found, cosine, plot)
    if as_json:
        typer.echo(
            json.dumps({"texts": [_record(*pair) for pair in zip(texts, found, strict=True)]}, ensure_ascii=False)
        )
        return
    from personafast.cli.vectors.project_text import show

    show(found, cosine, Console())
    if plot is not None:
        typer.echo(f"The same as a figure: {plot}")


def _texts(texts: Sequence[str] | None, path: Path | None) -> list[str]:
    if bool(texts) == (path is not None):
        raise PersonafastError("--text: give either --text TEXT or --texts-file FILE")
    if path is not None:
        return read_prompts(path, "--texts-file", "text")
    for text in texts or []:
        if not text.strip():
            raise PersonafastError("--text: the text is empty; give a text to look at")
    return list(texts or [])


def _record(text: str, found: Projection) -> Mapping[str, Any]:
    """One text as plain JSON values; `projections` and `cosines` are name -> [token][block]."""

    def plain(values: Mapping[str, Any]) -> dict[str, list[list[float]]]:
        return {
            name: [[float(f"{value:.6g}") for value in line] for line in each.tolist()] for name, each in values.items()
        }

    return {
        "text": text,
        "tokens": list(found.tokens),
        "ids": found.ids.tolist(),
        "response": found.response,
        "blocks": {name: list(blocks) for name, blocks in found.blocks.items()},
        "projections": plain(found.values),
        "cosines": plain(found.cosines),
    }
