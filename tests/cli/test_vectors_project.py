"""`personafast vectors project`: numbers under tokens, colours, JSON and the PNG."""

import functools
import importlib.util
import io
import json

import pytest
import torch
from rich.color import ColorSystem
from rich.console import Console

from personafast.cli.vectors import project_figure, project_text
from personafast.cli.vectors.heat import heat, signed
from personafast.cli.vectors.project_rows import Row, rows_of, scale_of, shown
from personafast.vectors import Projection

SYSTEMS = {"standard": ColorSystem.STANDARD, "256": ColorSystem.EIGHT_BIT, "truecolor": ColorSystem.TRUECOLOR}
TEXT = "my friend, you should paint the bike with love."


@pytest.fixture
def ran(cli):
    def run(*args):
        result = cli("vectors", "project", *args)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.fixture
def found():
    """Six tokens on two vectors at one block, the numbers chosen."""
    values = {"warm": [0.1, -2.0, 3.0, 0.5, 12.3, -250.0], "formal": [1.0, 1.5, -1.0, 0.0, 0.2, 0.3]}
    tensors = {name: torch.tensor(each)[:, None] for name, each in values.items()}
    return Projection(
        torch.arange(6),
        (" a", " longer", ",", "\n", " $x$", " end"),
        4,
        {"warm": (2,), "formal": (2,)},
        tensors,
        {name: each / 300 for name, each in tensors.items()},
    )


def printed(texts, cosine=False, **options):
    out = io.StringIO()
    project_text.show(texts, cosine, Console(file=out, **{"width": 80, **options}))
    return out.getvalue()


def test_every_token_stands_above_its_numbers(found):
    heading, warm, formal, *_ = printed([found]).splitlines()
    assert heading.split() == ["a", "longer", ",", "\\n", "$x$", "end"]
    assert warm.split() == ["warm", "+0.10", "-2.0", "+3.0", "+0.50", "+12", "-250"]
    assert formal.split() == ["formal", "+1.0", "+1.5", "-1.0", "+0.00", "+0.20", "+0.30"]
    # In columns: a token ends where its numbers end.
    for token, number in (("longer", "-2.0"), ("$x$", "+12"), ("end", "-250")):
        assert heading.index(token) + len(token) == warm.index(number) + len(number)


def test_the_summary_is_over_the_reply(found):
    text = printed([found])
    assert "Over the reply" in text
    row = next(line for line in text.split("Over the reply")[1].splitlines() if line.startswith("warm"))
    assert row.split() == ["warm", "-59", "+12", "$x$", "-250", "end"]


def test_colours_follow_sign_and_size_and_numbers_remain_without(found):
    plain = printed([found])
    coloured = printed([found], force_terminal=True, color_system="truecolor")
    assert "\x1b" not in plain and "48;2;" in coloured
    for system in ("standard", "256", "truecolor"):
        shade = functools.partial(heat, console=Console(force_terminal=True, color_system=system))
        assert shade(0.1, 1) == shade(0, 1) and shade(5, 1) == shade(1, 1)
        few = [shade(value, 1).bgcolor.downgrade(SYSTEMS[system]) for value in (-1, -0.5, -0.3, 0.3, 0.5, 1)]
        assert len(set(few)) == 6 and not {"white", "bright_white"} & {colour.name for colour in few}
    blue, red = shade(-1, 1).bgcolor.triplet, shade(1, 1).bgcolor.triplet
    assert blue.blue > blue.red and red.red > red.blue
    no_colour = printed([found], force_terminal=True, no_color=True, color_system="truecolor")
    assert "48;2;" not in no_colour and "-250" in no_colour


@pytest.mark.parametrize("width", [24, 40])
def test_a_narrow_terminal_gets_shorter_strips(found, width):
    text = printed([found, found], width=width)
    strips = text.partition("h . v")[0]
    assert max(map(len, strips.splitlines())) <= width and "\u2026" not in text
    assert text.count("-250") >= 4 and text.count("Text 2 of 2") == 1


def test_one_number_does_not_pale_the_others():
    values = [float(value) for value in range(-50, 50)]
    assert scale_of([Row("a", 0, [*values[1:], 1e6])]) < 50
    assert scale_of([Row("a", 0, [0.0, 0.0])]) == 1.0


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "+0.00"), (0.994, "+0.99"), (0.996, "+1.0"), (-9.94, "-9.9"), (9.96, "+10"), (-1234.5, "-1234")],
)
def test_numbers_have_three_figures_and_a_sign(value, text):
    assert signed(value) == text


def test_tokens_stay_on_one_line():
    assert [shown(token) for token in (" a", "\n\n", "\t", " ", "")] == ["a", "\\n\\n", "\\t", "\u00b7", "\u00b7"]


def test_json_is_what_the_library_finds(ran, checkpoint, personas):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import personafast as pf
    from personafast.vectors import project

    texts = ["this is a ship .", "yes"]
    arguments = [part for text in texts for part in ("--text", text)]
    got = json.loads(ran("--model", checkpoint, "--library", personas, *arguments, "--vector", "futurist", "--json"))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    vectors = {"futurist": pf.PersonaLibrary.from_pretrained(personas).vectors["futurist"]}
    for record, text, each in zip(got["texts"], texts, project(model, tokenizer, texts, vectors), strict=True):
        assert record["text"] == text and record["tokens"] == list(each.tokens) and record["ids"] == each.ids.tolist()
        assert record["blocks"] == {"futurist": [0, 1]} and record["response"] == each.response
        for key, values in (("projections", each.values), ("cosines", each.cosines)):
            torch.testing.assert_close(torch.tensor(record[key]["futurist"]), values["futurist"], atol=1e-4, rtol=1e-4)


def test_the_zoo_and_a_file_of_texts(ran, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in (TEXT, "you should paint the bike.")))
    text = ran("--texts-file", path, "--vector", "warm", "--vector", "formal")
    assert "Text 1 of 2" in text and "friend" in text and "block 2" in text and "casual" not in text
    several = ran("--text", TEXT, "--vector", "warm", "--block", 0, "--block", 3, "--cosine")
    assert "warm @0" in several and "warm @3" in several and "cosine of h and v" in several


def test_a_prompt_makes_the_text_a_reply(ran):
    arguments = ["--text", TEXT, "--vector", "warm"]
    (record,) = json.loads(ran(*arguments, "--prompt", "may i paint the bike?", "--json"))["texts"]
    assert "<|assistant|>" in record["tokens"] and record["response"] < len(record["tokens"])
    assert "Over the reply" in ran(*arguments, "--prompt", "may i paint the bike?")
    assert "Over the text" in ran(*arguments)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_the_figure_is_drawn(ran, found, tmp_path):
    from matplotlib.image import imread

    path = tmp_path / "heat.png"
    assert f"figure: {path}" in ran("--text", TEXT, "--vector", "warm", "--block", "all", "--plot", path)
    tall = imread(path).shape[0]
    ran("--text", TEXT, "--vector", "warm", "--plot", path)
    assert imread(path).shape[0] < tall
    project_figure.save([found], False, path)
    image = imread(path)[..., :3]
    # Both signs are drawn: pixels clearly red and pixels clearly blue.
    assert ((image[..., 0] - image[..., 2]) > 0.3).any() and ((image[..., 2] - image[..., 0]) > 0.3).any()


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")
def test_zero_is_the_middle_of_the_figures_colours(found, monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(project_figure, "save_figure", lambda figure, path: drawn.append(figure))
    project_figure.save([found], False, tmp_path / "heat.png")
    (image,) = drawn[0].axes[0].images
    low, high = image.get_clim()
    assert low == -high and high == pytest.approx(scale_of(rows_of(found, cosine=False)))
    expected = torch.stack([found.values[name][:, 0] for name in ("warm", "formal")])
    torch.testing.assert_close(torch.tensor(image.get_array().tolist()), expected)
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == ["warm", "formal"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "--text: give either --text TEXT or --texts-file FILE"),
        (("--text", "a", "--texts-file", "b"), "--text: give either"),
        (("--text", " "), "--text: the text is empty"),
        (("--texts-file", "missing.txt"), "missing.txt: no such file; --texts-file takes"),
        (("--text", "hi", "--prompt", ""), "--prompt: the prompt is empty"),
        (("--text", "hi", "--vector", "nobody"), "--vector 'nobody': no such vector"),
        (("--text", "hi", "--block", "9"), "--block '9': give a number in 0..3, or all"),
        (("--text", "hi", "--plot", "nowhere/a.png"), "the folder nowhere does not exist"),
        (("--text", "hi", "--device", "warp"), "--device 'warp'"),
    ],
)
def test_refusals(cli, arguments, message):
    result = cli("vectors", "project", *arguments)
    assert result.exit_code == 2 and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    assert message in line


def test_a_library_of_another_model(cli, checkpoint, personas):
    result = cli("vectors", "project", "--library", personas, "--text", "hi")
    assert result.exit_code == 2 and "vectors['creative']: [3, 32], and the model has 4 blocks" in result.stderr
    result = cli("vectors", "project", "--model", checkpoint, "--text", "hi")
    assert result.exit_code == 2 and "--library: holds no vectors" in result.stderr
