import json
from pathlib import Path

import pytest

from personafast.evaluate import newcombe_difference, readme_table, wilson

RESULT = {
    "chosen": ["formal", "warm"],
    "settings": {
        "replies": 400,
        "temperature": 1.0,
        "min_p": 0.05,
        "alpha": 1.0,
        "how": {"merge": "merged", "direct": "geometric"},
        "direct_minus_merge": newcombe_difference(330, 400, 190, 400)._asdict(),
    },
    "methods": [
        {
            "name": name,
            "traits": {"formal": wilson(300, 400)._asdict(), "warm": wilson(200, 400)._asdict()},
            "joint": wilson(count, 400)._asdict(),
            "grammar": 0.9925,
            "tokens_per_s": 12345.6,
            "forwards_per_token": forwards,
        }
        for name, count, forwards in (("merge", 190, 1.0), ("direct", 330, 5.0))
    ],
}


@pytest.fixture
def figures(tmp_path):
    path = tmp_path / "demo.json"
    path.write_text(json.dumps(RESULT))
    return path


def test_the_table_takes_the_place_of_what_stood_there(figures, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n")
    for _ in range(2):
        assert readme_table.main([str(figures), str(page)]) == 0
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        assert "| **direct** | geometric | 75 % | 50 % | 82 % [78, 86] | 99.2 % | 12,346 | 5.00 |" in text
        assert text.count("| merge |") == 1 and "+35 points (95 % interval +29 to +41)" in text


def test_the_readme_has_a_place_for_it():
    page = Path(__file__).resolve().parents[2] / "README.md"
    text = page.read_text(encoding="utf-8")
    assert text.index(readme_table.BEGIN) < text.index(readme_table.END)


@pytest.mark.parametrize(("content", "complaint"), [("{}", "demo.json: not the output"), ("[", "not valid JSON")])
def test_other_files_are_refused(figures, tmp_path, capsys, content, complaint):
    figures.write_text(content)
    page = tmp_path / "page.md"
    page.write_text(f"{readme_table.BEGIN}{readme_table.END}")
    assert readme_table.main([str(figures), str(page)]) == 2
    assert complaint in capsys.readouterr().err
    assert page.read_text() == f"{readme_table.BEGIN}{readme_table.END}"


def test_a_page_without_a_place_and_no_arguments_are_refused(figures, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("nothing here")
    assert readme_table.main([str(figures), str(page)]) == 2
    assert "lacks the lines" in capsys.readouterr().err
    assert readme_table.main([]) == 2
