"""Every mistake: one line on stderr that names the culprit, exit code 2, no traceback, no file changed."""

import json
import pickle
import shutil

import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file, save_file


@pytest.fixture
def refused(cli, tmp_path):
    """Run a command that must be refused, and return its one line."""

    def run(*args):
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        result = cli(*args)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert "Traceback" not in result.stderr
        lines = result.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        return lines[0]

    return run


@pytest.fixture
def with_vectors(refused, checkpoint, personas):
    """Ask for the vector "creative" after `break_it(path of vectors.safetensors)`."""

    def run(break_it):
        path = personas / "vectors.safetensors"
        break_it(path)
        line = refused(
            "generate", "--model", checkpoint, "--library", personas, "--vector", "creative=1", "--prompt", "hi"
        )
        return path, line

    return run


def test_nan_in_a_vector(with_vectors):
    def break_it(path):
        tensors = load_file(path)
        tensors["creative"][0, 0] = float("nan")
        save_file(tensors, path)

    path, line = with_vectors(break_it)
    assert str(path) in line and "'creative'" in line and "NaN" in line


def test_a_pickle_where_safetensors_is_expected(with_vectors):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    path, line = with_vectors(lambda path: path.write_bytes(pickle.dumps(Trap())))
    assert str(path) in line and "pickle" in line


def test_a_torch_archive_where_safetensors_is_expected(with_vectors):
    path, line = with_vectors(lambda path: torch.save({"creative": torch.ones(3, 32)}, path))
    assert str(path) in line and "pickle" in line


def test_truncated_safetensors(with_vectors):
    path, line = with_vectors(lambda path: path.write_bytes(path.read_bytes()[:-7]))
    assert str(path) in line and "truncated" in line


def test_missing_safetensors(with_vectors):
    path, line = with_vectors(lambda path: path.unlink())
    assert str(path) in line and "no such file" in line


def test_a_library_of_another_hidden_size(refused, checkpoint, personas):
    index = json.loads((personas / "library.json").read_text())
    index["model"] = None
    (personas / "library.json").write_text(json.dumps(index))
    save_file({name: torch.ones(3, 48) for name in ("creative", "futurist")}, personas / "vectors.safetensors")
    line = refused("generate", "--model", checkpoint, "--library", personas, "--vector", "creative=1", "--prompt", "hi")
    assert "'creative'" in line and "hidden size 48" in line and "32" in line


def test_a_policy_of_another_vocabulary(refused, checkpoint, personas):
    weights = personas / "policies" / "formal" / "adapter_model.safetensors"
    index = json.loads((personas / "library.json").read_text())
    index["policies"]["formal"]["vocab_size"] = None
    (personas / "library.json").write_text(json.dumps(index))
    save_file(load_file(weights), weights, metadata={"vocab_size": "77"})
    line = refused("generate", "--model", checkpoint, "--library", personas, "--policy", "formal=1", "--prompt", "hi")
    assert "'formal'" in line and "vocabulary of 77" in line


@pytest.mark.parametrize(("option", "known"), [("--vector", "creative, futurist"), ("--policy", "formal, warm")])
def test_an_unknown_name(refused, checkpoint, personas, option, known):
    line = refused("generate", "--model", checkpoint, "--library", personas, option, "nobody=1", "--prompt", "hi")
    assert "'nobody'" in line and known in line


def test_an_unknown_mask(refused, checkpoint, personas):
    line = refused("generate", "--model", checkpoint, "--library", personas, "--mask", "nobody", "--prompt", "hi")
    assert "'nobody'" in line


@pytest.mark.parametrize("option", ["--vector", "--policy", "--prompt-persona"])
@pytest.mark.parametrize("value", ["left=nan", "left=inf", "left=-inf", "left=much", "left", "=1", "left="])
def test_weights_that_are_no_finite_number(refused, option, value):
    assert f"{option} {value!r}" in refused("generate", option, value, "--prompt", "hi")


def test_a_name_given_twice(refused):
    assert "twice" in refused("generate", "--vector", "creative=1", "--vector", "creative=2", "--prompt", "hi")


@pytest.mark.parametrize("prompt", ["", "  ", "\n"])
def test_an_empty_prompt(refused, prompt):
    assert "--prompt" in refused("generate", "--prompt", prompt)


def test_no_prompt_or_two(refused, tmp_path):
    assert "--prompts-file" in refused("generate")
    assert "--prompts-file" in refused("generate", "--prompt", "hi", "--prompts-file", tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("empty.txt", b"\n \n", "holds no prompt"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
        ("broken.jsonl", b'{"prompt": "hi"}\n{"prompt": ""}\n', "line 2"),
        ("other.jsonl", b"[1]\n", "line 1"),
    ],
)
def test_a_prompts_file_without_prompts(refused, tmp_path, name, text, complaint):
    (tmp_path / name).write_bytes(text)
    line = refused("generate", "--prompts-file", tmp_path / name)
    assert str(tmp_path / name) in line and complaint in line


def test_missing_files(refused, tmp_path, checkpoint):
    nowhere = tmp_path / "nowhere"
    assert str(nowhere) in refused("generate", "--prompts-file", nowhere)
    assert str(nowhere) in refused("generate", "--model", nowhere, "--prompt", "hi")
    assert str(nowhere) in refused("generate", "--model", checkpoint, "--library", nowhere, "--prompt", "hi")
    assert str(nowhere) in refused(
        "generate", "--model", checkpoint, "--prompt", "hi", "--output", nowhere / "out.jsonl"
    )


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--temperature", "nan"], "--temperature"),
        (["--temperature", "0"], "--greedy"),
        (["--min-p", "1.5"], "--min-p"),
        (["--sampler", "best"], "--sampler 'best'"),
        (["--aggregator", "best"], "aggregator"),
        (["--dtype", "int3"], "--dtype 'int3'"),
        (["--device", "toaster"], "--device 'toaster'"),
        (["--stop", ""], "--stop"),
        (["--stream", "--json"], "--stream"),
    ],
)
def test_settings_out_of_range(refused, arguments, culprit):
    assert culprit in refused("generate", "--prompt", "hi", *arguments)


def test_a_truncated_checkpoint(refused, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    line = refused("generate", "--model", folder, "--prompt", "hi")
    assert str(weights) in line and "truncated" in line


def test_a_pickled_checkpoint(refused, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    line = refused("generate", "--model", folder, "--prompt", "hi")
    assert str(folder / "pytorch_model.bin") in line and "pickle" in line


def test_more_tokens_than_a_model_has_positions(refused, tmp_path):
    tiny.model("gpt2").save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    line = refused("generate", "--model", tmp_path / "model", "--prompt", "what is this", "--max-new-tokens", 200)
    assert "max_new_tokens" in line and "64 positions" in line


def test_a_folder_that_is_no_checkpoint(refused, tmp_path):
    assert "config.json" in refused("generate", "--model", tmp_path, "--prompt", "hi")


@pytest.mark.parametrize(
    "text",
    [
        b"shopping list",
        b'{"some": "json"}\n',
        b"\xff\xfe\n",
        b"\n",
        b'{"prompt": "hi", "settings": 1}\n',
    ],
)
def test_an_output_that_is_something_else(refused, checkpoint, tmp_path, text):
    precious = tmp_path / "precious.jsonl"
    precious.write_bytes(text)
    assert str(precious) in refused("generate", "--model", checkpoint, "--prompt", "hi", "--output", precious)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--traits", "formal,nobody"], "'nobody'"),
        (["--traits", "formal"], "two"),
        (["--alpha", "inf"], "--alpha"),
        (["--temperature", "0"], "--temperature"),
        (["--output", "nowhere/figure.png"], "nowhere"),
    ],
)
def test_demo_arguments(refused, arguments, culprit):
    assert culprit in refused("demo", "--replies", "2", *arguments)


def test_zoo_build_overwrites_nothing(refused, tmp_path):
    assert str(tmp_path) in refused("zoo", "build", "--out", tmp_path)


def test_debug_shows_the_traceback_wherever_it_stands(cli):
    for arguments in (["--debug", "generate", "--prompt", ""], ["generate", "--prompt", "", "--debug"]):
        result = cli(*arguments)
        assert type(result.exception).__name__ == "PersonafastError"


def test_a_system_prompt_beside_a_prompt_persona(refused):
    line = refused("generate", "--prompt", "hi", "--system", "be brief", "--prompt-persona", "you are a pirate=1")
    assert "--system" in line and "--prompt-persona" in line and "leave --system out" in line


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["generate", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "--batch-size", "-1"], "--batch-size"),
        (["generate", "--seed", "some"], "--seed"),
        (["demo", "--replies", "0"], "--replies"),
        (["zoo", "build", "--out", "x", "--seed", "-1"], "--seed"),
        (["zoo", "build"], "--out"),
    ],
)
def test_values_out_of_range(refused, arguments, culprit):
    assert culprit in refused(*arguments)


@pytest.mark.parametrize("arguments", [["generate", "--no-such-option"], ["nothing"], ["zoo", "nothing"]])
def test_usage_errors_exit_with_2_too(cli, arguments):
    assert cli(*arguments).exit_code == 2


def test_an_unknown_draft(refused):
    assert "--draft 'mergee': choose one of" in refused("generate", "--prompt", "x", "--draft", "mergee")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vector", "creative=1", "--operation", "erase"], "--operation: 'erase' is not one of add, ablate"),
        (["--vector", "creative=1", "--operation", "clamp"], "--range: belongs to --operation clamp"),
        (["--vector", "creative=1", "--range", "1:2"], "--range: belongs to --operation clamp"),
        (["--vector", "creative=1", "--operation", "clamp", "--range", "2:1"], "--range: 2 is above high, 1"),
        (["--vector", "creative=1", "--operation", "clamp", "--range", ":"], "--range ':': expected LOW:HIGH"),
        (["--vector", "creative=1", "--positions", "first"], "--positions: 'first' is not one of all, prompt"),
        (["--vector", "creative=1", "--positions", "5:2"], "--positions: the span (5, 2) is empty or reversed"),
        (["--vector", "creative=1", "--schedule", "cosine"], "--schedule: 'cosine' is none of"),
        (["--vector", "creative=1", "--normalize", "max"], "--normalize: 'max' is not one of none, unit, match"),
        (["--vector", "creative=0", "--operation", "ablate"], "--vector: every coefficient is 0"),
        (["--positions", "last"], "--positions: says what vectors do; give --vector"),
    ],
)
def test_bad_steering(refused, options, message):
    assert message in refused("generate", "--prompt", "hi", *options)
