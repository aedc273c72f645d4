"""Write the figures of `personafast demo --json` into a page: `python -m personafast.evaluate.readme_table FILE`.

The page holds a line `<!-- demo:begin -->` and a line `<!-- demo:end -->`; what stands between them is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from personafast._io import read_json, write_text
from personafast.errors import FormatError, PersonafastError

BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"


def markdown_table(result: Mapping[str, Any]) -> str:
    """The table of `personafast demo` as Markdown, with the sentence that names its settings."""
    chosen, settings = result["chosen"], result["settings"]
    head = ["method", "how", *chosen, f"all {len(chosen)} [95 %]", "grammar", "tokens/s", "forwards a token"]
    rows = [head, ["---", "---", *["---:"] * (len(head) - 2)]]
    for method in result["methods"]:
        joint = {key: f"{100 * value:.0f}" for key, value in method["joint"].items()}
        rows.append(
            [
                f"**{method['name']}**" if method["name"] == "direct" else method["name"],
                settings["how"][method["name"]],
                *(f"{100 * method['traits'][name]['rate']:.0f} %" for name in chosen),
                f"{joint['rate']} % [{joint['low']}, {joint['high']}]",
                f"{100 * method['grammar']:.1f} %",
                f"{method['tokens_per_s']:,.0f}",
                f"{method['forwards_per_token']:.2f}",
            ]
        )
    difference = {key: f"{100 * value:+.0f}" for key, value in settings["direct_minus_merge"].items()}
    sentence = (
        f"Share of {settings['replies']} replies a method that show each trait, and all at once; temperature "
        f"{settings['temperature']:g}, min-p {settings['min_p']:g}, alpha {settings['alpha']:g}. Direct minus merge: "
        f"{difference['rate']} points (95 % interval {difference['low']} to {difference['high']})."
    )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n\n" + sentence


def fill(page: Path, figures: Path) -> None:
    """Replace what stands between the marks of `page` by the table of `figures`, atomically."""
    result = read_json(figures)
    try:
        table = markdown_table(result)
    except (KeyError, TypeError):
        raise FormatError(f"{figures}: not the output of `personafast demo --json`; make it anew") from None
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise FormatError(f"{page}: lacks the lines {BEGIN} and {END}; put them where the table belongs")
    write_text(page, f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")


def main(arguments: Sequence[str]) -> int:
    """Fill the page; 0 when done, 2 on an error that the caller can mend."""
    try:
        if not 1 <= len(arguments) <= 2:
            raise PersonafastError("usage: python -m personafast.evaluate.readme_table FILE [PAGE]")
        fill(Path(arguments[1] if len(arguments) > 1 else "README.md"), Path(arguments[0]))
    except (PersonafastError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
