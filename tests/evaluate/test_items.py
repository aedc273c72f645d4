"""Choice items are read from the layouts that are published, and what is wrong with a file is said with its line."""

import json
from pathlib import Path

import pytest

from personafast.errors import FormatError
from personafast.evaluate import ChoiceItem, read_items

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


def test_a_letter_names_the_answer_that_shows_the_trait(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text('question,A,B,matching\n"More, or\nless?",Less,More,B\nMore?,Yes, No,a\n', encoding="utf-8-sig")
    assert read_items(path) == [
        ChoiceItem("More, or\nless?", ("Less", "More"), ("not_matching", "matching")),
        ChoiceItem("More?", ("Yes", "No"), ("matching", "not_matching")),
    ]


def test_pairs(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text("not_matching,question,matching,note\nNo,More?,Yes,x\n", encoding="utf-8")
    assert read_items(path) == [ChoiceItem("More?", ("Yes", "No"), ("matching", "not_matching"))]


@pytest.mark.parametrize("end", ["\n", "\\n"])
def test_lettered_questions_carry_their_answers(tmp_path, end):
    path = tmp_path / "items.json"
    entry = {"question": f"A day out: {end}A.Plan it{end}B. Just go", "A": "J", "B": "P"}
    for content in ({"1": entry}, [entry]):
        path.write_text(json.dumps(content), encoding="utf-8")
        assert read_items(path) == [ChoiceItem("A day out:", ("Plan it", "Just go"), ("J", "P"))]


def test_an_empty_question_is_left_out_aloud(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text("question,matching,not_matching\n ,Yes,No\nMore?,Yes,No\n", encoding="utf-8")
    with pytest.warns(UserWarning, match="line 2: the question is empty; left out"):
        assert len(read_items(path)) == 1


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.csv", "question,answer\nx,y\n", "has the columns answer, question; expected"),
        ("a.csv", "", "has the columns none"),
        ("a.csv", "question,matching,not_matching\n", "holds no items"),
        ("a.csv", "question,matching,not_matching\nx,same,same\n", "line 2: needs two different answers"),
        ("a.csv", "question,matching,not_matching\nx,only\n", "line 2: needs two different answers"),
        ("a.csv", "question,A,B,matching\nx,y,z,C\n", "line 2: matching is 'C'; give the letter A or B"),
        ("a.json", '{"1": {"question": "x"}}', 'item 1: expected {"question"'),
        ("a.json", '{"1": {"question": "x A. y B. z", "A": "E", "B": "I"}}', "item 1: its question does not end with"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[]", "holds no items"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(FormatError) as error:
        read_items(path)
    assert str(path) in str(error.value) and complaint in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FormatError, match="nobody.csv: no such file"):
        read_items(tmp_path / "nobody.csv")


@pytest.mark.skipif(not DATA.is_dir(), reason="the published items are not beside this checkout")
def test_published_files():
    power = read_items(DATA / "subnetworks" / "power_test_mc.csv")
    assert len(power) == 200 and {item.labels for item in power} == {
        ("matching", "not_matching"),
        ("not_matching", "matching"),
    }
    mbti = read_items(DATA / "mpg" / "mbti" / "mcqa.json")
    assert len(mbti) == 93 and {label for item in mbti for label in item.labels} == set("EISNTFJP")
    assert all(not item.answers[0].startswith("A") or "." not in item.answers[0][:3] for item in mbti)
