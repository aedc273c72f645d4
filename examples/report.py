"""Write the experiments' results into a page: `python examples/report.py [RESULTS] [PAGE]`.

RESULTS holds NAME.json of each experiment; PAGE has a line `<!-- NAME:begin -->` and a line `<!-- NAME:end -->` for
each, and what stands between is replaced. Plots go beside the page.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import _common as c
import chunk_size
import masks
import power
import reference_swap
import steering
import tone

from personafast import PersonafastError
from personafast._io import read_json, write_text
from personafast.errors import FormatError

EXPERIMENTS = {
    "tone": tone,
    "chunk_size": chunk_size,
    "reference_swap": reference_swap,
    "steering": steering,
    "masks": masks,
    "power": power,
}
ROOT = Path(__file__).resolve().parents[1]


def plot_of(page: Path, name: str) -> Path:
    """Where the plot of an experiment stands."""
    return page.parent / f"{page.stem}-{name.replace('_', '-')}.png"


def fill(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks of `name`, atomically.

    Raises:
        FormatError: the page lacks the marks.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise FormatError(f"{page}: lacks the lines {begin} and {end}; put them where the table belongs")
    write_text(page, f"{before}{begin}\n\n{text}\n\n{end}{after}")


def main(argv: Sequence[str] | None = None) -> None:
    """Fill the page and draw the plots."""
    given = [Path(each) for each in (sys.argv[1:] if argv is None else argv)]
    if len(given) > 2:
        raise PersonafastError("usage: python examples/report.py [RESULTS] [PAGE]")
    defaults = [ROOT / "benchmarks" / "results" / "examples", ROOT / "docs" / "examples.md"]
    results, page = [*given, *defaults[len(given) :]]
    for name, experiment in EXPERIMENTS.items():
        source = results / f"{name}.json"
        result = read_json(source)
        try:
            report = experiment.report(result)
            fill(page, name, c.markdown(result, report))
        except (KeyError, TypeError):
            raise FormatError(f"{source}: not what {name}.py --json writes; make it anew") from None
        c.draw(report, plot_of(page, name))


if __name__ == "__main__":
    sys.exit(c.run(main))
