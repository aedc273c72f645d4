"""Calibration texts come out of every kind of file, and a broken one is named."""

import json
from pathlib import Path

import pytest

import personafast as pf
from personafast.masks import CalibrationText, read_texts

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
TABLE = 'question,matching,not_matching\n"May I, sir?",Yes,"No, never"\n,Alone,Not alone\n'


def write(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text.encode())
    return path


def test_plain_text(tmp_path):
    lines = write(tmp_path, "a.txt", "\ufeffcalm sea\r\n\u2028still one line\r\n")
    assert read_texts(lines) == [CalibrationText("calm sea"), CalibrationText("still one line")]
    paragraphs = write(tmp_path, "b.txt", "calm\nsea\n\n\nship \n")
    assert read_texts(paragraphs) == [CalibrationText("calm sea"), CalibrationText("ship")]
    assert read_texts(paragraphs, containing="hip") == [CalibrationText("ship")]
    with pytest.raises(pf.FormatError, match=r"b\.txt: plain text has no other side"):
        read_texts(paragraphs, side="negative")


def test_tables(tmp_path):
    path = write(tmp_path, "a.csv", TABLE)
    assert read_texts(path) == [CalibrationText("Yes", "May I, sir?"), CalibrationText("Alone")]
    assert read_texts(path, side="negative") == [
        CalibrationText("No, never", "May I, sir?"),
        CalibrationText("Not alone"),
    ]
    with pytest.raises(pf.FormatError, match=r"b\.csv: no column 'matching'"):
        read_texts(write(tmp_path, "b.csv", "question,answer\na,b\n"))
    with pytest.raises(pf.FormatError, match=r"c\.csv: row 3 has no matching"):
        read_texts(write(tmp_path, "c.csv", TABLE.replace("Alone", " ")))


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Ahoy"}]


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_records(tmp_path, form):
    records = [
        {"prompt": "hi", "chosen": CHAT, "rejected": "Hello"},
        {"question": "who", "matching": "me", "not_matching": "you"},
        {"prompt": CHAT[:1], "chosen": "Aye", "rejected": "Yes"},
    ]
    lines = "\n".join(json.dumps(record) for record in records) + "\n\n"
    path = write(tmp_path, f"a.{form}", lines if form == "jsonl" else json.dumps(records))
    assert read_texts(path) == [
        CalibrationText("Ahoy", "hi"),
        CalibrationText("me", "who"),
        CalibrationText("Aye", "hi"),
    ]
    assert [text.response for text in read_texts(path, side="negative")] == ["Hello", "you", "Yes"]
    assert [text.response for text in read_texts(path, containing="who")] == ["me"]


def test_records_of_one_text(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"text": "calm sea"}\n{"prompt": "hi", "response": "Ahoy"}')
    assert read_texts(path) == [CalibrationText("calm sea"), CalibrationText("Ahoy", "hi")]


def test_bad_files_are_named(tmp_path):
    for name, text, match in (
        ("a.json", "{", r"a\.json: not valid JSON"),
        ("b.json", "{}", r"b\.json: expected a list of objects"),
        ("c.json", '[{"text": " "}]', r"c\.json: entry 1 has no text under matching or chosen"),
        ("d.jsonl", '{"text": "a"}\n["b"]', r"d\.jsonl: entry 2 has no text"),
        ("e.jsonl", '{"text": 3}', r"e\.jsonl: entry 1 has no text"),
        ("f.txt", " \n\n", r"f\.txt: holds no calibration text"),
        ("g.json", "[]", r"g\.json: holds no calibration text"),
    ):
        with pytest.raises(pf.FormatError, match=match):
            read_texts(write(tmp_path, name, text))
    (tmp_path / "h.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(pf.FormatError, match=r"h\.txt: not UTF-8"):
        read_texts(tmp_path / "h.txt")
    with pytest.raises(pf.FormatError, match="no such file"):
        read_texts(tmp_path / "none.txt")
    with pytest.raises(pf.FormatError, match="no text whose prompt holds 'zebra'"):
        read_texts(write(tmp_path, "a.csv", TABLE), containing="zebra")
    with pytest.raises(pf.PersonafastError, match="side: 'left'"):
        read_texts(tmp_path / "a.csv", side="left")


@pytest.mark.skipif(not DATA.is_dir(), reason="no shared/data beside the checkout")
def test_published_files():
    table = DATA / "subnetworks" / "power_train.csv"
    own, other = read_texts(table), read_texts(table, side="negative")
    assert len(own) == len(other) == 642 and own[0].prompt == other[0].prompt != ""
    preferences = DATA / "mpg" / "mbti" / "dpo_e_i_test.json"
    poles = [read_texts(preferences, containing=f"the '{pole}'") for pole in "EI"]
    assert sum(map(len, poles)) == len(read_texts(preferences)) == 72 and all(poles)
