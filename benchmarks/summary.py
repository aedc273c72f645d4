"""The table at the end of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.results import Suite


def summary(suite: Suite) -> Iterator[str]:
    """Lines: ours first, then every baseline with how many times faster ours is."""
    for record in suite.records.values():
        yield ""
        if "skipped" in record:
            yield f"{record['name']}: skipped: {record['skipped']}"
            continue
        read = record["read_bandwidth_gb_s"]["median"]
        yield f"{record['name']} ({record['rounds']} rounds, memory read at {read:.0f} GB/s)"
        for name, entry in entries(record).items():
            yield f"    {name:44} " + (
                f"absent: {entry['absent']}" if "absent" in entry else _time(entry) + _ratio(entry)
            )


def entries(record: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that was measured of a case, by name, what the others are compared with first."""
    return record["contenders"] if "contenders" in record else {"ours": record["ours"], **record["baselines"]}


def _time(entry: Mapping[str, Any]) -> str:
    text = f"{duration(entry['microseconds']['median'])}"
    if "tokens_per_s" in entry:
        text += f"  {entry['tokens_per_s']:6.1f} tokens/s"
    text += f"  {entry['gb_s']:6.1f} GB/s  {100 * entry['share_of_read_bandwidth']['median']:4.0f} % of memory"
    if "extra_memory_bytes" in entry:
        text += f"  {entry['extra_memory_bytes'] / 2**20:.1f} MiB extra"
    return text


def _ratio(entry: Mapping[str, Any]) -> str:
    if "times_faster" not in entry:
        return ""
    ratio = entry["times_faster"]
    text = f"  ratio {ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
    if "goal" in entry:
        text += f"  goal {entry['goal']:.2f}: {'met' if ratio['median'] >= entry['goal'] else 'MISSED'}"
    if "share_of_its_memory" in entry and "memory_goal" in entry:
        text += f"  {entry['share_of_its_memory']:.3f} of its memory"
    return text


def duration(microseconds: float) -> str:
    """Three digits and a unit."""
    return f"{microseconds:8.1f} us" if microseconds < 1000 else f"{microseconds / 1000:8.2f} ms"
