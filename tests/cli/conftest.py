import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from personafast.cli import app
from personafast.density.lora import LoraFactors, LoraPolicy
from personafast.library import PersonaLibrary
from personafast.models.anatomy import anatomy, linear_features
from personafast.zoo.model import make_model, make_tokenizer

LORA = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}


def random_policy(parts, seed, vocab_size=None):
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path, linear in parts.linears.items():
        if path.endswith(("q_proj", "v_proj")):
            rows, columns = linear_features(linear)
            a, b = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
            factors[path] = LoraFactors(a, b, 1.0)
    return LoraPolicy(factors, LORA, vocab_size)


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    return make_model(make_tokenizer(), hidden_size=32, intermediate_size=48, num_hidden_layers=2).eval()


@pytest.fixture(scope="session")
def checkpoint(model, tmp_path_factory):
    """A random model and its tokenizer as a local checkpoint folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def library(model, tmp_path):
    """A folder with two random vectors and two random policies for that model."""
    parts = anatomy(model)
    made = PersonaLibrary(parts.shape)
    generator = torch.Generator().manual_seed(1)
    for seed, name in enumerate(("left", "right")):
        made.add_vector(name, 3 * torch.randn(2, 32, generator=generator), blocks=[0])
        made.add_policy(name, random_policy(parts, seed))
    made.save_pretrained(tmp_path / "library")
    return tmp_path / "library"


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Run a command in an empty folder: cli("generate", "--prompt", "hi")."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    runner = CliRunner()
    return lambda *args: runner.invoke(app, [str(arg) for arg in args])


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its bytes."""
    return {
        os.path.relpath(os.path.join(root, name), folder): Path(root, name).read_bytes()
        for root, _, names in os.walk(folder)
        for name in names
    }
