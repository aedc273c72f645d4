import pytest
from helpers import tiny
from typer.testing import CliRunner

from personafast.cli import app


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random model and its tokenizer as a local checkpoint folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def personas(net, tmp_path):
    """Two vectors, two policies and a mask for that model, as a folder that a test may break."""
    tiny.library(net).save_pretrained(tmp_path / "library")
    return tmp_path / "library"


@pytest.fixture
def cli(tmp_path, monkeypatch):
    """Run a command in an empty folder: cli("generate", "--prompt", "hi")."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])
