"""The vocabulary of the zoo's little language: everyday topics, written for this project."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """One everyday topic.

    Every verb takes every item as its object, every adjective describes every item, and every place follows any verb,
    so that a sentence is well formed whatever is drawn.
    """

    name: str
    singular: tuple[str, ...]
    plural: tuple[str, ...]
    verbs: tuple[str, ...]
    adjectives: tuple[str, ...]
    places: tuple[str, ...]


def _topic(name: str, singular: str, plural: str, verbs: str, adjectives: str, places: str) -> Topic:
    return Topic(
        name,
        tuple(singular.split()),
        tuple(plural.split()),
        tuple(verbs.split()),
        tuple(adjectives.split()),
        tuple(place.strip() for place in places.split("/")),
    )


TOPICS: tuple[Topic, ...] = (
    _topic(
        "cooking",
        "soup bread rice sauce",
        "potatoes noodles beans",
        "stir taste warm season cover",
        "rich soft tender tasty smooth",
        "in the pot / on the stove / over a low flame",
    ),
    _topic(
        "weather",
        "storm rain wind",
        "clouds showers",
        "watch follow expect check mind",
        "mild heavy calm cold grey",
        "from the window / in the morning / on the hill",
    ),
    _topic(
        "garden",
        "rose lawn hedge",
        "tulips herbs tomatoes",
        "water trim feed shade plant",
        "green healthy strong bright tall",
        "in the evening / near the fence / under the tree",
    ),
    _topic(
        "travel",
        "trip route hotel",
        "tickets bags trains",
        "check plan compare choose arrange",
        "cheap simple safe easy comfortable",
        "at the station / before the holiday / near the coast",
    ),
    _topic(
        "music",
        "song guitar melody",
        "drums chords violins",
        "practise play record study enjoy",
        "clear loud gentle lively sweet",
        "in the studio / on the stage / after dinner",
    ),
    _topic(
        "neighbours",
        "neighbour landlord couple",
        "kids twins tenants",
        "greet invite visit call help",
        "friendly quiet polite cheerful patient",
        "at the door / in the hallway / on the street",
    ),
    _topic(
        "work",
        "report meeting budget",
        "emails notes plans",
        "review finish share improve discuss",
        "short useful neat complete convincing",
        "at the office / before lunch / with the team",
    ),
    _topic(
        "pets",
        "dog cat parrot",
        "rabbits kittens hamsters",
        "brush feed train pet wash",
        "happy playful lazy tame clean",
        "on the sofa / in the yard / by the bowl",
    ),
    _topic(
        "repair",
        "bike lamp roof",
        "pipes brakes hinges",
        "fix inspect replace tighten paint",
        "solid steady sturdy tight silent",
        "in the garage / with a wrench / on the bench",
    ),
    _topic(
        "reading",
        "novel poem diary",
        "stories letters essays",
        "read write edit copy finish",
        "honest funny moving deep thrilling",
        "in the library / on the balcony / at the desk",
    ),
    _topic(
        "sport",
        "race match workout",
        "drills games laps",
        "start practise repeat enjoy schedule",
        "fast hard fun fair intense",
        "in the park / at the gym / on the track",
    ),
)

# `@` stands for the item, `*` for a verb, `+` for an adjective, {a|b} for the singular and the plural form.
PROMPTS: tuple[str, ...] = (
    "how do i * the @ ?",
    "should i * the @ ?",
    "when can i * the @ ?",
    "tell me about the @ .",
    "any advice about the @ ?",
    "can you help me with the @ ?",
    "the @ {is|are} not + . what now ?",
    "i want the @ to be + .",
    "what is the best way to * the @ ?",
    "my @ {needs|need} some help .",
    "i have to * the @ today .",
    "why {is|are} the @ so + ?",
)

# What a slot holds when no trait takes it. An empty string leaves the slot out.
NEUTRAL: dict[str, tuple[str, ...]] = {
    "opener": ("",),
    "modal": ("you can", "you should", "it helps to", "try to", "remember to"),
    "manner": ("",),
    "link": ("",),
    "outcome": ("the @ {gets|get}", "the @ {stays|stay}", "the @ {looks|look}", "the @ {feels|feel}"),
    "tail": (".",),
    "closer": ("that is all .", "this works every time .", "the rest is easy .", "nothing else matters ."),
}
