import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    command = [sys.executable, "-m", "pytest", "benchmarks", "-p", "no:cacheprovider", *arguments]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    return subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True, check=False)


def test_one_case_from_the_command_line(tmp_path):
    report = tmp_path / "pytest-benchmark.json"
    options = ["--bench-seconds", "0.02", "--bench-results", str(tmp_path), f"--benchmark-json={report}"]
    done = run("-k", "philox and rows8", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "philox.uniform-rows8-numbers1 (" in done.stdout
    (path,) = tmp_path.glob("*/ops.json")
    (case,) = json.loads(path.read_text())["cases"]
    # pytest-benchmark's own statistics are of the samples that were taken in turns.
    replayed = {
        entry["param"].removeprefix(f"{case['name']}-"): entry for entry in json.loads(report.read_text())["benchmarks"]
    }
    assert set(replayed) == {"ours", *case["baselines"]}
    for name, entry in replayed.items():
        figures = case["ours"] if name == "ours" else case["baselines"][name]
        assert entry["group"] == case["name"] and entry["stats"]["rounds"] == case["rounds"]
        assert 1e6 * entry["stats"]["median"] == pytest.approx(figures["microseconds"]["median"], rel=1e-2)
        assert entry["extra_info"] == figures
