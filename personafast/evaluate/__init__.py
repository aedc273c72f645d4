"""Measures of how well a persona shows: intervals for shares of replies, and the comparison `personafast demo` runs."""

from personafast.evaluate.intervals import Interval, newcombe_difference, wilson

__all__ = ["Interval", "newcombe_difference", "wilson"]
