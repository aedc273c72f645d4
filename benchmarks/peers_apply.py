"""Run inside a peer's own environment: load a vector file with the peer's loader, apply it with the peer's applier.

Imports nothing of personafast, so that the peer may have any version of torch and transformers. `peers_formats.py`
starts it: `python peers_apply.py PEER FOLDER`, where FOLDER holds `model/`, `ids.safetensors` and the file to read.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

COEFFICIENT = 1.5


def apply_repeng(folder: Path) -> dict[str, torch.Tensor]:
    """Logits a block, by `ControlVector.import_gguf` and `ControlModel.set_control`."""
    from repeng import ControlModel, ControlVector
    from transformers import AutoModelForCausalLM

    vector = ControlVector.import_gguf(folder / "repeng.gguf")
    found = _directions(vector)
    for block in sorted(vector.directions):
        model = AutoModelForCausalLM.from_pretrained(folder / "model", torch_dtype=torch.float32).eval()
        wrapped = ControlModel(model, [block])
        wrapped.set_control(vector, COEFFICIENT)
        found[f"logits.{block}"] = _logits(wrapped, folder)
    _export(ControlVector, folder)
    return found


def apply_dialz(folder: Path) -> dict[str, torch.Tensor]:
    """Logits a block, by `SteeringVector.import_gguf` and `SteeringModel.set_control`."""
    from dialz import SteeringModel, SteeringVector

    vector = SteeringVector.import_gguf(folder / "dialz.gguf")
    found = _directions(vector)
    for block in sorted(vector.directions):
        wrapped = SteeringModel(str(folder / "model"), [block])
        wrapped.model.float().cpu().eval()  # it loads in half precision, which the weights were rounded to
        wrapped.set_control(vector, COEFFICIENT)
        found[f"logits.{block}"] = _logits(wrapped, folder)
    _export(SteeringVector, folder)
    return found


def apply_persona_vectors(folder: Path) -> dict[str, torch.Tensor]:
    """Logits a block, as its evaluation does for `--layer L`: row L of the file, `layer_idx=L - 1`."""
    from transformers import AutoModelForCausalLM

    steerer = importlib.import_module("activation_steer").ActivationSteerer
    model = AutoModelForCausalLM.from_pretrained(folder / "model", torch_dtype=torch.float32).eval()
    rows = torch.load(folder / "evil_response_avg_diff.pt", weights_only=True)
    found = {"rows": rows}
    for layer in range(1, len(rows) - 1):
        with steerer(model, rows[layer], coeff=COEFFICIENT, layer_idx=layer - 1, positions="all"):
            found[f"logits.{layer - 1}"] = _logits(model, folder)
    return found


def _directions(vector: object) -> dict[str, torch.Tensor]:
    return {f"direction.{block}": torch.tensor(values) for block, values in vector.directions.items()}


def _export(kind: type, folder: Path) -> None:
    """A file by the peer's own writer, and what it was written from."""
    generator = torch.Generator().manual_seed(7)
    size = json.loads((folder / "model" / "config.json").read_text())
    directions = {
        block: torch.randn(size["hidden_size"], generator=generator).numpy()
        for block in range(1, size["num_hidden_layers"])
    }
    kind(model_type=size["model_type"], directions=directions).export_gguf(folder / "theirs.gguf")
    save_file({f"direction.{b}": torch.tensor(v) for b, v in directions.items()}, folder / "theirs.safetensors")


def _logits(model: torch.nn.Module, folder: Path) -> torch.Tensor:
    ids = load_file(folder / "ids.safetensors")["ids"]
    # One row of positions a text: repeng and Dialz fail on the single row that transformers shares by default.
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return model(ids, position_ids=positions).logits.float().contiguous()


def main() -> None:
    peer, folder = sys.argv[1], Path(sys.argv[2])
    sys.path[:0] = sys.argv[3:]
    found = globals()[f"apply_{peer}"](folder)
    versions = {}
    for package in (peer, "torch", "transformers", "gguf"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    for path in sys.argv[3:]:
        for file in sorted(Path(path).glob("activation_steer.py")):
            versions[file.name] = "sha256 " + hashlib.sha256(file.read_bytes()).hexdigest()
    save_file(found, folder / "found.safetensors", metadata=versions)


if __name__ == "__main__":
    main()
