"""Files of the persona_vectors project (arXiv 2507.21509): one bare tensor a trait, saved by torch.

`{trait}_{response_avg|prompt_avg|prompt_last}_diff.pt` holds float32 [num_layers + 1, hidden], row L read from
`hidden_states[L]` of transformers: row 0 is the embedding, row L the output of the 0-based block L - 1, and the last
row is the output of the last block *after the final norm*. A vector is added before that norm, where the state has
another scale and another direction, so there is no usable row for the last block: it is imported as missing, and
exported as zeros. Its own `--layer L` adds row L to the output of block L - 1 (`--layer 0` to that of the last block).
"""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

import torch

from personafast._io import atomic_path
from personafast.errors import FormatError
from personafast.models.anatomy import ModelShape
from personafast.vectors.formats.fit import MAX_BLOCKS, fit
from personafast.vectors.vector import BLOCK_OUTPUT, PersonaVector

POSITIONS = ("response_avg", "prompt_avg", "prompt_last")
POST_NORM = "the post-norm row of a persona_vectors file"
_NAME = re.compile(rf"(?P<trait>.+)_(?P<positions>{'|'.join(POSITIONS)})_diff\.pt")


def read_folder(folder: Path, shape: ModelShape | None) -> dict[str, PersonaVector]:
    """Every `*_diff.pt` of a folder, by trait; by trait and position mode where a trait has several of them.

    Raises:
        FormatError: as `read_file`, or no file of that name.
    """
    files = [(match, path) for path in sorted(folder.iterdir()) if (match := _NAME.fullmatch(path.name))]
    if not files:
        raise FormatError(f"{folder}: no file is named like trait_response_avg_diff.pt; give the .pt file itself")
    traits = [match["trait"] for match, _ in files]
    found = {}
    for match, path in files:
        trait = match["trait"]
        name = trait if traits.count(trait) == 1 else f"{trait}_{match['positions']}"
        found[name] = read_file(path, shape)[1]
    return found


def read_file(path: Path, shape: ModelShape | None) -> tuple[str, PersonaVector]:
    """The trait that the file name tells (or its stem), and the vector.

    Raises:
        FormatError: truncated, more than one bare floating point tensor [num_layers + 1, hidden], NaN or infinity, or
            another shape than the model's.
    """
    match = _NAME.fullmatch(path.name)
    trait = match["trait"] if match else path.stem
    rows = _bare_tensor(path)
    if rows.dim() != 2 or not 3 <= rows.shape[0] <= MAX_BLOCKS + 1:
        raise FormatError(
            f"{path}: shape {list(rows.shape)}, expected [num_layers + 1, hidden]: the embedding, then one row a block"
        )
    count = rows.shape[0] - 1
    if shape is not None and rows.shape[0] == shape.num_blocks:
        raise FormatError(
            f"{path}: {rows.shape[0]} rows, and the model has as many blocks; a persona_vectors file has one row more, "
            "the embedding, so its rows cannot be told apart; save them with save_vectors instead"
        )
    fit(path, trait, count, rows.shape[1], shape)
    bad = (~torch.isfinite(rows)).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise FormatError(f"{path}: NaN or infinity in the rows {bad[:8]}; extract the vector again")
    directions = rows[1:].to(torch.float32)
    metadata = {
        "source_format": "persona_vectors",
        "source_file": path.name,
        "method": "mean_diff",
        "positions": match["positions"] if match else "unknown",
    }
    return trait, PersonaVector(directions, (), metadata, missing={count - 1: POST_NORM})


def write_file(path: Path, name: str, vector: PersonaVector) -> None:
    """Write one vector, atomically: row b + 1 is block b; row 0 and the last row are zero.

    Raises:
        FormatError: the vector acts on the last block, for which the format has no row, or was read elsewhere than at
            block outputs.
    """
    check_writable(path, name, vector)
    count, hidden = vector.directions.shape
    rows = torch.zeros(count + 1, hidden)
    rows[1:count] = vector.directions[: count - 1]
    with atomic_path(path) as temporary:
        torch.save(rows, temporary)


def check_writable(path: Path, name: str, vector: PersonaVector) -> None:
    """Raise `FormatError` where the format cannot say what the vector says."""
    last = vector.directions.shape[0] - 1
    if last < 1:
        raise FormatError(f"{path}: {name!r} has one block, and persona_vectors has no row for the last one")
    if last in vector.blocks:
        raise FormatError(
            f"{path}: {name!r} acts on block {last}, the last one, where persona_vectors keeps the state after the "
            "final norm; choose other blocks"
        )
    if vector.hook_point != BLOCK_OUTPUT:
        raise FormatError(
            f"{path}: {name!r} was read at {vector.hook_point!r}; persona_vectors knows block outputs only"
        )


def file_name(name: str, vector: PersonaVector) -> str:
    """What the project would call the file of a vector."""
    positions = vector.metadata.get("positions")
    mode = positions if positions in POSITIONS else "response_avg"
    return f"{name.removesuffix(f'_{mode}')}_{mode}_diff.pt"


def _bare_tensor(path: Path) -> torch.Tensor:
    _check_archive(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the broken part of the archive leads to
        if "weights_only" in str(error).lower() or "unsupported" in str(error).lower():
            raise FormatError(
                f"{path}: holds more than a tensor, which could run code, so it is not opened; save the bare tensor"
            ) from None
        raise FormatError(f"{path}: truncated or not a torch archive; copy or save it again") from None
    if not isinstance(found, torch.Tensor):
        raise FormatError(f"{path}: holds a {type(found).__name__}, expected one bare tensor; save the tensor alone")
    if found.layout != torch.strided or found.is_quantized or not found.is_floating_point():
        raise FormatError(f"{path}: holds {found.dtype} ({found.layout}), expected a dense floating point tensor")
    # A view can claim any shape over one stored number.
    if found.numel() * found.element_size() > found.untyped_storage().nbytes():
        raise FormatError(f"{path}: claims shape {list(found.shape)} and stores less; the file is broken")
    return found.detach()


def _check_archive(path: Path) -> None:
    """Refuse archives that would grow: torch stores tensors as they are, so nothing in one is larger than the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise FormatError(f"{path}: truncated or not a torch archive; copy or save it again") from None
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise FormatError(f"{path}: a compressed archive, which torch does not write; save the tensor with torch.save")
