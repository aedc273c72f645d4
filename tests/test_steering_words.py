"""What a step of steering may say, how it is read, and what is refused by name."""

import math

import pytest
import torch
from helpers import tiny

import personafast as pf
from personafast.models.steps import END
from personafast.recipes import window_of
from personafast.vectors import PersonaVector

ONE = {"creative": 1.0}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pf.Steering(), "vectors: empty"),
        (lambda: pf.Steering(ONE, "erase"), "operation: 'erase' is not one of add, ablate, clamp"),
        (lambda: pf.Steering({"a": math.nan}), r"vectors\['a'\]: nan"),
        (lambda: pf.Steering({"a": "much"}), r"vectors\['a'\]: 'much' is not a number"),
        (lambda: pf.Steering([("a", 1.0)]), "vectors: expected a mapping"),
        (lambda: pf.Steering({"a": 0.0}, "replace"), "vectors: every coefficient is 0"),
        (lambda: pf.Steering(ONE, strength=math.inf), "strength: inf"),
        (lambda: pf.Steering(ONE, strength=math.nan), "strength: nan"),
        (lambda: pf.Steering(ONE, "clamp"), "'clamp' needs low, high or both, or a target"),
        (lambda: pf.Steering(ONE, "clamp", low=2.0, high=1.0), "low: 2 is above high, 1"),
        (lambda: pf.Steering(ONE, "clamp", low=math.nan), "low: nan"),
        (lambda: pf.Steering(ONE, "clamp", low=1.0, target=1.0), "target: stands in place of a range; leave low out"),
        (lambda: pf.Steering(ONE, "ablate", high=1.0), "high: only operation='clamp' has one, this is 'ablate'"),
        (lambda: pf.Steering(ONE, positions="first"), "positions: 'first' is not one of all, prompt, response, last"),
        (lambda: pf.Steering(ONE, positions=[]), "positions: no span"),
        (lambda: pf.Steering(ONE, positions=[(3, 3)]), r"positions: the span \(3, 3\) is empty or reversed"),
        (lambda: pf.Steering(ONE, positions=[(0, 2), (-1, -3)]), r"the span \(-1, -3\) is empty or reversed"),
        (lambda: pf.Steering(ONE, positions=[(0.5, 2)]), "positions: .* neither one of"),
        (lambda: pf.Steering(ONE, positions=5), "positions: 5 is neither one of"),
        (lambda: pf.Steering(ONE, schedule="cosine"), "schedule: 'cosine' is none of"),
        (lambda: pf.Steering(ONE, schedule="first:soon"), "schedule: 'first:soon' is none of"),
        (lambda: pf.Steering(ONE, schedule="linear:0"), "LinearSchedule.steps: 0 is not a whole number"),
        (lambda: pf.Steering(ONE, schedule=lambda step: 1.0), "schedule: .* is none of"),
        (lambda: pf.FirstTokens(0), "FirstTokens.tokens: 0 is not a whole number of at least 1"),
        (lambda: pf.LinearSchedule(3, end=math.nan), "LinearSchedule.end: nan"),
        (lambda: pf.Steering(ONE, normalize="max"), "normalize: 'max' is not one of none, unit, match"),
        (lambda: pf.Steering(ONE, blocks=3), "blocks: 3 is not a sequence"),
        (lambda: pf.Persona(ONE, normalize="max"), "normalize: 'max'"),
        (lambda: pf.Persona(steering="add"), "steering: expected a sequence of Steering, got str"),
        (lambda: pf.Persona(steering=[ONE]), "steering: expected Steering, got dict"),
    ],
)
def test_nonsense_is_refused_by_name(make, message):
    with pytest.raises(pf.PersonafastError, match=message):
        make()


@pytest.mark.parametrize(
    ("given", "spans"),
    [
        ("all", [((0, 0), (END, 0))]),
        ("prompt", [((0, 0), (0, 1))]),
        ("response", [((-1, 1), (END, 0))]),
        ("last", [((-1, 1), (0, 1))]),
        ("3:8,-2:0", [((3, 0), (8, 0)), ((-2, 1), (0, 1))]),
        ([(2, -1), (-1, None), (4, None)], [((2, 0), (-1, 1)), ((-1, 1), (END, 0)), ((4, 0), (END, 0))]),
        ([(-1, 4)], [((-1, 1), (4, 1))]),
    ],
)
def test_positions_are_read_as_spans(given, spans):
    window = window_of(pf.Steering(ONE, positions=given))
    assert list(window.spans) == spans
    assert window.counts == any(share for span in spans for _, share in span)
    assert window.everywhere == (given == "all")


def test_schedules_are_read_from_text():
    assert pf.Steering(ONE, schedule="first:3").schedule == pf.FirstTokens(3)
    assert pf.Steering(ONE, schedule="linear:8").schedule == pf.LinearSchedule(8, 1.0, 0.0)
    assert pf.Steering(ONE, schedule="linear:8:2:0.5").schedule == pf.LinearSchedule(8, 2.0, 0.5)
    assert pf.Steering(ONE, schedule="constant").schedule == "constant"


def test_the_short_form_is_the_first_step():
    later = pf.Steering(ONE, "ablate")
    persona = pf.Persona(ONE, blocks=[1], normalize="unit", steering=later)
    assert persona.steps == (pf.Steering(ONE, blocks=(1,), normalize="unit"), later)
    # What can change nothing takes no row of a bank.
    assert pf.Persona({"creative": 0.0}, steering=[pf.Steering(ONE, strength=0.0)]).steps == ()


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (pf.Steering({"nobody": 1.0}), "no vector 'nobody' in the library"),
        (pf.Steering(ONE, blocks=[1, 99]), r"blocks: \[1, 99\] has an index that is not in 0..2"),
        (pf.Steering(ONE, "ablate", blocks=[2]), "'ablate' along 'creative' has no direction: it is zero"),
    ],
)
def test_what_the_model_or_its_library_lacks(net, library, step, message):
    rows = library.vectors["creative"].directions.clone()
    rows[2] = 0
    library.add_vector("creative", rows, blocks=(0, 1))
    with pf.attach(net, library) as handle:
        with pytest.raises(pf.PersonafastError, match=message), handle.using([pf.Persona(steering=[step])]):
            pass


def test_a_vector_of_another_place_is_refused(net, library):
    elsewhere = PersonaVector(torch.ones(tiny.BLOCKS, tiny.HIDDEN), hook_point="attention_output")
    with pytest.raises(pf.PersonafastError, match=r"vectors\['heads'\]: read at 'attention_output'"):
        library.add_vector("heads", elsewhere)
    unshaped = pf.PersonaLibrary()
    unshaped.add_vector("heads", elsewhere)
    with pytest.raises(pf.PersonafastError, match=r"vectors\['heads'\]: read at 'attention_output'"):
        pf.attach(net, unshaped)


def test_separate_models_take_no_steering_of_the_reference(net, library):
    policies = pf.PolicySet.from_models(net, {"judge": tiny.model(seed=4)})
    persona = pf.Persona(policies={"judge": 1.0}, steering=[pf.Steering(ONE, "ablate")])
    with pf.attach(net, library, policies=policies) as handle:
        with pytest.raises(pf.PersonafastError, match=r"policies\['judge'\] is a model of its own, which vectors"):
            handle.cast.spread(persona, 1)
