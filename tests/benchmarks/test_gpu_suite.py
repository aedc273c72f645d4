"""The GPU suite without a GPU: rehearsed in the interpreter, and its CUDA half against a stand-in for torch.cuda."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("personafast._triton", reason="needs an installed personafast")

from benchmarks import gpu_suite
from benchmarks.case import Absent, Contender
from benchmarks.check import CheckFailed
from benchmarks.gpu import cases as registry
from benchmarks.gpu import device as devices
from benchmarks.gpu.case import GpuCase
from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.measure import checked, measure
from benchmarks.gpu.table import misses, table


def suite(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_suite", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        timeout=300,
    )


def doubled(name="double", run=None, **changes):
    """A case without a kernel: y = 2 x."""
    settings = {
        "name": name,
        "operator": "inject_",
        "shape": {"T": 4},
        "make": lambda draw: SimpleNamespace(x=draw.normal(4, 8)),
        "plain": lambda inputs: 2 * inputs.x,
        "ours": Contender("ours", run or (lambda inputs: inputs.x + inputs.x), lambda inputs: 128),
        "baselines": (Contender("twice", lambda inputs: 2 * inputs.x, lambda inputs: 128, goal=1e-9),),
    }
    return GpuCase(**{**settings, **changes})


def options(tmp_path, **changes):
    values = {"rehearse": True, "out": tmp_path, "only": None, "minutes": 1.0, "seed": 3, "resume": False}
    values |= {"part": "kernels", "checks_only": False}
    return SimpleNamespace(**{**values, **changes})


def written(tmp_path):
    (path,) = tmp_path.glob("*/gpu.json")
    return json.loads(path.read_text())


@pytest.fixture
def rehearsal():
    # The suite runs the operators on Triton by name, which no case of these tests does.
    return devices.Rehearsal()


@pytest.fixture(autouse=True)
def _no_operators(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def test_a_rehearsal_runs_every_line_and_says_that_it_is_one(tmp_path):
    done = suite("--rehearse", "--only", "inject_", "--out", tmp_path, "--json", "--seed", 5)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report == written(tmp_path)
    assert report["rehearsal"] is True and report["seed"] == 5
    case = next(case for case in report["cases"] if case["operator"] == "inject_")
    assert case["ours"]["microseconds"]["median"] > 0 and case["ours"]["relative_error"] < 1e-3
    assert set(report["ceilings"]) == {"copy_gb_s", "matrix_tflop_s", "graph_node_us"}


def test_without_a_gpu_it_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = suite()
    assert done.returncode == 2 and "--rehearse" in done.stdout


def test_a_case_that_fails_is_reported_and_the_others_go_on(tmp_path, monkeypatch):
    def broken(inputs):
        raise RuntimeError("Triton Error [CUDA]: out\nof memory")

    chosen = (doubled("first", broken), doubled("second"))
    monkeypatch.setattr(registry, "cases", lambda tiny: chosen)
    report = gpu_suite.run(options(tmp_path), [])
    first, second = report["cases"]
    assert first["failed"] == "RuntimeError: Triton Error [CUDA]: out of memory"
    assert "ours" in second and report == written(tmp_path)
    assert [check["dtype"] for check in report["checks"]] == ["float32", "float32"]
    assert "failed" in report["checks"][0] and report["checks"][1]["relative_error"] == 0.0
    lines = list(table(report))
    assert any(line.startswith("first: FAILED: RuntimeError") for line in lines)
    assert "1 of 2 small cases in other dtypes passed" in lines and "2 failed:" in lines


def test_a_wrong_result_gets_no_figure(rehearsal):
    wrong = doubled(run=lambda inputs: inputs.x * 2.01)
    with pytest.raises(CheckFailed, match="double: ours: error"):
        measure(wrong, rehearsal, 0, 0.0, 1.0)


def test_a_result_that_is_not_written_everywhere_is_seen(rehearsal):
    def partly(inputs):
        result = torch.empty_like(inputs.x)
        result[:-1] = 2 * inputs.x[:-1]
        return result

    with pytest.raises(CheckFailed, match="NaN or infinity"):
        checked(doubled(run=partly), rehearsal, 0)


def test_a_result_that_changes_from_call_to_call_is_a_race(rehearsal):
    calls = []

    def racing(inputs):
        calls.append(1)
        result = 2 * inputs.x.float()
        result[0, 0] += 1e-7 * len(calls) * result[0, 0].abs()
        return result

    with pytest.raises(CheckFailed, match="two calls on the same inputs differ in"):
        checked(doubled(run=racing), rehearsal, 0)


def test_every_check_has_inputs_of_its_own(rehearsal):
    seen = []
    checked(doubled(run=lambda inputs: seen.append(float(inputs.x[0, 0])) or 2 * inputs.x), rehearsal, 7)
    assert len(set(seen)) == 2


def test_a_baseline_that_is_missing_or_broken_is_absent_with_its_reason(rehearsal):
    def missing(inputs):
        raise Absent("liger-kernel is not installed")

    def traffic(inputs):
        return 1

    baselines = (
        Contender("missing", lambda inputs: 0, traffic, prepare=missing),
        Contender("broken", lambda inputs: 1 / 0, traffic),
        Contender("yardstick", lambda inputs: inputs.x, traffic, same=False, goal=3.0),
    )
    record = measure(doubled(baselines=baselines), rehearsal, 0, 0.0, 1.0)
    assert record["baselines"]["missing"] == {"absent": "liger-kernel is not installed"}
    assert record["baselines"]["broken"] == {"absent": "failed: ZeroDivisionError: division by zero"}
    assert record["baselines"]["yardstick"]["goal"] == 3.0


def test_resuming_keeps_what_is_there_and_refuses_another_commit(tmp_path, monkeypatch):
    called = []
    chosen = tuple(
        doubled(name, lambda inputs, name=name: called.append(name) or 2 * inputs.x) for name in ("first", "second")
    )
    monkeypatch.setattr(registry, "cases", lambda tiny: chosen[:1])
    gpu_suite.run(options(tmp_path), [])
    called.clear()
    monkeypatch.setattr(registry, "cases", lambda tiny: chosen)
    report = gpu_suite.run(options(tmp_path, resume=True), [])
    assert set(called) == {"second"} and [case["name"] for case in report["cases"]] == ["first", "second"]
    monkeypatch.setattr("benchmarks.machine.commit", lambda: "another")
    with pytest.raises(SystemExit, match="another commit"):
        gpu_suite.run(options(tmp_path, resume=True), [])


def test_cases_beyond_the_minutes_are_skipped_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "cases", lambda tiny: (doubled(),))
    report = gpu_suite.run(options(tmp_path, minutes=0.0), [])
    assert report["cases"][0]["skipped"] == "no time was left of 0 minutes"


def test_a_lost_device_costs_one_case(tmp_path, monkeypatch):
    restarts = []

    def execv(program, arguments):
        restarts.append(arguments)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    monkeypatch.setattr(registry, "cases", lambda tiny: (doubled("lost", lambda inputs: 1 / 0),))
    monkeypatch.setattr(devices.Rehearsal, "lost", lambda self: True)
    with pytest.raises(SystemExit):
        gpu_suite.run(options(tmp_path), ["--resume", "--rehearse"])
    assert restarts == [[sys.executable, "-m", "benchmarks.gpu_suite", "--resume", "--rehearse"]]
    assert written(tmp_path)["cases"][0]["failed"].startswith("ZeroDivisionError")


def test_a_hanging_kernel_costs_one_case(tmp_path, monkeypatch):
    restarts = []
    monkeypatch.setattr(gpu_suite, "HANG_SECONDS", 0.05)
    monkeypatch.setattr(os, "execv", lambda program, arguments: restarts.append(arguments))
    monkeypatch.setattr(gpu_suite, "_jobs", lambda *_: [({"name": "hanging"}, lambda _: time.sleep(0.2) or {})])
    gpu_suite.run(options(tmp_path), [])
    assert len(restarts) == 1
    assert written(tmp_path)["cases"][0]["failed"] == "no answer within 0.05 s"


def test_goals_that_are_missed_are_listed():
    case = {
        "name": "c",
        "kernels_a_call": 3,
        "kernels_goal": 2,
        "copy_share_goal": 0.85,
        "ours": {"share_of_copy_bandwidth": 0.8},
        "baselines": {"b": {"goal": 2.0, "times_faster": {"median": 1.5}}, "a": {"absent": "why"}},
    }
    assert list(misses(case)) == [
        "c: 80 % of copy bandwidth, goal 85 %",
        "c: 3 kernels a call, goal 2",
        "c: 1.500x of b, goal 2.000x",
    ]
    reached = {**case, "kernels_a_call": None, "ours": {"share_of_copy_bandwidth": 0.85}, "baselines": {}}
    assert list(misses(reached)) == []


class Clock:
    """Seconds that have passed on the stand-in for a GPU."""

    now = 0.0


class Graph:
    """Replays what was run while it was captured, at 1 us a call."""

    capturing = None

    def __init__(self):
        self.calls = 0

    def replay(self):
        assert Graph.capturing is None
        Clock.now += 1e-6 * self.calls


class Capture:
    def __init__(self, graph):
        self.graph = graph

    def __enter__(self):
        Graph.capturing = self.graph

    def __exit__(self, kind, error, trace):
        Graph.capturing = None


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.time = Clock.now

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


class Stream:
    def wait_stream(self, other):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def cuda(monkeypatch):
    """A device whose calls take 1 us in a graph and 10 us outside."""
    stand_in = {
        "Stream": Stream,
        "stream": lambda stream: stream,
        "current_stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": Capture,
        "synchronize": lambda: None,
        "mem_get_info": lambda: (1 << 30, 2 << 30),
        "memory_reserved": lambda: 0,
        "memory_allocated": lambda: 0,
        "get_device_properties": lambda index: SimpleNamespace(
            name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=1 << 37, L2_cache_size=1 << 12
        ),
    }
    for name, value in stand_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(devices.Cuda, "name", "cpu")
    monkeypatch.setattr(devices.Cuda, "dtype", torch.float32)
    monkeypatch.setattr(devices.Cuda, "kernels", lambda self, call: 1)
    return devices.Cuda()


def timed(run):
    def call(inputs):
        if Graph.capturing is None:
            Clock.now += 1e-5
        else:
            Graph.capturing.calls += 1
        return run(inputs)

    return call


def test_calls_are_captured_over_all_buffers_and_timed_by_events(cuda):
    case = doubled(
        run=timed(lambda inputs: 2 * inputs.x), make=lambda draw: SimpleNamespace(x=draw.normal(16, 16)), baselines=()
    )
    record = measure(case, cuda, 0, 0.0, 100.0)
    assert record["ours"]["microseconds"]["median"] == pytest.approx(1.0)
    # Four times the cache of 4 KiB, in buffers of 1 KiB.
    assert record["buffers"] == {"count": 16, "bytes": 1 << 14}
    assert record["ours"]["gb_s"] == pytest.approx(0.128) and record["kernels_a_call"] == 1


def test_what_cannot_be_captured_is_timed_eagerly_and_marked(cuda):
    def waits(inputs):
        if Graph.capturing is not None:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCompile with ...")
        return 2 * inputs.x

    record = measure(doubled(run=timed(waits), baselines=()), cuda, 0, 0.0, 100.0)
    assert record["ours"]["eager"] is True
    assert record["ours"]["microseconds"]["median"] == pytest.approx(10.0)


def test_facts_and_ceilings_of_a_gpu(cuda, monkeypatch):
    facts = cuda.facts()
    assert facts["compute_capability"] == "9.0" and facts["l2_bytes"] == 1 << 12
    assert devices.folder_name(facts) == "nvidia-h200"
    monkeypatch.setattr("benchmarks.gpu.ceilings.MATRIX", 32)
    monkeypatch.setattr("benchmarks.gpu.ceilings.COPY_BYTES", 1 << 12)
    monkeypatch.setattr(devices.Cuda, "sample", lambda self, run, buffers: lambda: 1e-6)
    assert ceilings(cuda) == {"copy_gb_s": 8.192, "matrix_tflop_s": 0.06554, "graph_node_us": 1.0}


def test_a_scene_is_decoded_and_compared(rehearsal, monkeypatch):
    from benchmarks.gpu import decoding

    monkeypatch.setattr(decoding, "TOKENS", 6)
    scene = next(scene for scene in decoding.SCENES if scene.name == "direct-8b-lora4")
    record = decoding.run(scene, rehearsal)
    assert all(entry["tokens_per_s"] > 0 for entry in record["contenders"].values())
    (found,) = record["comparisons"]
    assert found["goal"] == 0.85 and found["times_faster"] > 0
    report = {"name": scene.name, **record, "comparisons": [{**found, "times_faster": 0.5}]}
    assert list(misses(report)) == [
        "direct-8b-lora4: direct, 4 LoRA policies 0.500x of captured, reference alone, goal 0.850x"
    ]


def test_replays_are_compared_with_calls(rehearsal):
    from benchmarks.gpu import decoding

    assert decoding.same_texts(rehearsal)["samplers"] == ["direct", "verify", "block"]


def test_seconds_a_token_are_those_between_the_first_few_and_the_last(monkeypatch):
    from benchmarks.gpu import decoding

    clock = iter(range(100))
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: float(next(clock)))
    stamps = decoding.Stamps(2)
    stamps.put(torch.zeros(2, 7))
    for _ in range(10):
        stamps.put(torch.zeros(2))
    assert stamps.seconds() == 1.0


def test_the_sanitizer_runs_the_small_cases_and_its_summaries_are_read():
    from benchmarks.gpu import sanitize

    words = sanitize.command("compute-sanitizer", "racecheck", Path("out"), "inject_")
    assert words[:3] == ["compute-sanitizer", "--tool", "racecheck"]
    assert "--checks-only" in words and words[-2:] == ["--only", "inject_"]
    assert sanitize.errors("========= ERROR SUMMARY: 3 errors") == 3
    assert sanitize.errors("========= RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)") == 2
    assert sanitize.errors("========= ERROR SUMMARY: 0 errors") == 0
