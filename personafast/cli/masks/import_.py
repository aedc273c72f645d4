"""`personafast masks import`: masks in the authors' files become masks of a library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from personafast.cli.masks.common import check_model
from personafast.errors import PersonafastError

EXAMPLE = (
    "**The masks that the authors' script wrote, as `power-seek` and `power-reject` of a library:**\n\n"
    "`personafast masks import masks_power/ --model path/to/llama-2-7b --library my-masks --name power "
    "--leave-out lm_head`"
)


def import_(
    folder: Annotated[Path, typer.Argument(help="Folder of M_seek_*.pt and M_reject_*.pt, a file a linear.")],
    model: Annotated[str, typer.Option(help="Checkpoint folder or hub name of the model they were made from.")],
    library: Annotated[Path, typer.Option(help="Library folder to add them to; made if it is not there.")],
    name: Annotated[
        str, typer.Option(help="Name of the mask; where the folder holds several personas, NAME-seek and so on.")
    ],
    persona: Annotated[str | None, typer.Option(help="Take only this one: seek or reject.")] = None,
    leave_out: Annotated[
        list[str] | None, typer.Option(help="Skip modules of this name or pattern, such as lm_head; may be repeated.")
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Accept a folder that lacks linears; those keep all their weights.")
    ] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, or for example cpu or cuda:0.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Read masks that the authors of persona subnetworks saved: bool [out, in], one byte a weight."""
    from personafast.cli.loading import load_model
    from personafast.library import PersonaLibrary
    from personafast.masks import read_authors_masks
    from personafast.models.anatomy import anatomy

    if not folder.is_dir():
        raise PersonafastError(f"{folder}: no such folder; give the folder that holds M_seek_*.pt")
    target = PersonaLibrary.from_pretrained(library) if (library / "library.json").is_file() else None
    net, _, _ = load_model(model, dtype, device, dense=True)
    shape = anatomy(net).shape
    if target is None:
        target = PersonaLibrary(shape)
    check_model(library, target, shape)
    found = read_authors_masks(folder, net, partial=partial, leave_out=leave_out or ())
    if persona is not None:
        if persona not in found:
            raise PersonafastError(f"--persona {persona!r}: {folder} holds {', '.join(sorted(found))}")
        found = {persona: found[persona]}
    named = {name if len(found) == 1 else f"{name}-{key}": mask for key, mask in sorted(found.items())}
    for key, mask in named.items():
        target.add_mask(key, mask)
    target.save_pretrained(library)
    if as_json:
        facts = {key: {"kept": mask.kept, "linears": len(mask.words), **mask.metadata} for key, mask in named.items()}
        typer.echo(json.dumps({"library": str(library), "masks": facts}, indent=2, ensure_ascii=False))
        return
    for key, mask in named.items():
        typer.echo(f"{key}: keeps {100 * mask.kept:.2f} % of {len(mask.words)} linears, in {library}")
