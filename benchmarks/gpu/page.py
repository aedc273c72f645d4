"""The part of docs/performance.md about GPUs: what was measured, or that nothing was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.table import failure, misses
from personafast._io import read_json

NOTHING = """## GPUs

No GPU figure has been measured: none could be had while the Triton kernels were written, so nothing is claimed of their
speed. They are checked in Triton's interpreter and compiled for sm_80, 90 and 100 ([kernels](kernels.md#triton)).
`python -m benchmarks.gpu_suite` checks and times all of them on any machine with a GPU in under ten minutes; commit the
`gpu.json` it writes, and `python -m benchmarks.report` puts its figures here."""

ABOUT = """Written by `python -m benchmarks.gpu_suite`. Every kernel was checked first, on fresh random inputs and
poisoned memory, against float64. Times are medians over replays of CUDA graphs, by CUDA events, with buffers that
rotate through more than four times the L2 cache; ratios are formed inside a round, brackets are quartiles. The share is
that of the copy bandwidth measured in the same run; *host* is what a call costs the thread that makes it, outside of a
graph."""


def load(folder: Path) -> list[dict[str, Any]]:
    """The results of GPUs under `folder`, kernels before decoding; those of a rehearsal do not count."""
    paths = [*sorted(folder.glob("*/gpu.json")), *sorted(folder.glob("*/gpu-decode.json"))]
    found = [read_json(path) for path in paths]
    return [report for report in found if not report["rehearsal"]]


def section(reports: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Paragraphs of Markdown."""
    if not reports:
        yield NOTHING
    for report in reports:
        if any("contenders" in case for case in report["cases"]):
            yield from _decoding(report)
            continue
        yield f"## {report['hardware']['gpu']}"
        yield ABOUT
        yield _table(("", ""), _facts(report))
        goals = [text for case in report["cases"] for text in misses(case)]
        yield "### Goals missed on this GPU\n\n" + ("\n".join(f"- {text}" for text in goals) or "None.")
        rows = [row for case in report["cases"] for row in _rows(case)]
        yield "### Kernels on this GPU"
        yield _table(("case", "", "time", "GB/s", "of copy", "ours is", "goal", "kernels", "host"), rows)
        checks = report["checks"]
        passed = sum("relative_error" in check for check in checks)
        yield f"{passed} of {len(checks)} small cases of odd sizes, in fp32, fp16 and bf16, passed their check."
        bad = [record for record in [*report["cases"], *checks] if "failed" in record or "skipped" in record]
        if bad:
            lines = [f"- `{record['name']}`: {failure(record)}" for record in bad]
            yield "### Not measured on this GPU\n\n" + "\n".join(lines)


def _decoding(report: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {report['hardware']['gpu']}: decoding"
    yield _table(("", ""), _facts(report))
    for case in report["cases"]:
        if "contenders" not in case:
            yield f"`{case['name']}`: {failure(case)}"
            continue
        rows = [
            (name, "", entry["absent"], "")
            if "absent" in entry
            else (name, "", f"{entry['ms_a_token']:.3f} ms", f"{entry['tokens_per_s']:.0f}")
            for name, entry in case["contenders"].items()
        ]
        yield f"`{case['name']}`, {case['rows']} row{'s' if case['rows'] > 1 else ''}:"
        yield _table(("", "", "a token", "tokens/s"), rows)
        lines = []
        for found in case["comparisons"]:
            goal = ""
            if "goal" in found:
                met = "met" if found["times_faster"] >= found["goal"] else "**missed**"
                goal = f", goal {found['goal']:.2f}x: {met}"
            lines.append(f"- {found['contender']}: {found['times_faster']:.2f}x {found['baseline']}{goal}")
        yield "\n".join(lines)


def _facts(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    hardware, ceilings = report["hardware"], report["ceilings"]
    yield "GPU", f"{hardware['gpu']}, {hardware['multiprocessors']} multiprocessors, sm_{_arch(hardware)}"
    yield "memory, L2", f"{hardware['memory_bytes'] / 2**30:.0f} GiB, {hardware['l2_bytes'] / 2**20:.0f} MiB"
    yield "driver, CUDA", f"{hardware['driver']}, {hardware['cuda']}"
    yield "versions", ", ".join(f"{name} {value}" for name, value in report["versions"].items())
    yield "measured", f"{report['date']}, commit {report['commit'][:12]}, {report['minutes']:.1f} minutes"
    yield "copy bandwidth", f"{ceilings['copy_gb_s']:.0f} GB/s, read and written"
    yield "matrix product", f"{ceilings['matrix_tflop_s']:.0f} TFLOP/s in bf16"
    yield "a graph's node", f"{ceilings['graph_node_us']:.2f} us"


def _arch(hardware: Mapping[str, Any]) -> str:
    return str(hardware["compute_capability"]).replace(".", "")


def _rows(case: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    if "ours" not in case:
        return
    kernels = "" if case["kernels_a_call"] is None else str(case["kernels_a_call"])
    yield (f"`{case['name']}`", "**ours**", *_cells(case["ours"]), "", "", kernels, f"{case['host_us_a_call']:.1f} us")
    for name, entry in case["baselines"].items():
        if "absent" in entry:
            yield ("", name, "absent", "", "", "", "", "", "")
            continue
        ratio = entry["times_faster"]
        faster = f"{ratio['median']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        goal = ""
        if "goal" in entry:
            goal = f"{entry['goal']:.2f}x " + ("met" if ratio["median"] >= entry["goal"] else "**missed**")
        yield ("", name + (" (eager)" if entry.get("eager") else ""), *_cells(entry), faster, goal, "", "")


def _cells(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    return (
        f"{entry['microseconds']['median']:.2f} us",
        f"{entry['gb_s']:.0f}",
        f"{100 * entry['share_of_copy_bandwidth']:.0f} %",
    )


def _table(head: Sequence[str], rows: Iterator[tuple[str, ...]] | Sequence[tuple[str, ...]]) -> str:
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
