"""An interrupted extraction goes on where it stopped, and refuses to go on with anything else."""

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.vectors import Sampling, TextPairs, TraitPrompts, extract_vectors

TRAIT = TraitPrompts(
    (("you are a pirate", "you are a lawyer"), ("you are calm", "what is law")), ("what is this", "is this a ship")
)
SAMPLING = Sampling(per_question=2, max_new_tokens=6, seed=5)
PAIRS = TextPairs(
    ["a calm lawyer", "calm", "law is calm , yes", "a court w25"], ["a pirate", "sea sea", "ship , sea", "w26 ship"]
)


class Interrupted(Exception):
    pass


def counted(net):
    """The model, and a list that grows by the rows of every forward."""
    rows = []
    net.register_forward_pre_hook(lambda _, __, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True)
    return net, rows


def interrupt(stage, at):
    def stop(found, done, total):
        if found == stage and done >= at:
            raise Interrupted

    return stop


@pytest.mark.parametrize("method", ["mean_diff", "pca_center"])
@pytest.mark.parametrize(("stage", "at"), [("sea: responses", 6), ("sea: texts", 3), ("sea: texts", 11)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, method, stage, at):
    tok = tiny.tokenizer()
    options = {"method": method, "sampling": SAMPLING, "batch_size": 3}
    net, rows = counted(tiny.model())
    expected = extract_vectors(net, tok, {"sea": TRAIT}, **options)["sea"]
    whole = list(rows)
    with pytest.raises(Interrupted):
        extract_vectors(net, tok, {"sea": TRAIT}, state=tmp_path, on_progress=interrupt(stage, at), **options)
    del rows[:]
    found = extract_vectors(net, tok, {"sea": TRAIT}, state=tmp_path, **options)["sea"]
    assert 0 < sum(rows) < sum(whole)
    assert torch.equal(found.directions, expected.directions) and found.metadata == expected.metadata
    del rows[:]
    again = extract_vectors(net, tok, {"sea": TRAIT}, state=tmp_path, **options)["sea"]
    assert torch.equal(again.directions, found.directions) and rows == []


def test_one_batch_at_most_is_read_again(tmp_path):
    tok = tiny.tokenizer()
    net, rows = counted(tiny.model())
    with pytest.raises(Interrupted):
        extract_vectors(
            net, tok, {"calm": PAIRS}, state=tmp_path, batch_size=2, on_progress=interrupt("calm: texts", 4)
        )
    assert sum(rows) == 4
    del rows[:]
    extract_vectors(net, tok, {"calm": PAIRS}, state=tmp_path, batch_size=2)
    assert sum(rows) == 4


def test_batch_size_method_and_scale_may_change(tmp_path):
    net, tok = tiny.model(), tiny.tokenizer()
    with pytest.raises(Interrupted):
        extract_vectors(
            net, tok, {"calm": PAIRS}, state=tmp_path, batch_size=3, on_progress=interrupt("calm: texts", 3)
        )
    options = {"method": "logistic", "scale": "unit"}
    found = extract_vectors(net, tok, {"calm": PAIRS}, state=tmp_path, batch_size=1, **options)["calm"]
    expected = extract_vectors(net, tok, {"calm": PAIRS}, **options)["calm"]
    torch.testing.assert_close(found.directions, expected.directions, atol=1e-5, rtol=1e-4)


def test_a_line_that_a_crash_cut_short_is_drawn_again(tmp_path):
    net, tok = tiny.model(), tiny.tokenizer()
    expected = extract_vectors(net, tok, {"sea": TRAIT}, sampling=SAMPLING)["sea"]
    with pytest.raises(Interrupted):
        extract_vectors(
            net, tok, {"sea": TRAIT}, sampling=SAMPLING, state=tmp_path, on_progress=interrupt("sea: texts", 0)
        )
    path = next(tmp_path.rglob("responses.jsonl"))
    path.write_bytes(path.read_bytes()[:-9])
    found = extract_vectors(net, tok, {"sea": TRAIT}, sampling=SAMPLING, state=tmp_path)["sea"]
    torch.testing.assert_close(found.directions, expected.directions, atol=1e-5, rtol=1e-4)
    assert len(path.read_text().splitlines()) == 16


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": tiny.model(seed=1)}, "begun with another weights;"),
        ({"model": tiny.model("qwen2")}, "begun with another model, weights;"),
        ({"positions": "response_last"}, "begun with another positions;"),
        ({"sampling": Sampling(per_question=2, max_new_tokens=6, seed=6)}, "begun with another seed;"),
        ({"threshold": 60}, "begun with another threshold;"),
        ({"traits": {"sea": TraitPrompts(TRAIT.instructions, ("what is law",))}}, "begun with another questions;"),
        ({"statistics": False}, "begun with another statistics;"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, change, named):
    net, tok = tiny.model(), tiny.tokenizer()
    options = {"model": net, "traits": {"sea": TRAIT}, "sampling": SAMPLING, "state": tmp_path}
    extract_vectors(tokenizer=tok, **options)
    with pytest.raises(pf.PersonafastError, match=named):
        extract_vectors(tokenizer=tok, **{**options, **change})


def test_another_chat_template_is_refused_and_todays_date_is_not(tmp_path):
    net, tok = tiny.model(), tiny.tokenizer()
    plain = tok.chat_template
    tok.chat_template = plain + "{{ 'w%d' % (25 + strftime_now('%f')|int % 30) }}"  # a word that changes every time
    options = {"sampling": SAMPLING, "state": tmp_path}
    found = extract_vectors(net, tok, {"sea": TRAIT}, **options)["sea"]
    assert torch.equal(extract_vectors(net, tok, {"sea": TRAIT}, **options)["sea"].directions, found.directions)
    tok.chat_template = plain
    with pytest.raises(pf.PersonafastError, match="begun with another chat template;"):
        extract_vectors(net, tok, {"sea": TRAIT}, **options)


def test_other_texts_are_refused(tmp_path):
    net, tok = tiny.model(), tiny.tokenizer()
    extract_vectors(net, tok, {"calm": PAIRS}, state=tmp_path)
    other = TextPairs([*PAIRS.positive[:-1], "a law"], PAIRS.negative)
    with pytest.raises(pf.PersonafastError, match="begun with another texts;"):
        extract_vectors(net, tok, {"calm": other}, state=tmp_path)
    # Another trait has a part of the folder to itself, whatever its name.
    extract_vectors(net, tok, {"../calm": other}, state=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
