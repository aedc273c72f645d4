"""The conflict report against hand-made geometry."""

import json
import math

import pytest
import torch

import personafast as pf
from personafast.vectors import PersonaVector, blend, blend_report, cosines


def plane(*rows, blocks=(0,)):
    """Named vectors of one block in a plane: plane((1, 0), (0, 1)) is {"a": ..., "b": ...}."""
    return {
        name: PersonaVector(torch.tensor([row], dtype=torch.float32), blocks)
        for name, row in zip("abcd", rows, strict=False)
    }


def only(report):
    (block,) = report.blocks
    return block


def test_every_figure_of_two_vectors_at_an_angle():
    block = only(blend_report(plane((3, 0), (0, 2)), {"a": 1.0, "b": -2.0}))
    assert block.norms == {"a": 3.0, "b": 4.0} and block.norm == pytest.approx(5)
    assert block.cancelled == pytest.approx(1 - 5 / 7)
    assert block.shares == pytest.approx({"a": 3 / 7, "b": 4 / 7}) and block.ruler == "b"
    assert block.survives == pytest.approx({"a": 1, "b": 1})
    assert block.cosines == {"a": {"a": 1.0, "b": pytest.approx(0)}, "b": {"a": pytest.approx(0), "b": 1.0}}


def test_survival_says_what_the_others_take_and_give():
    # w_a = (2, 0), w_b = (-1, 1): the sum (1, 1) shows half of what was asked of a, and nothing of b's first half.
    block = only(blend_report(plane((2, 0), (-1, 1)), {"a": 1.0, "b": 1.0}))
    assert block.survives == pytest.approx({"a": 0.5, "b": 0.0})
    # A negative coefficient that is obeyed survives as 1 as well.
    assert only(blend_report(plane((2, 0)), {"a": -3.0})).survives == {"a": 1.0}
    helped = only(blend_report(plane((1, 0), (1, 0)), {"a": 1.0, "b": 1.0}))
    assert helped.survives == pytest.approx({"a": 2.0, "b": 2.0}) and helped.cancelled == 0


def test_a_negative_coefficient_turns_the_cosine():
    vectors = plane((1, 0), (1, 1))
    for sign in (1.0, -1.0):
        block = only(blend_report(vectors, {"a": 1.0, "b": sign}))
        assert block.cosines["a"]["b"] == pytest.approx(sign * math.sqrt(0.5))


@pytest.mark.parametrize("normalize", ["none", "unit", "match"])
def test_it_reports_on_the_blend_that_is_made(normalize):
    generator = torch.Generator().manual_seed(2)
    where = {"a": (0, 2), "b": (2, 3), "c": (1,), "d": (0,)}
    vectors = {name: PersonaVector(torch.randn(4, 6, generator=generator), blocks) for name, blocks in where.items()}
    coefficients = {"c": 0.5, "b": -1.0, "a": 2.0, "d": 0.0}
    report = blend_report(vectors, coefficients, normalize=normalize)
    rows = blend(vectors, coefficients, normalize=normalize)
    assert [block.block for block in report.blocks] == [0, 1, 2, 3]
    assert [list(block.norms) for block in report.blocks] == [["a"], ["c"], ["b", "a"], ["b"]]
    for block in report.blocks:
        row = rows[block.block].double()
        assert block.norm == pytest.approx(float(row.norm()), rel=1e-6)
        assert block.cancelled == pytest.approx(1 - block.norm / sum(block.norms.values()))
        for name, share in block.survives.items():
            part = blend(vectors, {name: coefficients[name]}, blocks=(block.block,))[block.block].double()
            part = part / part.norm() * block.norms[name]
            assert share == pytest.approx(float(row @ part / part.square().sum()), rel=1e-5)


def test_warnings_in_words_and_only_where_due():
    def warned(rows, coefficients, **options):
        return blend_report(plane(*rows), coefficients, **options).warnings

    assert warned([(1, 0), (0, 1)], {"a": 1.0, "b": 1.0}) == ()
    assert warned([(5, 0)], {"a": 1.0}) == ()  # alone, a vector does not rule
    (opposed,) = warned([(1, 0), (-1, 2)], {"a": 1.0, "b": 0.5})
    assert opposed == "a and b pull against each other: cosine -0.45 at block 0."
    assert warned([(1, 0), (-1, 2)], {"a": -1.0, "b": 0.5}) == ()
    (rules,) = warned([(1, 0), (0, 9)], {"a": 1.0, "b": 1.0})
    assert rules == 'b rules the blend: 90 % of the summed norms at block 0; normalize="match" makes all equally long.'
    (rules,) = warned([(1, 0), (0, 9)], {"a": 1.0, "b": 9.0}, normalize="match")
    assert rules == "b rules the blend: 90 % of the summed norms at block 0; its coefficient makes it so."
    assert warned([(1, 0), (0, 9)], {"a": 1.0, "b": 1.0}, normalize="match") == ()
    against, cancelled = warned([(1, 0), (-1, 0.1)], {"a": 1.0, "b": 1.0})
    assert against.startswith("a and b pull") and cancelled.startswith("95 % of the summed norms cancel at block 0")
    assert warned([(1, 0)], {"a": 0.0}) == ("Nothing acts: every coefficient is 0.",)


def test_a_warning_names_the_worst_block_and_counts_the_others():
    angles = torch.tensor([125.0, 150.0, 80.0, 100.0]).deg2rad()
    first = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    second = torch.stack([angles.cos(), angles.sin()], dim=1)
    vectors = {"a": PersonaVector(first, range(4)), "b": PersonaVector(second, range(4))}
    against, cancelled = blend_report(vectors, {"a": 1.0, "b": 1.0}).warnings
    assert "cosine -0.87 at block 1 (and so at 1 more)" in against
    assert cancelled == "74 % of the summed norms cancel at block 1 (and so at 1 more)."
    first[2] *= 4
    first[1] *= 3
    _, rules, _ = blend_report({**vectors, "a": PersonaVector(first, range(4))}, {"a": 1.0, "b": 1.0}).warnings
    assert rules.startswith("a rules the blend: 80 % of the summed norms at block 2 (and so at 1 more)")


def test_vectors_without_length_have_no_cosine_in_plain_json():
    vectors = {**plane((1, 0)), "flat": PersonaVector(torch.zeros(1, 2), (0,))}
    found = json.loads(json.dumps(blend_report(vectors, {"a": 1.0, "flat": 1.0}).as_dict(), allow_nan=False))
    (block,) = found["blocks"]
    assert block["cosines"] == {"a": {"a": 1.0, "flat": None}, "flat": {"a": None, "flat": None}}
    assert block["survives"] == {"a": 1.0, "flat": None} and block["shares"] == {"a": 1.0, "flat": 0.0}
    assert found["warnings"][0].startswith("a rules") and found["coefficients"] == {"a": 1.0, "flat": 1.0}
    nothing = blend_report(vectors, {"flat": 1.0}).as_dict()
    assert nothing["blocks"][0]["cancelled"] == 0.0 and nothing["blocks"][0]["shares"] == {"flat": 0.0}


def test_a_report_refuses_what_the_blend_refuses():
    with pytest.raises(pf.PersonafastError, match="no vector 'x'"):
        blend_report(plane((1, 0)), {"x": 1.0})


def test_cosines_are_torchs():
    rows = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.cosine_similarity(rows[:, None].double(), rows[None].double(), dim=-1)
    torch.testing.assert_close(cosines(rows), expected)
    assert torch.equal(cosines(rows).diagonal(), torch.ones(5, dtype=torch.float64))
