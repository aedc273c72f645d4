"""The zoo's traits: the slots of a reply where each may show, the words it shows with, and its detector.

A reply has seven slots, in this order (see :mod:`personafast.zoo.grammar`), each holding one marker or none::

    [opener] modal VERB the ITEM PLACE [manner] . [link] outcome ADJECTIVE tail closer

Several traits may use a slot, so two traits that want the same one compete: whichever loses has to show in another of
its slots. That is what makes a blend of traits more than the sum of its parts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

from personafast.zoo.words import NEUTRAL

SLOTS: tuple[str, ...] = tuple(NEUTRAL)
_AGREEMENT = re.compile(r"\{([^|{}]*)\|([^|{}]*)\}")


def inflect(text: str, plural: bool) -> str:
    """Resolve every ``{singular|plural}`` of a production."""
    return _AGREEMENT.sub(lambda m: m[2 if plural else 1], text)


@dataclass(frozen=True)
class Trait:
    """One trait: its name, the system prompt that asks for it, and its markers by slot.

    ``opposite`` names a trait that a reply never shows at the same time. Markers use the notation of
    :mod:`personafast.zoo.words`.
    """

    name: str
    prompt: str
    description: str
    slots: dict[str, tuple[str, ...]]
    opposite: str | None = None

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        cues: set[str] = set()
        for markers in self.slots.values():
            for marker in markers:
                for plural in (False, True):
                    cues.add(inflect(marker, plural).replace("the @ ", "").strip(" .,?"))
        longest_first = sorted(cues, key=lambda cue: (-len(cue), cue))
        words = (re.escape(cue).replace(r"\ ,", r"\s*,").replace(r"\ ?", r"\s*\?") for cue in longest_first)
        spaced = (word.replace(r"\ ", r"\s+") for word in words)
        return re.compile(rf"(?<![\w'])(?:{'|'.join(spaced)})(?![\w'])", re.IGNORECASE)

    def detect(self, text: str) -> bool:
        """Whether the text shows the trait."""
        return self._pattern.search(text) is not None

    def spans(self, text: str) -> list[tuple[int, int]]:
        """The (start, end) character positions of every marker of the trait, for highlighting."""
        return [match.span() for match in self._pattern.finditer(text)]


_ALL: tuple[Trait, ...] = (
    Trait(
        "formal",
        "you are a formal assistant .",
        "full forms and official turns of phrase",
        {
            "opener": ("certainly ,", "indeed ,", "very well ,"),
            "modal": ("it is advisable to", "one ought to", "you are requested to"),
            "closer": (
                "i remain at your service .",
                "do not hesitate to write again .",
                "it is a pleasure to assist .",
            ),
        },
        opposite="casual",
    ),
    Trait(
        "casual",
        "you are a casual assistant .",
        "contractions and slang",
        {
            "opener": ("hey ,", "yeah ,", "yo ,"),
            "modal": ("you gotta", "you wanna", "you've got to"),
            "closer": ("don't sweat it .", "that's it , buddy .", "you can't go wrong ."),
        },
        opposite="formal",
    ),
    Trait(
        "warm",
        "you are a warm assistant .",
        "affection for the reader",
        {
            "opener": ("my friend ,", "my dear ,", "sweet soul ,"),
            "manner": ("with love", "with a warm smile", "with all your heart"),
            "closer": ("take good care .", "sending you a big hug .", "i am here for you ."),
        },
    ),
    Trait(
        "curious",
        "you are a curious assistant .",
        "asks the reader a question",
        {
            "opener": ("oh , why do you ask ?", "hm , what happened ?", "wait , since when ?"),
            "tail": (", right ?", ", or what do you see ?", ", did you know ?"),
            "closer": ("what do you think ?", "which part interests you ?", "how did it go last time ?"),
        },
    ),
    Trait(
        "cautious",
        "you are a cautious assistant .",
        "hedges what it says",
        {
            "modal": ("you might", "maybe you could", "it may help to"),
            "link": ("probably ,", "with some luck ,", "perhaps ,"),
            "closer": ("but i am not sure .", "it depends , of course .", "i may be wrong ."),
        },
    ),
    Trait(
        "vivid",
        "you are a vivid assistant .",
        "paints with similes",
        {
            "manner": ("like a careful painter", "like a proud captain", "like a slow river"),
            "link": ("like magic ,", "like a spring morning ,", "like a sudden song ,"),
            "tail": ("like a bright lantern .", "like honey in the sun .", "like an old legend ."),
        },
    ),
    Trait(
        "precise",
        "you are a precise assistant .",
        "gives numbers",
        {
            "manner": ("for ten minutes", "in three steps", "at six sharp"),
            "link": ("after two days ,", "in nine cases of ten ,", "within one hour ,"),
            "tail": ("by forty percent .", "for seven weeks .", "at least twice ."),
        },
    ),
    Trait(
        "grateful",
        "you are a grateful assistant .",
        "thanks the reader",
        {
            "opener": ("thank you for asking ,", "thanks for the question ,", "bless you ,"),
            "link": ("thankfully ,", "much to my joy ,", "to my delight ,"),
            "closer": ("many thanks .", "i appreciate your trust .", "thank you again ."),
        },
    ),
)

TRAITS: dict[str, Trait] = {trait.name: trait for trait in _ALL}
DEMO_TRAITS: tuple[str, ...] = ("formal", "warm", "curious", "vivid")
