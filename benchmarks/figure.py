"""The figure of one machine: how many times faster than the first baseline, and the share of the read bandwidth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

OURS, THEIRS = "#1f6f8b", "#c9c9c9"


def bars(machine: Mapping[str, Any]) -> list[tuple[str, float, float, float]]:
    """(label, times faster, our share, the first baseline's share), from decoding to the smallest operator."""
    found = []
    for suite in ("decode", "ops"):
        for case in machine.get(suite, {}).get("cases", ()):
            if "skipped" in case:
                continue
            if "contenders" in case:
                theirs = case["contenders"][case["baseline"]]
                for name, entry in case["contenders"].items():
                    if "times_faster" in entry:
                        found.append((f"{case['name']}: {name}", *_numbers(entry, entry, theirs)))
            else:
                theirs = next((entry for entry in case["baselines"].values() if "absent" not in entry), None)
                if theirs is not None:
                    found.append((case["name"], *_numbers(theirs, case["ours"], theirs)))
    return found


def _numbers(
    ratio: Mapping[str, Any], ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> tuple[float, float, float]:
    shares = [100 * entry["share_of_read_bandwidth"]["median"] for entry in (ours, theirs)]
    return ratio["times_faster"]["median"], shares[0], shares[1]


def draw(machine: Mapping[str, Any], path: Path) -> None:
    """Draw the bars of `machine` into a PNG at `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = bars(machine)
    places = range(len(found))
    figure, (left, right) = plt.subplots(1, 2, sharey=True, figsize=(13, 1.5 + 0.24 * len(found)), layout="constrained")
    # From 1 on: to the right where ours is faster, to the left where it is slower.
    left.barh(places, [bar[1] - 1 for bar in found], left=1, color=OURS)
    left.axvline(1, color="black", linewidth=1)
    left.set_xscale("log")
    left.set_xticks([0.25, 0.5, 1, 2, 4, 8, 16, 64], ["1/4", "1/2", "1", "2", "4", "8", "16", "64"])
    left.minorticks_off()
    left.set_xlabel("times faster than the first baseline")
    left.set_yticks(places, [bar[0] for bar in found], fontsize=8)
    left.invert_yaxis()
    right.barh([place - 0.2 for place in places], [bar[2] for bar in found], 0.4, color=OURS, label="ours")
    right.barh([place + 0.2 for place in places], [bar[3] for bar in found], 0.4, color=THEIRS, label="baseline")
    right.axvline(100, color="black", linewidth=1)
    right.set_xlabel("% of the measured read bandwidth")
    right.legend(loc="lower right")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
