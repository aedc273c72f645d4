"""The table of Triton kernels in docs/kernels.md, compiled anew: `python -m benchmarks.gpu.kernel_table`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import triton

from benchmarks.gpu.case import Specimen
from benchmarks.gpu.cases import SPECIMENS
from benchmarks.gpu.offline import Launch, launches
from personafast._io import write_text

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
BEGIN, END = "<!-- triton:begin -->", "<!-- triton:end -->"
CAPABILITIES = (80, 90, 100)
HEAD = ("call", "kernel", "programs", "threads", "registers", "shared KiB", "MB moved, at least")


def rows(specimen: Specimen) -> Iterator[tuple[str, ...]]:
    """A line for every launch of a call; registers and shared memory on each of `CAPABILITIES`."""
    made = [launches(specimen.call, capability) for capability in CAPABILITIES]
    for place, launch in enumerate(made[1]):
        same = [others[place] for others in made]
        first = place == 0
        yield (
            f"`{specimen.operator}` {specimen.name}" if first else "",
            f"`{launch.kernel}`",
            " x ".join(str(size) for size in launch.grid if size > 1) or "1",
            _each(same, "threads", 1),
            _each(same, "registers", 1),
            _each(same, "shared", 1024),
            f"{specimen.traffic / 1e6:.3g}" if first else "",
        )


def _each(same: Sequence[Launch], what: str, unit: int) -> str:
    """One value where all GPUs have the same, else one for each."""
    values = [f"{getattr(launch, what) / unit:.3g}" for launch in same]
    return values[0] if len(set(values)) == 1 else " / ".join(values)


def table(specimens: Sequence[Specimen]) -> str:
    about = (
        f"Compiled by Triton {triton.__version__} for sm_80 / sm_90 / sm_100, one figure where they agree; "
        "programs are those on sm_90. No kernel spills registers. The bytes are those that a call cannot avoid to "
        "move. `python -m benchmarks.gpu.kernel_table`."
    )
    lines = [HEAD, ("---", "---", "---:", "---:", "---:", "---:", "---:")]
    lines += [row for specimen in specimens if specimen.listed for row in rows(specimen)]
    return about + "\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    before, rest = PAGE.read_text().split(BEGIN)
    _, after = rest.split(END)
    write_text(PAGE, f"{before}{BEGIN}\n\n{table(SPECIMENS)}\n\n{END}{after}")
    print(f"written: {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
