import random

import pytest

from personafast.zoo.grammar import draw_content, draw_fillers, draw_plan, draw_prompt, draw_reply, render
from personafast.zoo.traits import DEMO_TRAITS, SLOTS, TRAITS


@pytest.mark.parametrize("name", TRAITS)
def test_detector_sees_its_marker_in_every_slot_alone_and_nothing_without(name):
    trait, rng = TRAITS[name], random.Random(0)
    for slot, markers in trait.slots.items():
        for marker in markers:
            for _ in range(5):
                content = draw_content(rng)
                fillers = draw_fillers({}, rng)
                assert not trait.detect(render(content, fillers))
                reply = render(content, fillers | {slot: marker})
                assert trait.detect(reply), reply
                assert len(trait.spans(reply)) == 1
                assert [other for other in TRAITS if TRAITS[other].detect(reply)] == [name]


def test_spans_cover_the_markers_and_only_them():
    reply = "my dear, you can stir the soup in the pot with love. the soup gets rich. what do you think?"
    warm, curious = TRAITS["warm"], TRAITS["curious"]
    assert [reply[a:b] for a, b in warm.spans(reply)] == ["my dear", "with love"]
    assert [reply[a:b] for a, b in curious.spans(reply)] == ["what do you think"]


def test_detectors_ignore_case_and_spacing_but_not_word_borders():
    assert TRAITS["warm"].detect("My  Dear , sit down")
    assert not TRAITS["casual"].detect("they are ready")


def test_detector_matches_the_plan():
    rng = random.Random(1)
    for _ in range(1000):
        plan = draw_plan(rng, rate=0.3)
        reply = render(draw_content(rng), draw_fillers(plan, rng))
        assert {name for name, trait in TRAITS.items() if trait.detect(reply)} == set(plan.values())


def test_requests_show_no_trait():
    rng = random.Random(2)
    requests = [draw_prompt(draw_content(rng), rng) for _ in range(1000)]
    assert not any(trait.detect(text) for trait in TRAITS.values() for text in requests)


def test_formal_and_casual_never_share_a_reply():
    rng = random.Random(3)
    formal, casual = TRAITS["formal"], TRAITS["casual"]
    assert formal.opposite == "casual" and casual.opposite == "formal"
    assert formal.slots.keys() == casual.slots.keys()
    for _ in range(1000):
        reply = draw_reply(draw_content(rng), rng, [rng.choice(["formal", "casual"])], rate=0.5)
        assert formal.detect(reply) != casual.detect(reply)


def test_demo_traits_compete_for_slots_and_yet_fit_in_one_reply():
    users = {slot: [name for name in DEMO_TRAITS if slot in TRAITS[name].slots] for slot in SLOTS}
    assert sum(len(names) >= 2 for names in users.values()) >= 3
    assert all(len(TRAITS[name].slots) >= 2 for name in DEMO_TRAITS)
    rng = random.Random(4)
    plan = {"modal": "formal", "opener": "warm", "closer": "curious", "manner": "vivid"}
    reply = render(draw_content(rng), draw_fillers(plan, rng))
    assert all(TRAITS[name].detect(reply) for name in DEMO_TRAITS)
