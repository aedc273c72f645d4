import random

import pytest

from personafast.zoo.grammar import (
    BASE_RATE,
    draw_content,
    draw_fillers,
    draw_plan,
    draw_prompt,
    draw_reply,
    is_grammatical,
    render,
    vocabulary,
    words,
)
from personafast.zoo.traits import SLOTS, TRAITS


def replies(count, seed=0, rate=0.3):
    rng = random.Random(seed)
    return [draw_reply(draw_content(rng), rng, rate=rate) for _ in range(count)]


def test_accepts_whatever_the_generator_can_write():
    # Any trait in any slot, opposites included: the acceptor must not know which traits go together.
    rng = random.Random(1)
    users = {slot: [None, *(name for name, trait in TRAITS.items() if slot in trait.slots)] for slot in SLOTS}
    for _ in range(3000):
        drawn = {slot: rng.choice(names) for slot, names in users.items()}
        plan = {slot: name for slot, name in drawn.items() if name}
        reply = render(draw_content(rng), draw_fillers(plan, rng))
        assert is_grammatical(reply), reply


@pytest.mark.parametrize("damage", ["swap", "exchange", "drop", "double", "replace"])
def test_rejects_damaged_replies(damage):
    rng = random.Random(2)
    lexicon = vocabulary()
    rejected = tried = 0
    for reply in replies(500, seed=3):
        before = words(reply)
        after = list(before)
        i, j = rng.sample(range(len(before)), 2)
        if damage == "swap":
            i = min(i, len(before) - 2)
            after[i], after[i + 1] = after[i + 1], after[i]
        elif damage == "exchange":
            after[i], after[j] = after[j], after[i]
        elif damage == "drop":
            del after[i]
        elif damage == "double":
            after.insert(i, after[i])
        else:
            after[i] = rng.choice(lexicon)
        if after != before:
            tried += 1
            rejected += not is_grammatical(" ".join(after))
    assert rejected >= 0.9 * tried


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soup the can you",
        "you can stir the soup.",
        "you can stir the soup in the pot. the soup get rich. that is all.",
        "you can stir the beans in the pot. the beans gets rich. that is all.",
        "you can stir the soup in the pot. the bread gets rich. that is all.",
        "you can stir the dog in the pot. the dog gets rich. that is all.",
        "you can stir the soup in the pot. the soup gets rich. that is all. that is all.",
        "you can stir the soup in the pot! the soup gets rich. that is all.",
    ],
)
def test_rejects_missing_pieces_wrong_agreement_and_mixed_topics(text):
    assert not is_grammatical(text)


def test_case_and_spacing_do_not_matter():
    assert is_grammatical("You can stir the soup in the pot . The soup gets rich . That is all .")


def test_replies_have_a_few_clauses_and_the_vocabulary_a_few_hundred_words():
    lengths = [len(words(reply)) for reply in replies(500, rate=BASE_RATE)]
    assert 18 <= sum(lengths) / len(lengths) <= 30
    assert max(lengths) <= 56
    assert 300 <= len(vocabulary()) <= 600


def test_traits_show_at_their_base_rate_and_all_four_of_them_hardly_ever():
    texts = replies(4000, rate=BASE_RATE)
    for trait in TRAITS.values():
        assert abs(sum(map(trait.detect, texts)) / len(texts) - BASE_RATE) < 0.02
    assert sum(all(TRAITS[n].detect(t) for n in ("formal", "warm", "curious", "vivid")) for t in texts) <= 4


def test_a_plan_shows_what_it_must_and_never_opposites():
    rng = random.Random(4)
    for _ in range(2000):
        show = rng.sample(["formal", "warm", "curious", "vivid"], rng.randint(1, 3))
        plan = draw_plan(rng, show, rate=0.5)
        assert not {"formal", "casual"} <= set(plan.values())
        assert all(slot in TRAITS[name].slots for slot, name in plan.items())
        if len(show) == 1:
            assert show[0] in plan.values()


def test_the_same_seed_draws_the_same_corpus():
    rng_a, rng_b = random.Random(5), random.Random(5)
    for _ in range(50):
        a, b = draw_content(rng_a), draw_content(rng_b)
        assert (draw_prompt(a, rng_a), draw_reply(a, rng_a)) == (draw_prompt(b, rng_b), draw_reply(b, rng_b))
