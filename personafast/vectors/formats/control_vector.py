"""GGUF control vectors of repeng, EasySteer and llama.cpp (`controlvector`) and of Dialz (`steeringvector`).

One vector a file, one float32 tensor `direction.N` [hidden] a block: added to the output of the 0-based block N. All
three projects agree on that. repeng and Dialz wrap `layers[N]`. llama.cpp's loader puts `direction.N` at
(N - 1) * n_embd of its buffer (`common_control_vector_load_one`), its adapter gives block il what lies at
(il - 1) * n_embd (`llama_adapter_cvec::apply`), and the graph of a model adds that after block il's residual sum
(`build_cvec`). That buffer begins with block 1, so llama.cpp refuses `direction.0`. So does this: EasySteer, and repeng
when asked, write one for block 0, but it is also what a writer leaves that counts from the embedding, one block off.

Blocks without a direction are blocks that the vector does not act on. A file holds exactly what its vector acts on,
because its readers apply all of it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from personafast._io import atomic_path
from personafast.errors import FormatError, PersonafastError
from personafast.models.anatomy import ModelShape
from personafast.vectors.formats.fit import MAX_BLOCKS, MAX_HIDDEN, fit
from personafast.vectors.formats.gguf_file import GgufFile, TensorEntry, read_gguf
from personafast.vectors.vector import BLOCK_OUTPUT, PersonaVector

ARCHITECTURE = {"repeng": "controlvector", "dialz": "steeringvector"}
_PREFIX = "direction."


def read_file(path: Path, shape: ModelShape | None, drop_block_0: bool = False) -> tuple[str, PersonaVector]:
    """The stem of the file name, and the vector; it acts on every block that has a direction.

    Without `shape` the model is taken to end with the last direction. With `drop_block_0` a `direction.0` is left out.

    Raises:
        FormatError: as `read_gguf`, `direction.0`, a direction twice or of another width, none at all, NaN, or another
            shape than the model's.
    """
    file = read_gguf(path)
    entries = _directions(file, drop_block_0)
    hidden = next(iter(entries.values())).dims[0]
    count = shape.num_blocks if shape is not None else max(entries) + 1
    # Before anything is allocated.
    fit(path, path.stem, max(entries) + 1, hidden, shape, exact=False)
    directions = torch.zeros(count, hidden)
    for block, entry in entries.items():
        values = file.values(entry)
        if not torch.isfinite(values).all():
            raise FormatError(f"{path}: NaN or infinity in {entry.name!r}; extract the vector again")
        directions[block] = values
    missing = {block: f"{path.name} has no {_PREFIX}{block}" for block in range(count) if block not in entries}
    metadata = {
        "source_format": next(name for name, arch in ARCHITECTURE.items() if arch == file.architecture),
        "source_file": path.name,
        "model_hint": str(file.fields.get(f"{file.architecture}.model_hint", "unknown")),
    }
    method = file.fields.get(f"{file.architecture}.method")  # EasySteer's
    if isinstance(method, str):
        metadata["method"] = method
    return path.stem, PersonaVector(directions, sorted(entries), metadata, missing=missing)


def check_writable(path: Path, name: str, vector: PersonaVector, drop_block_0: bool) -> PersonaVector:
    """The vector as it can be written, or `FormatError` where the format cannot say what it says."""
    if vector.hook_point != BLOCK_OUTPUT:
        raise FormatError(f"{path}: {name!r} was read at {vector.hook_point!r}; a control vector acts at block outputs")
    if 0 not in vector.blocks:
        return vector
    rest = [block for block in vector.blocks if block != 0]
    if not drop_block_0:
        raise FormatError(
            f"{path}: {name!r} acts on block 0, which GGUF control vectors cannot express; drop it (drop_block_0, "
            "--drop-block-0) or choose other blocks"
        )
    if not rest:
        raise FormatError(f"{path}: {name!r} acts on block 0 only, and nothing is left without it; choose other blocks")
    return replace(vector, blocks=rest)


def write_file(
    path: Path,
    name: str,
    vector: PersonaVector,
    *,
    format: str = "repeng",
    model_type: str = "unknown",
    drop_block_0: bool = False,
) -> None:
    """Write one vector, atomically: `direction.N` for every block N it acts on.

    Raises:
        FormatError: the vector acts on block 0 and `drop_block_0` is off, or was read elsewhere than at block outputs.
        PersonafastError: the `gguf` package is not installed.
    """
    try:
        from gguf import GGUFWriter
    except ImportError:
        raise PersonafastError(
            "gguf: not installed, and GGUF is written with it; pip install 'personafast[gguf]'"
        ) from None

    vector = check_writable(path, name, vector, drop_block_0)
    arch = ARCHITECTURE[format]
    blocks = sorted(set(vector.blocks))
    with atomic_path(path) as temporary:
        writer = GGUFWriter(temporary, arch)
        writer.add_string(f"{arch}.model_hint", model_type)
        writer.add_uint32(f"{arch}.layer_count", len(blocks))
        for block in blocks:
            writer.add_tensor(f"{_PREFIX}{block}", vector.directions[block].numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _directions(file: GgufFile, drop_block_0: bool) -> dict[int, TensorEntry]:
    """Block -> tensor, checked: numbers from 1 on, none twice, all of one width."""
    path = file.path
    found: dict[int, TensorEntry] = {}
    for entry in file.tensors:
        number = entry.name.removeprefix(_PREFIX)
        if number == entry.name or not (number.isascii() and number.isdecimal()) or len(number) > 9:
            raise FormatError(
                f"{path}: a tensor named {entry.name[:64]!r}, expected {_PREFIX}N; the file is another kind"
            )
        block = int(number)
        if block == 0:
            if drop_block_0:
                continue
            raise FormatError(
                f"{path}: {_PREFIX}0, which llama.cpp refuses and writers use differently; if the file counts blocks "
                "from 0, leave it out (drop_block_0, --drop-block-0)"
            )
        if block >= MAX_BLOCKS:
            raise FormatError(
                f"{path}: {entry.name!r}, where models have at most {MAX_BLOCKS} blocks; the file is broken"
            )
        if block in found:
            raise FormatError(f"{path}: {entry.name!r} is there twice; save it again")
        found[block] = entry
    if not found:
        raise FormatError(f"{path}: holds no {_PREFIX}N; give a file of control vectors")
    widths = {tuple(entry.dims): entry.name for entry in found.values()}
    if len(widths) > 1:
        listing = ", ".join(f"{name} {list(dims)}" for dims, name in widths.items())
        raise FormatError(f"{path}: directions of unequal width ({listing}); save it again")
    ((dims,)) = list(widths)
    if len(dims) != 1 or not 0 < dims[0] <= MAX_HIDDEN:
        raise FormatError(f"{path}: directions of shape {list(dims)}, expected one vector of at most {MAX_HIDDEN}")
    return found
