"""Check and time every GPU kernel on this machine's GPU, in one command: `python -m benchmarks.gpu_suite`.

Each kernel is checked first, on fresh random inputs and poisoned memory, against float64; only then it is timed, by
CUDA events over replays of a graph, with buffers that rotate through more than the cache, beside named baselines. One
JSON file holds everything. It is written after each case, and a kernel that takes the device down with it, or never
returns, costs its own case only: a new process goes on with the next.

`--part decode` decodes whole models with captured passes beside transformers' own ways, after checking that replays
write what calls write; `--part sanitize` runs the small cases under compute-sanitizer. Each has a file of its own.

Without a GPU, `--rehearse` runs all of this in Triton's interpreter, with small inputs and meaningless times.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MINUTES = 9.5
SECONDS_A_CONTENDER = 2.0
# A case that has not ended by then never will; a whole model is compiled by torch for minutes.
HANG_SECONDS = 120.0
HANG_SECONDS_OF_MODELS = 500.0
PARTS = ("kernels", "decode", "sanitize")
FILES = {"kernels": "gpu.json", "decode": "gpu-decode.json"}


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.rehearse:
        # Triton reads it when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from benchmarks.gpu.table import table

    if not options.rehearse and not torch.cuda.is_available():
        print("no CUDA device here: run it where there is one, or `--rehearse` the suite in the interpreter")
        return 2
    if options.part == "sanitize":
        from benchmarks.gpu.sanitize import sanitize

        return sanitize(options)
    report = run(options, ["--resume", *(word for word in arguments if word != "--resume")])
    print(json.dumps(report, indent=2) if options.json else "\n".join(table(report)))
    return 1 if any("failed" in record for record in report["cases"] + report["checks"]) else 0


def run(options: argparse.Namespace, restart: Sequence[str]) -> dict[str, Any]:
    """Measure what `options` select, and write the report as it grows.

    Args:
        options: those of the command line.
        restart: the arguments with which a new process goes on.
    """
    from benchmarks.gpu.device import Cuda, Device, Rehearsal, folder_name
    from personafast import ops
    from personafast._io import read_json, write_json

    began = time.monotonic()
    device: Device = Rehearsal() if options.rehearse else Cuda()
    path = options.out / folder_name(device.facts()) / FILES[options.part]
    path.parent.mkdir(parents=True, exist_ok=True)
    head = _head(device, options)
    if options.resume and path.exists():
        report = read_json(path)
        fixed = ("commit", "hardware", "versions")
        if any(report.get(key) != head[key] for key in fixed):
            raise SystemExit(f"{path} was measured with another commit, GPU or versions: run without --resume")
        began -= 60 * report["minutes"]
    else:
        report = {**head, **_ceilings(device), "minutes": 0.0, "cases": [], "checks": []}
    jobs = _jobs(options, device, report)
    done = {_key(record) for record in report["cases"] + report["checks"]}

    def add(record: dict[str, Any]) -> None:
        report["checks" if "dtype" in record else "cases"].append(record)
        report["minutes"] = round((time.monotonic() - began) / 60, 2)
        write_json(path, report)
        count = len(report["cases"]) + len(report["checks"])
        name = " ".join(part for part in _key(record) if part)
        print(f"[{count}/{len(jobs)}] {report['minutes']:.1f} min  {name}", file=sys.stderr)

    def go_on_in_a_new_process() -> None:
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu_suite", *restart])

    # By name, so that a kernel that cannot take a case is an error and not torch's form under our name.
    with ops.use_backend("triton" if options.part == "kernels" else None):
        for number, (about, job) in enumerate(jobs):
            if _key(about) in done:
                continue
            left = 60 * options.minutes - (time.monotonic() - began)
            if left <= 0:
                add({**about, "skipped": f"no time was left of {options.minutes:g} minutes"})
                continue

            patience = HANG_SECONDS_OF_MODELS if options.part == "decode" else HANG_SECONDS

            def give_up(about: dict[str, Any] = about, patience: float = patience) -> None:
                add({**about, "failed": f"no answer within {patience:g} s"})
                go_on_in_a_new_process()

            watch = threading.Timer(patience, give_up)
            watch.daemon = True
            watch.start()
            try:
                record = {**about, **job(left / (len(jobs) - number))}
            except Exception as error:
                record = {**about, "failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
            finally:
                watch.cancel()
            add(record)
            if "failed" in record and device.lost():
                go_on_in_a_new_process()
    return report


# What a job is, and the job itself, given the seconds it may take.
Job: TypeAlias = "tuple[dict[str, Any], Callable[[float], dict[str, Any]]]"


def _jobs(options: argparse.Namespace, device: Any, report: dict[str, Any]) -> list[Job]:
    """Every case to be checked and timed, then the small ones of other dtypes and odd sizes to be checked."""
    import torch

    if options.part == "decode":
        return _decoding(options, device)
    from benchmarks.gpu.cases import cases
    from benchmarks.gpu.measure import checked, measure

    def timed(case: Any) -> Callable[[float], dict[str, Any]]:
        most = SECONDS_A_CONTENDER * len(case.contenders)
        copy = report["ceilings"]["copy_gb_s"]
        return lambda seconds: measure(case, device, report["seed"], min(most, seconds), copy)

    def looked_at(case: Any, dtype: torch.dtype) -> Callable[[float], dict[str, Any]]:
        def job(seconds: float) -> dict[str, Any]:
            errors, _ = checked(case, device, report["seed"], dtype)
            error = errors.get(case.ours.name)
            return {"relative_error": None if error is None else float(f"{error.relative:.3g}")}

        return job

    def wanted(tiny: bool) -> list[Any]:
        return [case for case in cases(tiny=tiny) if not options.only or options.only in case.name]

    jobs: list[Job] = []
    if not options.checks_only:
        jobs += [
            ({"name": case.name, "operator": case.operator}, timed(case)) for case in wanted(tiny=device.rehearsal)
        ]
    for dtype in (torch.float32,) if device.rehearsal else (torch.float32, torch.float16, torch.bfloat16):
        about = {"dtype": str(dtype).removeprefix("torch.")}
        jobs += [
            ({"name": case.name, "operator": case.operator, **about}, looked_at(case, dtype)) for case in wanted(True)
        ]
    return jobs


def _decoding(options: argparse.Namespace, device: Any) -> list[Job]:
    from benchmarks.gpu import decoding

    jobs: list[Job] = [
        ({"name": "graphs-equal-calls", "dtype": "float32"}, lambda _: decoding.same_texts(device)),
        *(({"name": scene.name}, lambda _, scene=scene: decoding.run(scene, device)) for scene in decoding.SCENES),
    ]
    return [(about, job) for about, job in jobs if not options.only or options.only in about["name"]]


def _key(record: dict[str, Any]) -> tuple[str, str]:
    return record["name"], record.get("dtype", "")


def _head(device: Any, options: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.machine import commit, today, versions

    return {
        "suite": "gpu",
        "rehearsal": device.rehearsal,
        "date": today(),
        "commit": commit(),
        "seed": int.from_bytes(os.urandom(4), "little") if options.seed is None else options.seed,
        "hardware": device.facts(),
        "versions": {**versions(), **_gpu_versions()},
    }


def _ceilings(device: Any) -> dict[str, Any]:
    from benchmarks.gpu.ceilings import ceilings

    return {"ceilings": ceilings(device)}


def _gpu_versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("triton", "liger-kernel", "flashinfer-python", "vllm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_suite",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results; default benchmarks/results")
    parser.add_argument("--part", choices=PARTS, default="kernels", help="what to run; default kernels")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--checks-only", action="store_true", help="the small cases, checked and not timed")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="begin no case after this long")
    parser.add_argument("--seed", type=int, help="of the inputs; drawn anew unless given, and always reported")
    parser.add_argument("--resume", action="store_true", help="keep the cases that the file has already")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU, small, in Triton's interpreter")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
