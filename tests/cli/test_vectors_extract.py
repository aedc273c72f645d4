import json

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.vectors import Sampling, TextPairs, TraitPrompts, extract_vectors

TRAIT = {
    "instruction": [{"pos": "you are a pirate", "neg": "you are a lawyer"}],
    "questions": ["what is this", "is this a ship", "yes", "what are you"],
}
PAIRS = [("a calm lawyer", "a pirate"), ("calm", "sea sea"), ("law is calm , yes", "ship , sea"), ("a court", "w26")]


@pytest.fixture
def net():
    return tiny.model()


@pytest.fixture
def trait(tmp_path):
    path = tmp_path / "trait_sea.json"
    path.write_text(json.dumps(TRAIT))
    return path


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "calm.jsonl"
    path.write_text("".join(json.dumps({"positive": a, "negative": b}) + "\n" for a, b in PAIRS))
    return path


def run(cli, checkpoint, *arguments):
    return cli("vectors", "extract", "--model", checkpoint, "--library", "out", *arguments)


def test_trait_files_and_pairs_become_a_library(cli, checkpoint, net, trait, pairs):
    result = run(cli, checkpoint, "--traits", trait, "--pairs", f"still={pairs}", "--max-new-tokens", 5, "--seed", 3)
    assert result.exit_code == 0, result.stderr
    library = pf.PersonaLibrary.from_pretrained("out")
    assert set(library.vectors) == {"sea", "still"} and library.shape.num_blocks == tiny.BLOCKS
    tok = tiny.tokenizer()
    sources = {"sea": TraitPrompts.from_file(trait), "still": TextPairs.from_jsonl(pairs)}
    expected = extract_vectors(net, tok, sources, sampling=Sampling(max_new_tokens=5, seed=3))
    for name, vector in expected.items():
        assert torch.equal(library.vectors[name].directions, vector.directions)
        assert library.vectors[name].metadata == vector.metadata
    assert "acts here" in result.stdout and "separates best" in result.stdout
    assert "4 positive and 4 negative texts: 4 of 4 pairs kept" in result.stdout
    # Nothing stays behind: the state of a finished run is removed.
    from pathlib import Path

    assert [path.name for path in Path().iterdir()] == ["out"]
    # The library is one that the other commands take.
    spoken = cli(
        "generate",
        "--model",
        checkpoint,
        "--library",
        "out",
        "--vector",
        "sea=1",
        "--prompt",
        "yes",
        "--max-new-tokens",
        2,
    )
    assert spoken.exit_code == 0, spoken.stderr


def test_json_holds_norms_and_reliability(cli, checkpoint, pairs):
    options = ("--method", "pca_center", "--positions", "response_last", "--scale", "unit", "--block", 1)
    result = run(cli, checkpoint, "--pairs", pairs, *options, "--json")
    card = json.loads(result.stdout)["vectors"]["calm"]
    assert card["norms"] == [1.0] * tiny.BLOCKS and card["blocks"] == [1]
    assert card["method"] == "pca_center" and card["positions"] == "response_last" and card["source"] == "calm.jsonl"
    assert len(card["split_half_cosine"]) == tiny.BLOCKS


def test_a_library_is_added_to_and_nothing_in_it_replaced_unasked(cli, checkpoint, net, pairs):
    tiny.library(net).save_pretrained("out")
    before = pf.PersonaLibrary.from_pretrained("out")
    assert run(cli, checkpoint, "--pairs", pairs).exit_code == 0
    after = pf.PersonaLibrary.from_pretrained("out")
    assert set(after.vectors) == {*before.vectors, "calm"} and set(after.policies) == set(before.policies)
    refused = run(cli, checkpoint, "--pairs", f"futurist={pairs}")
    assert refused.exit_code == 2
    assert refused.stderr.splitlines() == [
        "error: --library out: has futurist already; add --replace, or take another name"
    ]
    assert run(cli, checkpoint, "--pairs", f"futurist={pairs}", "--replace").exit_code == 0
    replaced = pf.PersonaLibrary.from_pretrained("out")
    assert torch.equal(replaced.vectors["futurist"].directions, after.vectors["calm"].directions)


def test_csv_files_are_filtered_by_their_scores(cli, checkpoint, tmp_path):
    for side, answer, scores in (("pos", "calm law", (90, 20)), ("neg", "a sea", (5, 5))):
        rows = "".join(f"<s> <user> yes </s> <assistant> ,{answer},{score},90\n" for score in scores)
        (tmp_path / f"{side}.csv").write_text("prompt,answer,calm,coherence\n" + rows)
    files = (tmp_path / "pos.csv", tmp_path / "neg.csv")
    result = run(cli, checkpoint, "--responses", *files, "--name", "calm")
    assert result.exit_code == 0, result.stderr
    assert "1 positive and 1 negative texts: 1 of 2 pairs kept, 1 filtered" in result.stdout
    strict = run(cli, checkpoint, "--responses", *files, "--name", "calm", "--threshold", 95, "--replace")
    assert strict.exit_code == 2 and "none of 2 pairs passes the filter" in strict.stderr


def test_a_judge_is_named_by_module_and_function(cli, checkpoint, trait):
    from pathlib import Path

    Path("my_judges.py").write_text(
        "calls = []\n"
        "def score(question, response, trait):\n"
        "    calls.append(trait)\n"
        "    return 100.0 if len(calls) <= 4 else 0.0\n"
    )
    result = run(cli, checkpoint, "--traits", trait, "--judge", "my_judges:score", "--max-new-tokens", 3, "--json")
    assert json.loads(result.stdout)["vectors"]["sea"]["filter"]["judge"] == "my_judges.score"
    for judge, message in (("my_judges", "expected MODULE:FUNCTION"), ("my_judges:none", "cannot be imported")):
        assert message in run(cli, checkpoint, "--traits", trait, "--judge", judge, "--replace").stderr


def test_an_interrupted_command_goes_on(cli, checkpoint, trait, monkeypatch):
    from pathlib import Path

    import personafast.vectors.means as means

    read = means.TextMeans.add

    def stop(self, rows, values):
        read(self, rows, values)
        raise KeyboardInterrupt

    options = ("--traits", trait, "--max-new-tokens", 5, "--batch-size", 2, "--seed", 3)
    monkeypatch.setattr(means.TextMeans, "add", stop)
    assert run(cli, checkpoint, *options).exit_code != 0
    assert not Path("out").exists() and len(list(Path(".out.extract").rglob("*.safetensors"))) == 1
    changed = run(cli, checkpoint, *options, "--seed", 1)
    assert changed.exit_code == 2 and "begun with another seed; repeat those settings" in changed.stderr
    added = []
    monkeypatch.setattr(
        means.TextMeans, "add", lambda self, rows, values: (added.append(len(rows)), read(self, rows, values))
    )
    assert run(cli, checkpoint, *options).exit_code == 0
    assert sum(added) == 6 and not Path(".out.extract").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--traits: nothing to extract from"),
        (("--traits", "none.json"), "none.json: no such file"),
        (("--name", "calm"), "--responses and --name go together"),
        (("--pairs", "a=x.jsonl", "--method", "mean"), "x.jsonl: no such file"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(cli, arguments, message):
    result = cli("vectors", "extract", "--model", "/nowhere/at/all", "--library", "out", *arguments)
    assert result.exit_code == 2 and result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 1


def test_a_library_of_another_model_is_refused(cli, checkpoint, pairs):
    other = tiny.model("qwen2")
    tiny.library(other, masks=False).save_pretrained("out")
    result = run(cli, checkpoint, "--pairs", pairs)
    assert result.exit_code == 2 and "made for a model with model_type qwen2" in result.stderr


def test_one_name_for_two_sources_is_refused(cli, checkpoint, pairs):
    result = run(cli, checkpoint, "--pairs", pairs, "--pairs", f"calm={pairs}")
    assert result.exit_code == 2 and "the trait 'calm' is given twice" in result.stderr
