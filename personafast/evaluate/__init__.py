"""How well a persona shows: choice tests, perplexity, intervals, and the comparison that `personafast demo` runs."""

from personafast.evaluate.choice import Choices, choose
from personafast.evaluate.intervals import Interval, newcombe_difference, paired_difference, wilson
from personafast.evaluate.items import ChoiceItem, read_items
from personafast.evaluate.perplexity import Perplexity, perplexity

__all__ = [
    "ChoiceItem",
    "Choices",
    "Interval",
    "Perplexity",
    "choose",
    "newcombe_difference",
    "paired_difference",
    "perplexity",
    "read_items",
    "wilson",
]
