"""Are our files read, and our blocks hit, by the projects themselves?

A tiny random model and a vector of ours are written to a folder. Each peer, in an environment of its own, reads our
file with its own loader and steers the model with its own applier, one block at a time; its logits are compared with
ours at that block, and, so that the check means something, at the blocks beside it. Then we read a file of the peer's
own writer.

    python -m venv peers && peers/bin/pip install repeng torch safetensors
    python -m benchmarks.peers_formats --repeng peers/bin/python

Dialz needs an environment of its own (`pip install dialz ipython`), because it asks for an older transformers.
`--persona-vectors` takes the folder of a checkout, which pip does not install. One JSON file a peer goes to
benchmarks/results/peers/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import personafast as pf
from benchmarks.peers_apply import COEFFICIENT
from personafast import ops
from personafast.models.anatomy import ModelShape
from personafast.vectors import PersonaVector, load_vectors, save_vectors

RESULTS = Path(__file__).parent / "results" / "peers"
APPLY = Path(__file__).with_name("peers_apply.py")
SHAPE = ModelShape("llama", 64, 6, 128)
FILES = {"repeng": "repeng.gguf", "dialz": "dialz.gguf", "persona_vectors": "evil_response_avg_diff.pt"}


def make_model(folder: Path) -> torch.nn.Module:
    """A random model whose weights are numbers of half precision, so that a peer that loads them so loses nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SHAPE.vocab_size,
            hidden_size=SHAPE.hidden_size,
            intermediate_size=128,
            num_hidden_layers=SHAPE.num_blocks,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * (6 if parameter.dim() > 1 else 1)).half())
    model.save_pretrained(folder)
    return model


def our_logits(model: torch.nn.Module, vector: PersonaVector, block: int, ids: torch.Tensor) -> torch.Tensor:
    """Logits with the vector at one block, by `attach`."""
    library = pf.PersonaLibrary(SHAPE)
    library.add_vector("v", vector)
    persona = pf.Persona(vectors={"v": COEFFICIENT}, blocks=(block,))
    # The reference backend adds in the order that a hook does.
    with ops.use_backend("reference"), pf.attach(model, library), torch.no_grad():
        return model(ids, personas=[persona] * len(ids)).logits


def check(peer: str, python: str, paths: list[str]) -> dict[str, Any]:
    """Run one peer and compare.

    Returns:
        Versions; the largest differences between its logits and ours, at the same block and at the nearest other one;
        and whether its loader saw our numbers, and ours the numbers that its writer wrote.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = make_model(folder / "model")
        ids = torch.arange(3, 35).view(2, 16)
        save_file({"ids": ids}, folder / "ids.safetensors")
        blocks = range(1, SHAPE.num_blocks) if peer != "persona_vectors" else range(SHAPE.num_blocks - 1)
        directions = torch.randn(SHAPE.num_blocks, SHAPE.hidden_size, generator=torch.Generator().manual_seed(1))
        vector = PersonaVector(directions, blocks)
        save_vectors(folder / FILES[peer], {"evil": vector}, SHAPE, format=peer)
        # The peer's packages are its environment's own, whatever this process was told to import from.
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        subprocess.run([python, str(APPLY), peer, str(folder), *paths], check=True, env=environment)
        with safe_open(folder / "found.safetensors", framework="pt") as file:
            versions = file.metadata()
        found = load_file(folder / "found.safetensors")
        ours = {block: our_logits(model, PersonaVector(directions), block, ids) for block in range(SHAPE.num_blocks)}
        # The block that our numbers belong to, moved by one: what an off-by-one would have given.
        beside = {
            (block, near): our_logits(model, PersonaVector(directions.roll(near - block, 0)), near, ids)
            for block in blocks
            for near in (block - 1, block + 1)
            if 0 <= near < SHAPE.num_blocks
        }
        difference = {block: float((found[f"logits.{block}"] - ours[block]).abs().max()) for block in blocks}
        return {
            "peer": peer,
            "versions": versions,
            "ours": {"personafast": pf.__version__, "torch": torch.__version__, "backend": "reference"},
            "blocks": list(blocks),
            "largest_logit": float(max(logits.abs().max() for logits in ours.values())),
            "largest_difference_same_block": max(difference.values()),
            "smallest_difference_one_block_off": min(
                float((found[f"logits.{block}"] - logits).abs().max()) for (block, _), logits in beside.items()
            ),
            "its_loader_sees_our_numbers": _same_numbers(peer, found, directions, blocks),
            "we_read_its_file": _reads_theirs(folder),
        }


def _same_numbers(peer: str, found: dict[str, torch.Tensor], directions: torch.Tensor, blocks: range) -> bool:
    if peer == "persona_vectors":
        return all(torch.equal(found["rows"][block + 1], directions[block]) for block in blocks)
    there = {name for name in found if name.startswith("direction.")}
    return there == {f"direction.{block}" for block in blocks} and all(
        torch.equal(found[f"direction.{block}"], directions[block]) for block in blocks
    )


def _reads_theirs(folder: Path) -> bool | None:
    if not (folder / "theirs.gguf").is_file():
        return None
    written = load_file(folder / "theirs.safetensors")
    vector = load_vectors(folder / "theirs.gguf", shape=SHAPE)["theirs"]
    return {f"direction.{block}" for block in vector.blocks} == set(written) and all(
        torch.equal(vector.directions[block], written[f"direction.{block}"]) for block in vector.blocks
    )


def passed(result: dict[str, Any]) -> bool:
    """Equal to rounding at the same block, and far from it one block off."""
    scale = result["largest_logit"]
    return (
        result["largest_difference_same_block"] <= 1e-5 * scale
        and result["smallest_difference_one_block_off"] >= 1e-2 * scale
        and result["its_loader_sees_our_numbers"]
        and result["we_read_its_file"] is not False
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeng", metavar="PYTHON", help="interpreter of an environment with repeng")
    parser.add_argument("--dialz", metavar="PYTHON", help="interpreter of an environment with dialz")
    parser.add_argument("--persona-vectors", metavar="FOLDER", help="a checkout of persona_vectors")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="where the JSON files go")
    options = parser.parse_args()
    checkout = options.persona_vectors
    wanted = [
        ("repeng", options.repeng, []),
        ("dialz", options.dialz, []),
        ("persona_vectors", sys.executable if checkout else None, [checkout]),
    ]
    if not any(python for _, python, _ in wanted):
        parser.error("name at least one peer")
    failed = False
    for peer, python, paths in wanted:
        if python is None:
            continue
        try:
            result = check(peer, python, paths)
        except subprocess.CalledProcessError as error:
            print(f"{peer}: {error}", file=sys.stderr)
            failed = True
            continue
        result["passed"] = passed(result)
        failed |= not result["passed"]
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / f"formats_{peer}.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(result, indent=2))
    sys.exit(failed)


if __name__ == "__main__":
    main()
