"""What the figures were measured on: hardware, versions, commit, and the waiting of torch's OpenMP threads."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_POLICY = "OMP_WAIT_POLICY"
# What a page or a result says of the tree it was measured on must not depend on the pages and results themselves.
_OUTPUTS = ("benchmarks/results", "docs")


def require_passive_waiting() -> None:
    """Set OMP_WAIT_POLICY=passive, or say that it is too late: OpenMP reads it once, when torch is imported.

    Raises:
        RuntimeError: torch was imported under another policy.
    """
    if os.environ.get(_POLICY, "").lower() == "passive":
        return
    if "torch" in sys.modules:
        raise RuntimeError(
            f"torch was imported without {_POLICY}=passive: its idle threads spin, and take the cores from whatever "
            f"is timed next; run `{_POLICY}=passive python -m pytest benchmarks` or `make bench`"
        )
    os.environ[_POLICY] = "passive"


@functools.cache
def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 32 MiB where the machine does not say."""
    sizes = [_cache_bytes(index / "size") for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")]
    return max(sizes, default=0) or 32 << 20


def _cache_bytes(path: Path) -> int:
    try:
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()).groups()  # type: ignore[union-attr]
    except (OSError, AttributeError):
        return 0
    return int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]


def available_memory() -> int:
    """Bytes that can be allocated now without swapping; 4 GiB where the machine does not say."""
    return _proc_kib("/proc/meminfo", "MemAvailable") << 10 or 4 << 30


def _proc_kib(path: str, key: str) -> int:
    try:
        found = re.search(rf"^{key}:\s+(\d+) kB", Path(path).read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) if found else 0


def _cpu() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def hardware() -> dict[str, Any]:
    """The machine in words and numbers; no name of it."""
    import torch

    from personafast.ops import _backend

    cpu = _cpu()
    ready, _ = _backend.available("cpu")
    return {
        "cpu": cpu.get("model name") or platform.processor() or platform.machine(),
        "cpu_family_model_stepping": [cpu.get(key, "") for key in ("cpu family", "model", "stepping")],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(),
        "memory_bytes": _proc_kib("/proc/meminfo", "MemTotal") << 10,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "kernels": _backend.module("cpu").build_info() if ready else "not built",
        "system": f"{platform.system()} {platform.machine()}",
        "omp_wait_policy": os.environ.get(_POLICY, ""),
    }


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("personafast", "torch", "transformers", "torchao", "numpy", "pytest-benchmark"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def machine_name() -> str:
    """A name for this kind of machine, for the folder of its results: processor, instruction set, threads."""
    import torch

    cpu = _cpu()
    model = f"f{cpu['cpu family']}m{cpu['model']}" if "cpu family" in cpu else ""
    parts = [
        cpu.get("model name") or platform.machine(),
        model,
        torch.backends.cpu.get_cpu_capability(),
        f"{torch.get_num_threads()}-threads",
    ]
    return "-".join(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts if part)


@functools.cache
def commit() -> str:
    """The commit that is checked out, with "+changes" where the sources differ from it."""
    try:
        head = _git("rev-parse", "HEAD")
        outputs = [f":(exclude){path}" for path in _OUTPUTS]
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *outputs)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}+changes" if changed else head


def today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
