import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import personafast as pf
from personafast.cli import generate as command
from personafast.cli.options import assignments

QUESTIONS = ["what is this sea", "is this a ship", "what is this sea", "are you calm"]


@pytest.fixture
def ask(cli, checkpoint, personas):
    """Run `generate` on the random checkpoint and return its stdout."""

    def run(*args):
        result = cli("generate", "--model", checkpoint, "--library", personas, "--max-new-tokens", 8, *args)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("\n\n".join(QUESTIONS))
    return path


def records(text):
    return [json.loads(line) for line in text.split("\n") if line]


def test_one_prompt_streams_what_it_would_print_at_once(ask, monkeypatch):
    streamed = ask("--prompt", QUESTIONS[0], "--policy", "formal=1")
    assert streamed.strip() == ask("--prompt", QUESTIONS[0], "--policy", "formal=1", "--no-stream").strip() != ""

    import transformers

    class Counting(transformers.TextStreamer):
        calls = 0

        def put(self, value):
            Counting.calls += 1
            super().put(value)

    monkeypatch.setattr(transformers, "TextStreamer", Counting)
    ask("--prompt", QUESTIONS[0], "--policy", "formal=1")
    assert Counting.calls > 4  # the prompt, then tokens as they come


def test_json_is_one_object_an_answer(ask, questions):
    found = records(ask("--prompts-file", questions, "--policy", "formal=1", "--policy", "warm=1", "--json"))
    assert [record["prompt"] for record in found] == QUESTIONS
    assert {"prompt", "reply", "settings", "stats"} == set(found[0])
    assert found[0]["settings"]["persona"]["policies"] == {"formal": 1.0, "warm": 1.0}
    assert found[0]["stats"]["forwards_per_token"] == pytest.approx(3)


def test_a_jsonl_file_of_prompts(ask, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "more": 1}) + "\n" for text in QUESTIONS))
    assert [record["prompt"] for record in records(ask("--prompts-file", path, "--json"))] == QUESTIONS


def replies(text):
    return [record["reply"] for record in records(text)]


def test_replies_depend_on_seed_and_place_and_not_on_the_batch(ask, questions):
    arguments = ["--prompts-file", questions, "--policy", "formal=1", "--json"]
    one = replies(ask(*arguments, "--batch-size", 1))
    assert replies(ask(*arguments, "--batch-size", 3)) == one
    assert replies(ask(*arguments, "--seed", 1)) != one
    assert one[0] != one[2]


@pytest.mark.parametrize(
    ("option", "first", "second"), [("--vector", "creative", "futurist"), ("--policy", "formal", "warm")]
)
def test_the_second_of_a_blend_changes_the_reply(ask, option, first, second):
    alone = ask("--prompt", QUESTIONS[0], option, f"{first}=1")
    assert ask("--prompt", QUESTIONS[0], option, f"{first}=1", option, f"{second}=1") != alone


def test_greedy_without_persona_is_the_plain_model(ask, checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    batch = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTIONS[0]}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**batch, do_sample=False, max_new_tokens=8)
    expected = tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert ask("--prompt", QUESTIONS[0], "--greedy").strip() == expected


def test_samplers_and_aggregators_run(ask):
    for arguments in (["--sampler", "merge"], ["--sampler", "scr", "--aggregator", "linear"], ["--sampler", "direct"]):
        assert ask("--prompt", QUESTIONS[0], "--policy", "formal=1", "--policy", "warm=1", *arguments).strip()


def test_a_stop_string_ends_the_reply(ask):
    full = ask("--prompt", QUESTIONS[0], "--greedy").split()
    stopped = ask("--prompt", QUESTIONS[0], "--greedy", "--stop", full[2]).split()
    assert stopped == full[:3]


def test_an_interrupted_file_is_resumed(ask, questions, tmp_path):
    answers = tmp_path / "answers.jsonl"
    arguments = ["--prompts-file", questions, "--policy", "formal=1", "--batch-size", 2, "--output", answers]
    ask(*arguments)
    whole = answers.read_text()
    assert [record["prompt"] for record in records(whole)] == QUESTIONS

    ask(*arguments)
    assert answers.read_text() == whole

    kept = whole.splitlines(keepends=True)
    answers.write_text(kept[0] + kept[1][: len(kept[1]) // 2])
    ask(*arguments)
    resumed = answers.read_text()
    assert resumed.startswith(kept[0])
    assert replies(resumed) == replies(whole)


# The line ends of `str.splitlines` that JSON leaves as they are.
SEPARATORS = "\u2028 \u2029 \x85"


def test_unicode_line_ends_inside_prompts_and_replies_are_no_line_ends(ask, checkpoint, monkeypatch, tmp_path):
    decode = type(AutoTokenizer.from_pretrained(checkpoint)).batch_decode
    monkeypatch.setattr(
        "transformers.PreTrainedTokenizerFast.batch_decode",
        lambda *args, **kwargs: [f"{SEPARATORS}{text}{SEPARATORS}and" for text in decode(*args, **kwargs)],
    )
    asked = [f"what{SEPARATORS}is", "this", f"a{SEPARATORS}ship"]
    for name, lines in (("a.txt", asked), ("a.jsonl", [json.dumps({"prompt": a}, ensure_ascii=False) for a in asked])):
        prompts, answers = tmp_path / name, tmp_path / f"answers of {name}"
        prompts.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        arguments = ["--prompts-file", prompts, "--batch-size", 1, "--output", answers]
        ask(*arguments)
        whole = answers.read_bytes()
        assert [record["prompt"] for record in records(whole.decode())] == asked
        assert SEPARATORS in replies(whole.decode())[0]

        ask(*arguments)
        assert answers.read_bytes() == whole
        # Cut in the middle of a character: the last answer is made again.
        answers.write_bytes(whole[: whole.rindex(b"\xe2") + 1])
        ask(*arguments)
        assert replies(answers.read_text(encoding="utf-8")) == replies(whole.decode())


def test_prompts_of_other_editors(ask, tmp_path):
    for name, lines in (("a.txt", QUESTIONS), ("a.jsonl", [json.dumps({"prompt": text}) for text in QUESTIONS])):
        path = tmp_path / name
        path.write_bytes("".join(line + "\r\n" for line in lines).encode("utf-8-sig"))
        assert [record["prompt"] for record in records(ask("--prompts-file", path, "--json"))] == QUESTIONS


def test_a_file_of_other_settings_is_left_alone(ask, cli, checkpoint, personas, questions, tmp_path):
    answers = tmp_path / "answers.jsonl"
    ask("--prompts-file", questions, "--output", answers)
    before = answers.read_bytes()
    arguments = [
        "--model",
        checkpoint,
        "--library",
        personas,
        "--max-new-tokens",
        8,
        "--output",
        answers,
        "--seed",
        1,
    ]
    result = cli("generate", "--prompts-file", questions, *arguments)
    assert result.exit_code == 2 and "another seed" in result.stderr
    assert answers.read_bytes() == before


def test_without_a_chat_template_the_prompt_is_plain_text(cli, checkpoint, tmp_path):
    folder = tmp_path / "plain"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    arguments = ["generate", "--model", folder, "--prompt", "a pirate ship", "--max-new-tokens", 4, "--greedy"]
    result = cli(*arguments)
    assert result.exit_code == 0, result.output
    model = AutoModelForCausalLM.from_pretrained(folder)
    batch = tokenizer("a pirate ship", return_tensors="pt")
    out = model.generate(
        **{key: batch[key] for key in ("input_ids", "attention_mask")}, do_sample=False, max_new_tokens=4
    )
    assert (
        result.stdout.strip()
        == tokenizer.decode(out[0, batch["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    )
    refused = cli(*arguments, "--system", "be brief")
    assert refused.exit_code == 2 and "system" in refused.stderr


HABITS = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 3,
    "top_p": 0.5,
    "min_p": 0.4,
    "typical_p": 0.4,
    "epsilon_cutoff": 0.1,
    "eta_cutoff": 0.1,
    "repetition_penalty": 1.7,
    "no_repeat_ngram_size": 2,
    "bad_words_ids": [[8], [9, 10]],
    "suppress_tokens": [11, 12, 13],
    "begin_suppress_tokens": list(range(40)),
    "sequence_bias": [[[14], 5.0]],
    "forced_eos_token_id": 1,
    "min_new_tokens": 3,
    "exponential_decay_length_penalty": [1, 2.0],
    "stop_strings": ["a"],
    "max_time": 1e-9,
    "num_return_sequences": 2,
    "renormalize_logits": True,
}


@pytest.fixture
def with_config(checkpoint, tmp_path):
    """The random checkpoint with another generation_config.json."""

    def run(name, settings):
        folder = shutil.copytree(checkpoint, tmp_path / name)
        (folder / "generation_config.json").write_text(json.dumps(settings))
        return folder

    return run


@pytest.mark.parametrize(
    "arguments", [["--sampler", "direct"], ["--sampler", "scr"], ["--sampler", "merge"], ["--greedy"]]
)
def test_a_checkpoint_does_not_change_how_replies_are_drawn(cli, with_config, personas, arguments):
    ids = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    said = []
    for name, settings in (("plain", ids), ("opinionated", {**ids, **HABITS})):
        command = ["generate", "--model", with_config(name, settings), "--library", personas, "--policy", "formal=1"]
        result = cli(*command, "--prompt", QUESTIONS[0], "--max-new-tokens", 8, *arguments)
        assert result.exit_code == 0, result.output
        said.append(result.stdout)
    assert said[0] == said[1]


def test_the_tokens_that_end_a_checkpoints_replies_still_do(cli, with_config, ask, checkpoint):
    full = ask("--prompt", QUESTIONS[0], "--greedy").split()
    ends = AutoTokenizer.from_pretrained(checkpoint).convert_tokens_to_ids(full[2])
    folder = with_config("ends", {"eos_token_id": [1, ends], "pad_token_id": 0})
    result = cli("generate", "--model", folder, "--prompt", QUESTIONS[0], "--max-new-tokens", 8, "--greedy")
    assert result.stdout.split() == full[: full.index(full[2]) + 1]


def test_system_and_dtype_reach_the_model(ask):
    plain = ask("--prompt", QUESTIONS[0], "--greedy")
    assert ask("--prompt", QUESTIONS[0], "--greedy", "--system", "you are a pirate .") != plain
    assert ask("--prompt", QUESTIONS[0], "--greedy", "--dtype", "bfloat16").strip()


def test_a_prompt_persona_may_hold_an_equals_sign():
    assert assignments("--prompt-persona", ["Say x = 1 always.=0.5"]) == {"Say x = 1 always.": 0.5}
    assert assignments("--vector", [" warm =-2e-1"]) == {"warm": -0.2}


def test_every_sampler_of_the_engine_is_offered():
    from personafast.options import DRAFTS, SAMPLERS

    assert command.SAMPLERS == SAMPLERS and command.DRAFTS == DRAFTS


def test_rules_and_samplers_reach_the_engine(ask):
    policies = ["--policy", "formal=1", "--policy", "warm=1", "--prompt", QUESTIONS[0], "--seed", "3"]
    answers = {
        name: json.loads(ask(*policies, *more, "--json"))
        for name, more in {
            "direct": (),
            "block": ("--sampler", "block", "--chunk", "4"),
            "auto": ("--sampler", "auto"),
            "power": ("--aggregator", "power", "--power", "-2"),
            "base": ("--base", "formal"),
        }.items()
    }
    assert answers["block"]["stats"]["tokens_per_round"] > 1 == answers["direct"]["stats"]["tokens_per_round"]
    assert answers["auto"]["stats"]["notes"][0].startswith("auto: direct")
    assert len({answer["reply"] for answer in answers.values()}) > 2


def test_vectors_do_what_the_options_of_steering_say(ask, monkeypatch):
    spoke, real = [], command._answer

    def answer(network, tokenizer, personas, speaker, *rest):
        spoke.append(speaker)
        return real(network, tokenizer, personas, speaker, *rest)

    monkeypatch.setattr(command, "_answer", answer)
    vectors = {"creative": 4.0}
    said = [
        ([], pf.Persona(vectors)),
        (["--operation", "add", "--positions", "all", "--schedule", "constant"], pf.Persona(vectors)),
        (["--operation", "clamp", "--range", "3:"], pf.Steering(vectors, "clamp", low=3)),
        (["--operation", "clamp", "--range", "-40"], pf.Steering(vectors, "clamp", target=-40)),
        (["--normalize", "unit", "--positions", "0:2,-1:3"], ("unit", [(0, 2), (-1, 3)], "constant")),
        (["--schedule", "linear:4:1:0.5"], ("none", "all", pf.LinearSchedule(4, 1, 0.5))),
    ]
    for options, expected in said:
        ask("--prompt", QUESTIONS[0], "--vector", "creative=4", *options)
        if isinstance(expected, tuple):
            normalize, positions, schedule = expected
            expected = pf.Steering(vectors, normalize=normalize, positions=positions, schedule=schedule)
        if isinstance(expected, pf.Steering):
            expected = pf.Persona(steering=[expected])
        assert spoke.pop() == expected
    record = records(ask("--prompt", QUESTIONS[0], "--vector", "creative=4", "--positions", "last", "--json"))[0]
    assert record["settings"]["persona"]["positions"] == "last"
    # Files that were begun before these options were there go on.
    assert "positions" not in records(ask("--prompt", QUESTIONS[0], "--json"))[0]["settings"]["persona"]
