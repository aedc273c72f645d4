"""A run of the suite as lines for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def table(report: Mapping[str, Any]) -> Iterator[str]:
    """Ceilings, every case with its baselines, then what failed and what missed its goal."""
    ceilings = report["ceilings"]
    yield f"{report['hardware']['gpu']}: " + ", ".join(f"{name} {value:g}" for name, value in ceilings.items())
    for case in report["cases"]:
        if "contenders" in case:
            yield from _scene(case)
            continue
        if "ours" not in case:
            yield f"{case['name']}: {failure(case)}"
            continue
        ours = case["ours"]
        yield (
            f"{case['name']}: {ours['microseconds']['median']:.2f} us, {ours['gb_s']:.0f} GB/s = "
            f"{100 * ours['share_of_copy_bandwidth']:.0f} % of copy, {case['kernels_a_call']} kernels, "
            f"host {case['host_us_a_call']:.1f} us"
        )
        for name, entry in case["baselines"].items():
            if "absent" in entry:
                yield f"    {name}: absent: {entry['absent']}"
            else:
                ratio = entry["times_faster"]
                goal = f", goal {entry['goal']:.2f}" if "goal" in entry else ""
                yield (
                    f"    {name}: {entry['microseconds']['median']:.2f} us, ours {ratio['median']:.3f}x as fast "
                    f"[{ratio['low']:.3f}, {ratio['high']:.3f}]{goal}" + (" (eager)" if entry.get("eager") else "")
                )
    checks = report["checks"]
    passed = sum("relative_error" in check for check in checks)
    yield f"{passed} of {len(checks)} small cases in other dtypes passed"
    wrong = [f"{record['name']}: {failure(record)}" for record in report["cases"] + checks if "failed" in record]
    missed = [text for case in report["cases"] for text in misses(case)]
    for title, texts in (("failed", wrong), ("goals missed", missed)):
        yield f"{len(texts)} {title}" + (":" if texts else "")
        yield from (f"    {text}" for text in texts)


def _scene(case: Mapping[str, Any]) -> Iterator[str]:
    yield f"{case['name']}:"
    for name, entry in case["contenders"].items():
        if "absent" in entry:
            yield f"    {name}: absent: {entry['absent']}"
        else:
            yield f"    {name}: {entry['ms_a_token']:.3f} ms a token, {entry['tokens_per_s']:.0f} tokens/s"
    for found in case["comparisons"]:
        goal = f", goal {found['goal']:.2f}" if "goal" in found else ""
        yield f"    {found['contender']} is {found['times_faster']:.3f}x as fast as {found['baseline']}{goal}"


def failure(case: Mapping[str, Any]) -> str:
    """Why a case has no figures, or a check has failed."""
    where = f" ({case['dtype']})" if "dtype" in case else ""
    return (f"FAILED: {case['failed']}" if "failed" in case else f"skipped: {case['skipped']}") + where


def misses(case: Mapping[str, Any]) -> Iterator[str]:
    """Every goal of a measured case that it does not reach."""
    for found in case.get("comparisons", ()):
        if found.get("goal", 0) > found["times_faster"]:
            yield (
                f"{case['name']}: {found['contender']} {found['times_faster']:.3f}x of {found['baseline']}, goal "
                f"{found['goal']:.3f}x"
            )
    if "ours" not in case:
        return
    share, goal = case["ours"]["share_of_copy_bandwidth"], case.get("copy_share_goal")
    if goal is not None and share < goal:
        yield f"{case['name']}: {100 * share:.0f} % of copy bandwidth, goal {100 * goal:.0f} %"
    kernels, most = case["kernels_a_call"], case.get("kernels_goal")
    if most is not None and kernels is not None and kernels > most:
        yield f"{case['name']}: {kernels} kernels a call, goal {most}"
    for name, entry in case["baselines"].items():
        if "goal" in entry and entry["times_faster"]["median"] < entry["goal"]:
            yield f"{case['name']}: {entry['times_faster']['median']:.3f}x of {name}, goal {entry['goal']:.3f}x"
