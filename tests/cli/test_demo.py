import importlib.util
import io
import json

import pytest
from rich.console import Console

from personafast.cli import demo_figure, demo_table
from personafast.cli.demo_text import FIGURE_COLOURS, TERMINAL_COLOURS, WHY, colours, segments
from personafast.evaluate import newcombe_difference, wilson
from personafast.evaluate.demo import METHOD_NAMES
from personafast.zoo.traits import TRAITS

REPLY = "indeed, my friend, you should water the plants in the garden with love. the plants get green. right?"


@pytest.fixture
def result():
    chosen = ["formal", "warm", "curious"]
    spans = {name: [list(span) for span in TRAITS[name].spans(REPLY)] for name in chosen}
    methods = [
        {
            "name": name,
            "traits": {trait: wilson(10 * index, 100)._asdict() for trait in chosen},
            "joint": wilson(10 * index, 100)._asdict(),
            "grammar": 0.97,
            "tokens_per_s": 1000.0 * (index + 1),
            "forwards_per_token": 1.0 + index,
            "samples": [{"prompt": "how?", "reply": REPLY * (index + 1), "spans": spans}] * 2,
        }
        for index, name in enumerate(METHOD_NAMES)
    ]
    settings = {
        "replies": 100,
        "min_p": 0.05,
        "temperature": 1.0,
        "alpha": 1.0,
        "seed": 0,
        "mask": "formal",
        "how": dict.fromkeys(METHOD_NAMES, "somehow"),
        "direct_minus_merge": newcombe_difference(80, 100, 50, 100)._asdict(),
    }
    return {"chosen": chosen, "settings": settings, "methods": methods}


def printed(result, **options):
    text = io.StringIO()
    demo_table.show(result, Console(file=text, width=160, **options))
    return text.getvalue()


def test_the_table_holds_every_figure(result):
    text = printed(result)
    for method in result["methods"]:
        row = next(line for line in text.splitlines() if line.split()[:1] == [method["name"]])
        share = f"{100 * method['joint']['rate']:.0f}"
        assert row.split()[1:5] == [share] * 4 and f"{share} [" in row
        assert row.split()[-2:] == [f"{method['tokens_per_s']:,.0f}", f"{method['forwards_per_token']:.2f}"]
    assert "difference +30 points" in text
    assert WHY in " ".join(text.split())


def test_the_table_fits_a_terminal(result):
    text = io.StringIO()
    result["chosen"].append("cautious")
    for method in result["methods"]:
        method["traits"]["cautious"] = method["joint"]
        method["samples"] = []
    demo_table.show(result, Console(file=text, width=80))
    table = text.getvalue().partition("replies a method")[0]
    assert "…" not in table
    assert max(map(len, table.splitlines())) <= 80 and "  9.00" in table


def test_traits_are_highlighted_in_one_colour_each(result):
    text = printed(result, force_terminal=True, color_system="standard")
    assert (
        "\x1b[30;43mindeed\x1b[0m" in text
        and "\x1b[30;46mwith love\x1b[0m" in text
        and "\x1b[30;42mright\x1b[0m" in text
    )
    for palette in (FIGURE_COLOURS, TERMINAL_COLOURS):
        assert len(set(colours(list(TRAITS), palette).values())) == len(TRAITS)


def test_segments_rebuild_the_reply():
    spans = {"a": [[0, 3], [7, 9]], "b": [[2, 5]]}
    runs = list(segments("0123456789", spans))
    assert runs == [("01", "a"), ("234", "b"), ("56", None), ("78", "a"), ("9", None)]
    assert list(segments("", spans)) == []


def test_the_figure_is_a_png_and_replaces_the_old_one_whole(result, tmp_path, monkeypatch):
    path = tmp_path / "figure.png"
    demo_figure.save(result, path)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG") and len(first) > 20_000

    from matplotlib.figure import Figure

    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        demo_figure.save(result, path)
    assert path.read_bytes() == first and list(tmp_path.iterdir()) == [path]


def test_long_replies_wrap_inside_the_figure(result):
    for _, line in demo_figure._sample_lines(result):
        assert len("".join(word for word, _ in line).rstrip()) <= demo_figure.CHARACTERS


@pytest.fixture
def quick(monkeypatch, result):
    monkeypatch.setattr("personafast.cli.demo.run", lambda **settings: result)
    return result


def test_json_is_all_there_is_on_stdout(cli, quick, tmp_path):
    found = cli("demo", "--json")
    assert found.exit_code == 0 and json.loads(found.stdout) == quick
    assert not list((tmp_path / "here").iterdir())


def test_the_figure_lands_where_asked(cli, quick, tmp_path):
    assert cli("demo").exit_code == 0
    assert (tmp_path / "here" / "personafast-demo.png").is_file()
    assert cli("demo", "--output", tmp_path / "other.png").exit_code == 0
    assert (tmp_path / "other.png").is_file()


def test_without_matplotlib_a_note_takes_the_place_of_the_figure(cli, quick, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else real(name, *a))
    found = cli("demo")
    assert found.exit_code == 0 and "personafast[eval]" in found.stderr
    assert not list((tmp_path / "here").iterdir())


def test_the_real_thing(cli):
    found = cli("demo", "--replies", "4", "--json", "--traits", "formal,warm")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert [method["name"] for method in result["methods"]] == list(METHOD_NAMES)
    assert result["settings"]["min_p"] == 0.05 and result["settings"]["temperature"] == 1.0
