"""Responses that the model gives itself under a trait's system prompts."""

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny
from scipy.stats import chisquare

import personafast as pf
from personafast.models.reading import TokenizedText
from personafast.vectors import Contrast, Responses, Sampling, TextPairs, TraitPrompts, extract_vectors
from personafast.vectors.extract import mean_activations
from personafast.vectors.responses import RowSampler

DATA = Path(__file__).resolve().parents[3] / "shared" / "data" / "billy"
TRAIT = TraitPrompts(
    (("you are a pirate", "you are a lawyer"), ("you are calm", "what is law")),
    ("what is this", "is this a ship , a ship", "yes"),
)


def responses(tmp_path, net, tok, trait=TRAIT, **options):
    """Every record of a run, and its vector."""
    found = extract_vectors(net, tok, {"sea": trait}, state=tmp_path, **options)["sea"]
    lines = next(tmp_path.rglob("responses.jsonl")).read_text().splitlines()
    return {(record["side"], record["place"]): record["ids"] for record in map(json.loads, lines)}, found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_responses_and_their_activations_by_hand(tmp_path, family):
    net, tok = tiny.model(family), tiny.tokenizer()
    ids, found = responses(tmp_path, net, tok, sampling=Sampling(max_new_tokens=5, temperature=0), batch_size=4)
    place, sides = 0, ([], [])
    for instruction in TRAIT.instructions:
        for question in TRAIT.questions:
            for side, system in enumerate(instruction):
                chat = [{"role": "system", "content": system}, {"role": "user", "content": question}]
                prompt = tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
                whole = net.generate(torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=1)[
                    0
                ].tolist()
                answer = whole[len(prompt) :]
                answer = answer[: answer.index(1)] if 1 in answer else answer
                assert ids["positive" if side == 0 else "negative", place] == answer
                sides[side].append(TokenizedText(prompt + answer, len(answer)))
            place += 1
    assert len(ids) == 12
    expected = mean_activations(net, sides[0]) - mean_activations(net, sides[1])
    torch.testing.assert_close(found.directions, expected.float(), atol=1e-4, rtol=1e-4)


def test_draws_do_not_depend_on_the_batch(tmp_path):
    net, tok = tiny.model(), tiny.tokenizer()
    drawn = Sampling(per_question=2, max_new_tokens=6, seed=3)
    found = [responses(tmp_path / str(size), net, tok, sampling=drawn, batch_size=size)[0] for size in (1, 5, 32)]
    assert found[0] == found[1] == found[2]
    assert len({tuple(ids) for ids in found[0].values()}) > 6
    more = Sampling(per_question=3, max_new_tokens=6, seed=3)
    assert responses(tmp_path / "more", net, tok, sampling=more)[0].items() >= found[0].items()
    other = Sampling(per_question=2, max_new_tokens=6, seed=4)
    assert responses(tmp_path / "other", net, tok, sampling=other)[0] != found[0]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7)])
def test_the_sampler_draws_from_the_models_distribution(temperature, top_p):
    count, logits = 40_000, torch.tensor([0.3, -1.0, 1.2, 0.0, -torch.inf, 0.9])
    sampler = RowSampler(range(count), 4, Sampling(temperature=temperature, top_p=top_p))
    drawn = sampler(torch.zeros(count, 7, dtype=torch.long), logits.repeat(count, 1)).argmax(dim=1)
    expected = torch.softmax(logits.double() / temperature, 0)
    if top_p < 1:
        # By hand: the likeliest tokens 2, 5 and 0 are the fewest that reach 0.7.
        assert expected[[2, 5]].sum() < 0.7 < expected[[2, 5, 0]].sum()
        expected[[1, 3, 4]] = 0
        expected /= expected.sum()
    observed = torch.bincount(drawn, minlength=6)
    possible = expected > 0
    assert not observed[~possible].any()
    assert chisquare(observed[possible], count * expected[possible]).pvalue > 1e-3


def test_a_judge_keeps_pairs_and_is_not_asked_again(tmp_path):
    net, tok = tiny.model(), tiny.tokenizer()
    asked = []

    def judge(question, response, trait):
        asked.append((question, trait))
        return 100.0 if len(asked) <= 6 else 49.9 if len(asked) % 2 else 50.0

    options = {"judge": judge, "sampling": Sampling(max_new_tokens=4), "state": tmp_path}
    found = extract_vectors(net, tok, {"sea": TRAIT}, **options)["sea"].metadata["filter"]
    assert (found["pairs"], found["kept"], found["filtered"], found["empty"]) == (6, 3, 3, 0)
    assert len(asked) == 12 and {trait for _, trait in asked} == {"sea"}
    extract_vectors(net, tok, {"sea": TRAIT}, **options)
    assert len(asked) == 12
    with pytest.raises(pf.PersonafastError, match="trait: no pair of 6 is left, 0 had an empty response and 6 did not"):
        extract_vectors(net, tok, {"sea": TRAIT}, sampling=options["sampling"], judge=lambda *_: float("nan"))


def test_coherence_counts_too():
    net, tok = tiny.model(), tiny.tokenizer()
    asked = set()

    def coherence(question, response, trait):
        asked.add(trait)
        return 20.0 if question == "yes" else 50.0

    found = extract_vectors(net, tok, {"sea": TRAIT}, coherence=coherence, sampling=Sampling(max_new_tokens=4))
    assert found["sea"].metadata["filter"]["kept"] == 4 and asked == {"coherence"}


def test_a_response_that_ends_at_once_is_dropped_with_its_pair():
    net, tok = tiny.model(), tiny.tokenizer()
    trait = TraitPrompts((("you are a pirate", "you are a lawyer"),), TRAIT.questions)
    sampling = Sampling(max_new_tokens=3, temperature=0)
    with torch.no_grad():
        chat = [{"role": "system", "content": "you are a pirate"}, {"role": "user", "content": "yes"}]
        ids = tok.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        first = int(net(torch.tensor([ids])).logits[0, -1].argmax())
    net.generation_config.eos_token_id = first
    found = extract_vectors(net, tok, {"sea": trait}, sampling=sampling)["sea"].metadata["filter"]
    assert found["empty"] >= 1 and found["kept"] + found["empty"] == 3


def test_the_models_own_settings_are_left_alone():
    net, tok = tiny.model(), tiny.tokenizer()
    net.generation_config.repetition_penalty = 5.0
    own = net.generation_config
    found = extract_vectors(net, tok, {"sea": TRAIT}, sampling=Sampling(max_new_tokens=4))["sea"]
    assert net.generation_config is own
    expected = extract_vectors(tiny.model(), tok, {"sea": TRAIT}, sampling=Sampling(max_new_tokens=4))["sea"]
    assert torch.equal(found.directions, expected.directions)


def test_prompts_and_the_tokens_they_end_in():
    """prompt_avg and prompt_last read what the system prompt does before anything is said."""
    net, tok = tiny.model(), tiny.tokenizer()
    for positions in ("prompt_avg", "prompt_last"):
        found = extract_vectors(net, tok, {"sea": TRAIT}, positions=positions, sampling=Sampling(max_new_tokens=1))[
            "sea"
        ]
        sides = []
        for side in (0, 1):
            texts = []
            for opening in (pair[side] for pair in TRAIT.chats(1)):
                ids = tok.apply_chat_template(opening, add_generation_prompt=True, return_dict=False)
                texts.append(TokenizedText(ids, len(ids) if positions == "prompt_avg" else 1))
            sides.append(mean_activations(net, texts))
        torch.testing.assert_close(found.directions, (sides[0] - sides[1]).float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "not a trait file"),
        ({"questions": ["a"]}, "no list 'instruction'"),
        ({"instruction": [{"pos": "a", "neg": "b"}]}, "no list 'questions'"),
        ({"instruction": [{"pos": "a", "neg": "b"}], "questions": []}, "no list 'questions', or an empty one"),
        ({"instruction": [{"pos": "a"}], "questions": ["a"]}, "instruction 0 has no text 'neg'"),
        ({"instruction": [{"pos": " ", "neg": "b"}], "questions": ["a"]}, "instruction 0 has no text 'pos'"),
        ({"instruction": [{"pos": "a", "neg": "b"}], "questions": ["a", 3]}, "question 1 is no text"),
    ],
)
def test_broken_trait_files_are_refused_by_name(tmp_path, value, message):
    path = tmp_path / "evil.json"
    path.write_text(json.dumps(value))
    with pytest.raises(pf.PersonafastError, match=rf"evil\.json: {message}"):
        extract_vectors(tiny.model(), tiny.tokenizer(), {"evil": path})


def test_templates_that_cannot_carry_a_system_prompt_are_refused():
    net, tok = tiny.model(), tiny.tokenizer()
    tok.chat_template = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] + ' ' }}{% endfor %}"
    with pytest.raises(pf.PersonafastError, match="trait: both sides give the same prompts"):
        extract_vectors(net, tok, {"sea": TRAIT})
    tok.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    with pytest.raises(pf.PersonafastError, match=r"trait: the chat template takes no system message \(no system\)"):
        extract_vectors(net, tok, {"sea": TRAIT})
    tok.chat_template = None
    with pytest.raises(pf.PersonafastError, match="trait: the tokenizer has no chat template"):
        extract_vectors(net, tok, {"sea": TRAIT})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", '{"positive": "a"}\n', r"a\.jsonl: line 1 is not"),
        ("a.jsonl", "[1]\n", r"a\.jsonl: line 1 is not"),
        (
            "a.jsonl",
            '{"positive": "a", "negative": "b"}\n\n{"positive": "", "negative": "b"}',
            "positive text 1 is empty",
        ),
        ("a.jsonl", "\n", r"a\.jsonl: no pairs"),
    ],
)
def test_broken_pairs_are_refused_by_file(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(pf.PersonafastError, match=message):
        TextPairs.from_jsonl(tmp_path / name)
    with pytest.raises(pf.PersonafastError, match=r"none\.jsonl: no such file"):
        TextPairs.from_jsonl(tmp_path / "none.jsonl")


def test_csv_files_of_persona_vectors_are_read_and_broken_ones_refused(tmp_path):
    good = tmp_path / "pos.csv"
    good.write_text('question,prompt,answer,question_id,evil,coherence\nq,<s> q,"a ""b"",\nc",e_0,77.5,\n')
    found = Responses.from_csv(good, good, "evil").positive[0]
    assert (found.question, found.prompt, found.answer, found.score) == ("q", "<s> q", 'a "b",\nc', 77.5)
    assert found.coherence != found.coherence  # nobody gave a number: NaN, which no threshold lets pass
    for text, message in (
        ("prompt,evil\na,1\n", "no column 'answer'; it has prompt, evil"),
        ("", "no column 'prompt'; it has none"),
        ("prompt,answer\np,a\n", "no column 'coherence', which the other file has"),
        ("prompt,answer,evil,coherence\np,a,high,3\n", "row 0, column 'evil': 'high' is no number"),
        ("prompt,answer,evil,coherence\np\n", "row 0 has fewer cells"),
        ("prompt,answer,evil,coherence\np,,1,1\n", "row 0 has an empty answer"),
        ("prompt,answer,evil,coherence\n", "1 positive and 0 negative rows"),
        (b"\xff\xfe", "not a CSV file in UTF-8"),
    ):
        bad = tmp_path / "neg.csv"
        bad.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(pf.PersonafastError, match=rf"neg\.csv: .*{message}"):
            Responses.from_csv(good, bad, "evil")


def test_a_csv_round_gives_the_vector_of_the_chats(tmp_path):
    """The text of a CSV row is the chat as it is rendered, so both sources give one vector."""
    net, tok = tiny.model(), tiny.tokenizer()
    pairs = [("you are calm", "sea"), ("a court , law", "a ship"), ("yes", "w30 w31")]
    chats, rows = ([], []), ([], [])
    for pair in pairs:
        for side, answer in enumerate(pair):
            opening = [{"role": "user", "content": "what is this"}]
            prompt = tok.apply_chat_template(opening, add_generation_prompt=True, tokenize=False)
            chats[side].append([*opening, {"role": "assistant", "content": answer}])
            rows[side].append(f'"{prompt}","{answer} </s>"\n')
    for side, lines in zip(("pos", "neg"), rows, strict=True):
        (tmp_path / f"{side}.csv").write_text("prompt,answer\n" + "".join(lines))
    source = Responses.from_csv(tmp_path / "pos.csv", tmp_path / "neg.csv", "calm")
    found = extract_vectors(net, tok, {"calm": source})["calm"]
    expected = extract_vectors(net, tok, {"calm": Contrast(*chats)})["calm"]
    torch.testing.assert_close(found.directions, expected.directions)
    assert found.metadata["source"] == "pos.csv, neg.csv"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data folder")
@pytest.mark.parametrize("name", ["creative_professional", "environmentalist", "futurist"])
def test_billys_trait_files_are_read(name):
    found = TraitPrompts.from_file(DATA / f"trait_{name}.json")
    assert len(found.instructions) >= 5 and len(found.questions) >= 5
    assert len(found.chats(2)) == 2 * len(found.instructions) * len(found.questions)
