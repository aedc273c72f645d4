"""The zoo's corpus: replies drawn from a small grammar, and an acceptor made of the same productions.

A reply is three clauses about one item of one topic::

    [opener] modal VERB the ITEM PLACE [manner] . [link] outcome ADJECTIVE tail closer

    my dear , you can stir the soup in the pot . like magic , the soup gets rich . what do you think ?

The slots in lower case hold a neutral filler or a trait's marker (:data:`personafast.zoo.traits.TRAITS`).
:func:`is_grammatical` knows nothing of who filled them, so it measures fluency independently of every trait.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from personafast.zoo.traits import SLOTS, TRAITS, inflect
from personafast.zoo.words import NEUTRAL, PROMPTS, TOPICS, Topic

BASE_RATE = 0.08
"""How often a reply of the reference corpus shows any one trait unasked."""

_TOKEN = re.compile(r"[a-z]+(?:'[a-z]+)?|[.,?]")


def tidy(text: str) -> str:
    """Join punctuation to the word before it, as the tokenizer's ``decode`` does."""
    return re.sub(r"\s+([.,?])", r"\1", text)


@dataclass(frozen=True)
class Content:
    """What a conversation is about, apart from how it is said."""

    topic: Topic
    item: str
    verb: str
    adjective: str
    place: str

    @property
    def plural(self) -> bool:
        """Whether the item is plural."""
        return self.item in self.topic.plural


def draw_content(rng: random.Random) -> Content:
    """Draw a topic, one of its items, and a verb, an adjective and a place that go with it."""
    topic = rng.choice(TOPICS)
    return Content(
        topic,
        rng.choice(topic.singular + topic.plural),
        rng.choice(topic.verbs),
        rng.choice(topic.adjectives),
        rng.choice(topic.places),
    )


def draw_prompt(content: Content, rng: random.Random) -> str:
    """Draw a short user request about the content's item."""
    text = inflect(rng.choice(PROMPTS), content.plural)
    return tidy(text.replace("@", content.item).replace("*", content.verb).replace("+", content.adjective))


def draw_plan(
    rng: random.Random, show: Iterable[str] = (), rate: float = BASE_RATE, never: Iterable[str] = ()
) -> dict[str, str]:
    """Draw which trait takes which slot: {slot: trait name}.

    Every trait of ``show`` gets a random non-empty subset of its slots; every other trait shows with probability
    ``rate``, except those of ``never`` and the opposites of those that already show. Traits take their slots in random
    order, and none takes a slot that is taken, unless a trait of ``show`` would be left with nothing.
    """
    wanted = list(show)
    barred = {*never, *(TRAITS[name].opposite for name in wanted)}
    for name in rng.sample(list(TRAITS), len(TRAITS)):
        if name not in wanted and name not in barred and rng.random() < rate:
            wanted.append(name)
            barred.add(TRAITS[name].opposite)
    rng.shuffle(wanted)
    plan: dict[str, str] = {}
    for name in wanted:
        free = [slot for slot in TRAITS[name].slots if slot not in plan]
        if free:
            plan.update(dict.fromkeys(_subset(rng, free), name))
    for name in show:
        if name not in plan.values():
            plan[rng.choice(list(TRAITS[name].slots))] = name
    return plan


def _subset(rng: random.Random, items: list[str]) -> list[str]:
    while True:
        chosen = [item for item in items if rng.random() < 0.5]
        if chosen:
            return chosen


def draw_fillers(plan: Mapping[str, str], rng: random.Random) -> dict[str, str]:
    """Draw the words of every slot: the planned trait's marker, else a neutral filler."""
    return {slot: rng.choice(TRAITS[plan[slot]].slots[slot] if slot in plan else NEUTRAL[slot]) for slot in SLOTS}


def render(content: Content, fillers: Mapping[str, str]) -> str:
    """Write the reply with these fillers."""
    f = fillers
    parts = (
        *(f["opener"], f["modal"], content.verb, "the", content.item, content.place, f["manner"], "."),
        *(f["link"], f["outcome"].replace("@", content.item), content.adjective, f["tail"], f["closer"]),
    )
    return tidy(inflect(" ".join(part for part in parts if part), content.plural))


def draw_reply(content: Content, rng: random.Random, show: Iterable[str] = (), rate: float = BASE_RATE) -> str:
    """Draw one reply that shows the traits of ``show``, and others at their base rate."""
    return render(content, draw_fillers(draw_plan(rng, show, rate), rng))


def vocabulary() -> list[str]:
    """Every token that a prompt, a reply or a trait's system prompt can hold, sorted."""
    texts = [*PROMPTS, *(trait.prompt for trait in TRAITS.values())]
    for topic in TOPICS:
        texts += [*topic.singular, *topic.plural, *topic.verbs, *topic.adjectives, *topic.places]
    for slot in SLOTS:
        texts += _fillers(slot)
    return sorted({token for text in texts for plural in (False, True) for token in words(inflect(text, plural))})


def words(text: str) -> list[str]:
    """Split lower-cased text into words and punctuation."""
    return _TOKEN.findall(text.lower())


def is_grammatical(text: str) -> bool:
    """Whether the text is a reply of the grammar, whatever traits it shows."""
    if re.sub(r"\s", "", text.lower()) != "".join(words(text)):
        return False
    flat = " ".join(words(text)) + " "
    return any(pattern.fullmatch(flat) for pattern in _acceptors())


@lru_cache(maxsize=1)
def _acceptors() -> tuple[re.Pattern[str], ...]:
    return tuple(re.compile(_production(topic, plural)) for topic in TOPICS for plural in (False, True))


def _production(topic: Topic, plural: bool) -> str:
    def slot(name: str) -> str:
        phrases = [inflect(phrase, plural) for phrase in _fillers(name)]
        return _any(phrases).replace("@ ", "(?P=item)")

    item = _any(topic.plural if plural else topic.singular)
    return (
        slot("opener")
        + slot("modal")
        + _any(topic.verbs)
        + f"the (?P<item>{item})"
        + _any(topic.places)
        + slot("manner")
        + r"\. "
        + slot("link")
        + slot("outcome")
        + _any(topic.adjectives)
        + slot("tail")
        + slot("closer")
    )


def _any(phrases: Iterable[str]) -> str:
    """A pattern that matches one of the phrases, each word followed by one space."""
    spelled = sorted({"".join(re.escape(word) + " " for word in phrase.split()) for phrase in phrases})
    return f"(?:{'|'.join(spelled)})"


def _fillers(slot: str) -> tuple[str, ...]:
    return NEUTRAL[slot] + tuple(m for trait in TRAITS.values() for m in trait.slots.get(slot, ()))
