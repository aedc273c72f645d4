"""The small cases under NVIDIA's compute-sanitizer: wrong addresses, and races in shared memory."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TOOLS = ("memcheck", "racecheck")
# The sanitizer makes kernels tens of times slower.
MINUTES = 60


def sanitize(options: argparse.Namespace) -> int:
    """Run the suite's checks under each tool; 0 if none finds anything, 2 if there is no compute-sanitizer."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        print("compute-sanitizer is not on the path: it comes with the CUDA toolkit")
        return 2
    found = {}
    for tool in TOOLS:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(command(program, tool, Path(folder), options.only), capture_output=True, text=True)
        found[tool] = {"errors": errors(done.stdout + done.stderr), "exit": done.returncode}
        if found[tool]["errors"] or done.returncode:
            print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
    print(json.dumps(found, indent=2))
    return 1 if any(part["errors"] or part["exit"] for part in found.values()) else 0


def command(program: str, tool: str, out: Path, only: str | None) -> list[str]:
    """The command line of one tool over the small cases."""
    suite = [
        sys.executable,
        "-m",
        "benchmarks.gpu_suite",
        "--checks-only",
        "--minutes",
        str(MINUTES),
        "--out",
        str(out),
    ]
    return [
        program,
        "--tool",
        tool,
        "--target-processes",
        "all",
        # Errors end the run with a code of their own; the suite's is 1.
        "--error-exitcode",
        "9",
        *suite,
        "--out",
        str(out),
        *(["--only", only] if only else []),
    ]


def errors(output: str) -> int:
    """How many errors or hazards a tool's summary counts."""
    counts = re.findall(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)", output)
    return sum(int(one or other) for one, other in counts)
