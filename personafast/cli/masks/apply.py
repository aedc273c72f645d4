"""`personafast masks apply`: a model and a mask become a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from personafast.cli.masks.common import check_model, mask_of

EXAMPLE = (
    "**A checkpoint that holds only what a persona keeps, and a word from it:**\n\n"
    "`personafast masks apply --model zoo --library my-masks --mask seek --output seek-model --compressed`\n\n"
    '`personafast generate --model seek-model --prompt "May I park here?"`'
)


def apply(
    model: Annotated[str, typer.Option(help="Checkpoint folder, hub name, or `zoo`.")],
    library: Annotated[Path, typer.Option(help="Library folder.")],
    mask: Annotated[str, typer.Option(metavar="NAME", help="The mask to apply.")],
    output: Annotated[Path, typer.Option(help="Folder of the new checkpoint; written whole or not at all.")],
    compressed: Annotated[
        bool,
        typer.Option("--compressed", help="Keep only the weights the mask keeps: for `generate` and load_compressed."),
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Replace a folder that holds something.")] = False,
    shard_size: Annotated[float, typer.Option(min=0.001, help="Largest file of weights, in GB.")] = 5.0,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, or for example cpu or cuda:0.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a checkpoint with the mask applied for good: a plain one that transformers loads, or a compressed one."""
    from personafast.cli.loading import load_model
    from personafast.library import PersonaLibrary
    from personafast.masks import export_compressed, export_masked
    from personafast.models.anatomy import anatomy

    found = PersonaLibrary.from_pretrained(library)
    chosen = mask_of(found, mask, library)
    net, tokenizer, _ = load_model(model, dtype, device, dense=True)
    check_model(library, found, anatomy(net).shape)
    size = int(shard_size * 1e9)
    if compressed:
        export_compressed(net, chosen, output, tokenizer=tokenizer, replace=replace, max_shard_bytes=size)
    else:
        export_masked(net, chosen, output, tokenizer=tokenizer, replace=replace, max_shard_size=size, in_place=True)
    weights = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    if as_json:
        facts = {
            "output": str(output),
            "kind": "compressed" if compressed else "masked",
            "mask": mask,
            "kept": chosen.kept,
            "gamma": chosen.gamma,
            "bytes": weights,
        }
        typer.echo(json.dumps(facts, indent=2, ensure_ascii=False))
        return
    typer.echo(f"{output}: {weights:,} bytes of weights, {100 * chosen.kept:.2f} % of the masked ones kept")
