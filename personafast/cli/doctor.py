"""`personafast doctor`: what this machine runs, and whether it runs it right."""

from __future__ import annotations

import importlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer

from personafast._version import __version__
from personafast.cli.facts import fact_table
from personafast.cli.progress import progress_bar

PACKAGES = (
    "transformers",
    "safetensors",
    "numpy",
    "triton",
    "peft",
    "flash-attn",
    "vllm",
    "matplotlib",
)
ISA_FLAGS = (
    "avx2",
    "fma",
    "avx512f",
    "avx512bw",
    "avx512vl",
    "avx512_bf16",
    "avx512_vbmi2",
    "avx512_vnni",
    "amx_bf16",
)

EXAMPLE = """\
**Is the kernel for my CPU used, and is it right?**

`personafast doctor`

Set `PERSONAFAST_BACKEND=reference` to force plain torch, `PERSONAFAST_CPU_ISA=scalar` to force the plainest kernels.
"""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show hardware, versions and the backend of every operator, then check each against its reference.

    Exit code 0 when every check passes, 1 otherwise.
    """
    report = examine()
    if as_json:
        typer.echo(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        _show(report)
    if not report["passed"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Everything `personafast doctor` knows, as one JSON object."""
    import torch

    from personafast import ops
    from personafast.cli.selfcheck import CASES, checks

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    with progress_bar() as bar:
        task = bar.add_task("self-check", total=len(devices) * len(CASES) + 1)
        outcomes = []
        for outcome in checks(devices):
            outcomes.append(outcome._asdict())
            bar.advance(task)
    return {
        "hardware": _hardware(),
        "versions": {
            "python": platform.python_version(),
            "personafast": __version__,
            "torch": torch.__version__,
            **{name: _version(name) for name in PACKAGES},
        },
        "core": _core(),
        "backends": {
            op: {device: dict(zip(("backend", "reason"), ops.chosen(op, device), strict=True)) for device in devices}
            for op in CASES
        },
        "checks": outcomes,
        "passed": all(outcome["passed"] for outcome in outcomes),
    }


def _hardware() -> dict[str, Any]:
    import torch

    model, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    except OSError:
        # No /proc: the flags stay unknown, and the core reads the CPU itself.
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model,
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
        "cores": cores,
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [
            {
                "name": torch.cuda.get_device_name(index),
                "capability": ".".join(map(str, torch.cuda.get_device_capability(index))),
                "memory_gib": round(torch.cuda.get_device_properties(index).total_memory / 2**30, 1),
            }
            for index in range(torch.cuda.device_count())
        ],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _core() -> dict[str, Any]:
    try:
        core = importlib.import_module("personafast._C")
    except ImportError as error:
        return {"error": f"personafast._C cannot be imported ({error}); reinstall personafast with a C++ compiler"}
    return dict(core.build_info())


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)

    console.print(fact_table("Hardware", report["hardware"]), "")
    console.print(fact_table("Versions", report["versions"]), "")
    console.print(fact_table("Compiled core", report["core"]), "")

    table = Table(title="Backend of every operator", title_justify="left")
    for heading in ("operator", "device", "backend", "why"):
        table.add_column(heading)
    for op, devices in report["backends"].items():
        for device, choice in devices.items():
            table.add_row(op, device, choice["backend"], Text(choice["reason"]))
    console.print(table, "")

    table = Table(title="Self-check", title_justify="left")
    for heading in ("check", "", "detail"):
        table.add_column(heading)
    for check in report["checks"]:
        mark = Text("pass", style="green") if check["passed"] else Text("FAIL", style="bold red")
        table.add_row(check["name"], mark, Text(check["detail"]))
    console.print(table)
