"""What the demo's table and its figure share: colours, spans and the sentences under them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Light backgrounds that black text reads on and that colour-blind readers tell apart (after Okabe and Ito).
FIGURE_COLOURS = ("#ffd27f", "#9fd8ff", "#9be3c0", "#f7b3d6", "#f3ee8a", "#ffab91", "#c9c3f5", "#d0d4d9")
# A terminal of 16 colours would take two of those for the same.
TERMINAL_COLOURS = ("yellow", "cyan", "green", "magenta", "bright_yellow", "bright_red", "bright_blue", "white")

WHY = (
    "Why linear and scr do not blend: their target is a mixture of whole personas, so that each token, or each text, "
    "comes from one policy at a time, while direct multiplies the policies' ratios and every token must suit them all."
)


def colours(chosen: Sequence[str], palette: Sequence[str]) -> dict[str, str]:
    """One colour a trait."""
    return {name: palette[index % len(palette)] for index, name in enumerate(chosen)}


def verdict(result: Mapping[str, Any]) -> str:
    """The difference the demo is about, with its interval."""
    joint = {method["name"]: 100 * method["joint"]["rate"] for method in result["methods"]}
    difference = {key: 100 * value for key, value in result["settings"]["direct_minus_merge"].items()}
    return (
        f"All {len(result['chosen'])} traits at once: direct {joint['direct']:.0f} %, merge {joint['merge']:.0f} %, "
        f"difference {difference['rate']:+.0f} points (95 % interval {difference['low']:+.0f} to "
        f"{difference['high']:+.0f})."
    )


def conditions(result: Mapping[str, Any]) -> str:
    """The settings every method shares."""
    settings = result["settings"]
    return (
        f"{settings['replies']} replies a method, temperature {settings['temperature']:g}, min-p {settings['min_p']:g}"
        f", alpha {settings['alpha']:g}, seed {settings['seed']}; the mask is {settings['mask']}'s."
    )


def segments(reply: str, spans: Mapping[str, Sequence[Sequence[int]]]) -> Iterator[tuple[str, str | None]]:
    """Cut a reply into (text, trait or None) runs; where spans overlap the later trait wins."""
    owner: list[str | None] = [None] * len(reply)
    for name, positions in spans.items():
        for start, end in positions:
            owner[start:end] = [name] * (end - start)
    begin = 0
    for index in range(1, len(reply) + 1):
        if index == len(reply) or owner[index] != owner[begin]:
            yield reply[begin:index], owner[begin]
            begin = index
