import json

import pytest

from benchmarks import report
from benchmarks.figure import bars, draw
from benchmarks.gpu import page as gpu_page
from benchmarks.report import PAGE, RESULTS, load, page

SPREAD = {"median": 2.0, "low": 1.5, "high": 2.5}


def entry(**extra):
    figures = {"microseconds": {"median": 1500.0, "low": 1.0, "high": 2.0}, "bytes": 10, "gb_s": 20.5}
    return {**figures, "share_of_read_bandwidth": {"median": 0.875, "low": 0.5, "high": 1.0}, **extra}


def machine():
    head = {
        "hardware": {
            "cpu": "Some CPU",
            "cpu_family_model_stepping": ["1", "2", "3"],
            "cores": 2,
            "threads": 2,
            "last_level_cache_bytes": 32 << 20,
            "memory_bytes": 8 << 30,
            "torch_cpu_capability": "AVX512",
            "kernels": {"isa": "avx512", "compiler": "GNU 12"},
        },
        "versions": {"torch": "2"},
        "read_method": "sum",
    }
    common = {"date": "2026-01-02", "commit": "f" * 40, "rounds": 9, "read_bandwidth_gb_s": {"median": 45.0}}
    ops = [
        {
            **common,
            "name": "masked_linear-8",
            "operator": "masked_linear",
            "backend": "cpu",
            "ours": entry(relative_error=0.0017, resident_bytes=3 << 20),
            "baselines": {
                "copies": entry(times_faster=SPREAD, goal=6.0, memory_goal=0.19, share_of_its_memory=0.1875),
                "dense": entry(times_faster={**SPREAD, "median": 0.8}, goal=0.625),
                "torchao": {"absent": "not installed"},
            },
        },
        {"name": "sparse_linear-1", "skipped": "no sparse_linear yet"},
    ]
    decode = [
        {
            **common,
            "name": "decode-x",
            "model": {
                "parameters": 5 * 10**8,
                "dtype": "bfloat16",
                "num_hidden_layers": 2,
                "hidden_size": 8,
                "vocab_size": 99,
            },
            "rows": 1,
            "tokens": 16,
            "baseline": "stock",
            "contenders": {
                "stock": entry(tokens_per_s=20.0),
                "ours": entry(tokens_per_s=40.0, times_faster=SPREAD, goal=1.6),
            },
        }
    ]
    return {"name": "here", "ops": {**head, "cases": ops}, "decode": {**head, "cases": decode}}


def test_the_committed_page_is_what_the_committed_results_say():
    cache = json.loads((RESULTS / "cache.json").read_text())
    assert PAGE.read_text(encoding="utf-8") == page(load(RESULTS), gpu_page.load(RESULTS), cache)


def test_every_measured_machine_has_its_figure():
    for found in load(RESULTS):
        assert PAGE.with_name(f"performance-{found['name']}.png").exists()


def test_goals_are_met_or_missed_by_the_median():
    text = page([machine()])
    assert "| `masked_linear-8` | copies | 6.00x faster | 2.00x faster | **missed** |" in text
    assert "| `masked_linear-8` | copies | 0.19 of its memory | 0.1875 | met |" in text
    assert "| `masked_linear-8` | dense | 1.60x slower | 1.25x slower | met |" in text
    assert "| `decode-x`: ours | stock | 1.60x faster | 2.00x faster | met |" in text


def test_figures_stand_beside_their_spread_and_what_is_missing_is_named():
    text = page([machine()])
    assert "| `masked_linear-8` | **ours** (cpu) | 1.50 ms | 20.5 | 88 % |  | 0.002 | 3.0 MiB |  |" in text
    assert "|  | copies | 1.50 ms | 20.5 | 88 % | 2.00x [1.50, 2.50] |" in text
    assert "- `sparse_linear-1`: no sparse_linear yet" in text
    assert "- torchao: not installed (`masked_linear-8`)" in text
    assert "No GPU figure has been measured" in text and "(performance-here.png)" in text
    assert "45 to 45 GB/s" in text and "f" * 12 in text and "f" * 13 not in text


def test_without_results_the_page_says_so():
    assert "Nothing has been measured yet.\n\n## GPUs\n\nNo GPU figure has been measured" in page([])


def test_bars_compare_with_the_first_baseline():
    assert bars(machine()) == [("decode-x: ours", 2.0, 87.5, 87.5), ("masked_linear-8", 2.0, 87.5, 87.5)]


def test_the_command_writes_page_and_figure(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    home = tmp_path / "results" / "here"
    home.mkdir(parents=True)
    found = machine()
    for suite in ("ops", "decode"):
        (home / f"{suite}.json").write_text(json.dumps(found[suite]))
    (tmp_path / "results" / "demo.json").write_text("{}")
    target = tmp_path / "docs" / "performance.md"
    target.parent.mkdir()
    assert report.main(["--results", str(tmp_path / "results"), "--page", str(target)]) == 0
    assert target.read_text() == page([found])
    figure = target.with_name("performance-here.png")
    assert figure.read_bytes().startswith(b"\x89PNG")
    draw(found, figure)
    assert str(target) in capsys.readouterr().out


def test_weight_reads_stand_beside_what_was_expected(tmp_path):
    def record(kind, alpha, reads, goal=None, expected=None):
        figures = {"tokens_per_round": 6.5, "joint": {"rate": 0.9}, "grammar": 0.97}
        return {
            "method": "block",
            "policies": kind,
            "alpha": alpha,
            "reads_per_token": reads,
            "expected": expected,
            "goal": goal,
            **figures,
        }

    records = [
        record("separate", 0.25, 1.5, expected=2.0),
        record("separate", 1.0, 1.9, goal=1.8),
        record("lora", 0.25, 1.1),
        record("lora", 1.0, 1.2),
    ]
    settings = {"replies": 3, "traits": ["a", "b", "c", "d"], "chunk": 8, "min_p": 0.05}
    source, target = tmp_path / "reads.json", tmp_path / "density.md"
    source.write_text(json.dumps({"settings": settings, "records": records}))
    target.write_text("before\n<!-- reads:begin -->\nold\n<!-- reads:end -->\nafter\n")
    for _ in range(2):
        report.write_reads(source, target)
    text = target.read_text()
    row = next(line for line in text.splitlines() if line.startswith("| block"))
    assert row == "| block | 1.50 (2) | 1.90, goal 1.8 **missed** | 1.10 | 1.20 | 6.50 | 90 % | 97 % |"
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text


def gpu():
    times = {"microseconds": {"median": 2.5, "low": 2.4, "high": 2.6}, "gb_s": 3000.0, "share_of_copy_bandwidth": 0.7}
    return {
        "rehearsal": False,
        "date": "2026-11-20",
        "commit": "f" * 40,
        "minutes": 7.0,
        "hardware": {
            "gpu": "NVIDIA X",
            "compute_capability": "9.0",
            "multiprocessors": 132,
            "memory_bytes": 80 << 30,
            "l2_bytes": 50 << 20,
            "driver": "580",
            "cuda": "13.0",
        },
        "versions": {"triton": "3.6.0"},
        "ceilings": {"copy_gb_s": 4300.0, "matrix_tflop_s": 780.0, "graph_node_us": 1.25},
        "cases": [
            {
                "name": "inject_-1",
                "backend": "triton",
                "kernels_a_call": 1,
                "host_us_a_call": 12.3,
                "copy_share_goal": 0.85,
                "ours": times,
                "baselines": {
                    "torch": {**times, "times_faster": {"median": 3.0, "low": 2.9, "high": 3.1}, "goal": 2.0},
                    "Liger": {"absent": "not installed"},
                },
            },
            {"name": "steer_-1", "failed": "KernelError: illegal address"},
        ],
        "checks": [
            {"name": "inject_-5", "dtype": "float32", "relative_error": 1e-8},
            {"name": "inject_-5", "dtype": "float16", "failed": "CheckFailed: NaN"},
        ],
    }


def test_gpus_have_their_own_section_with_what_was_missed():
    text = page([], [gpu()])
    assert "No GPU figure" not in text
    assert "## NVIDIA X" in text and "sm_90" in text and "4300 GB/s" in text
    assert "- inject_-1: 70 % of copy bandwidth, goal 85 %" in text
    assert "| `inject_-1` | **ours** (triton) | 2.50 us | 3000 | 70 % |  |  | 1 | 12.3 us |" in text
    assert "|  | torch | 2.50 us | 3000 | 70 % | 3.00x [2.90, 3.10] | 2.00x met |  |  |" in text
    assert "|  | Liger | absent |" in text
    assert "- `steer_-1`: FAILED: KernelError: illegal address" in text
    assert "1 of 2 small cases" in text and "- `inject_-5`: FAILED: CheckFailed: NaN (float16)" in text


def test_a_rehearsal_is_no_result(tmp_path):
    for name, rehearsal in (("none", True), ("nvidia-x", False)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "gpu.json").write_text(json.dumps({**gpu(), "rehearsal": rehearsal}))
    (found,) = gpu_page.load(tmp_path)
    assert found["hardware"]["gpu"] == "NVIDIA X" and not found["rehearsal"]


def test_decoding_on_a_gpu_has_a_section_of_its_own():
    report = {
        **gpu(),
        "cases": [
            {
                "name": "decode-8b",
                "rows": 1,
                "contenders": {
                    "captured": {"ms_a_token": 4.25, "tokens_per_s": 235.3},
                    "compiled": {"absent": "RuntimeError: no"},
                },
                "comparisons": [{"contender": "captured", "baseline": "eager", "times_faster": 2.5, "goal": 2.0}],
            },
            {"name": "steered", "failed": "KernelError: no"},
        ],
    }
    text = page([], [report])
    assert "## NVIDIA X: decoding" in text and "| captured |  | 4.250 ms | 235 |" in text
    assert "| compiled |  | RuntimeError: no |  |" in text
    assert "- captured: 2.50x eager, goal 2.00x: met" in text and "`steered`: FAILED: KernelError: no" in text


def test_a_cache_that_is_too_slow_is_marked():
    def record(slower):
        ratio = {"median": slower, "low": slower - 0.01, "high": slower + 0.01}
        return {
            "rows": 1,
            "length": 64,
            "dynamic": {"ms": {"median": 20.0}},
            "fixed": {"times_slower": {**ratio, "median": 1.0}},
            "fixed, ragged rows": {"times_slower": ratio},
        }

    results = {"model": "x", "hardware": {"cpu": "c", "threads": 2}, "date": "d", "goal": 1.05}
    text = page([], cache={**results, "records": [record(1.049), record(1.06)]})
    assert "| 1 x 64 | 20.00 ms | 1.000x [1.039, 1.059] | 1.049x [1.039, 1.059] | met |" in text
    assert "| 1.060x [1.050, 1.070] | **missed** |" in text
