"""Which implementation an operator runs: chosen automatically, or by name and then never anything else."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType, TracebackType
from typing import NamedTuple

import torch

from personafast.errors import BackendError, PersonafastError

BACKENDS = ("reference", "cpu", "triton", "cuda")
VARIABLE = "PERSONAFAST_BACKEND"

# operator -> backends that have a kernel of their own for it. An operator without any runs its vectorised torch form
# under every backend.
KERNELS: dict[str, tuple[str, ...]] = {}


class Limit(NamedTuple):
    """The size of a call up to which a kernel is chosen automatically, and what the size counts."""

    most: int
    unit: str = "rows"


# (operator, backend) -> where its kernel stops being the faster one. Asked for by name, a kernel takes any size.
LIMITS: dict[tuple[str, str], Limit] = {}

# Kernels that run on the tensors of a device, the best first.
_PREFERRED = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

_forced: str | None = None
_environment_read = False
_modules: dict[str, ModuleType | str] = {}
# (operator, device, backend passed over or "") -> the automatic choice
_automatic: dict[tuple[str, str, str], str] = {}


def _load(backend: str) -> ModuleType | str:
    """The module behind `backend`, or one line that says what is missing."""
    if backend not in _modules:
        name, mend = {
            "cpu": ("personafast._C", "build it with `pip install .`"),
            "triton": ("personafast._triton", "it needs `pip install triton` and an installed personafast"),
            "cuda": ("personafast._C", "build it with `pip install .` where nvcc is found"),
        }[backend]
        try:
            if backend == "triton" and importlib.util.find_spec("triton") is None:
                raise ImportError("No module named 'triton'")
            loaded = importlib.import_module(name)
            built = {} if backend == "triton" else loaded.build_info()
            if backend == "cuda" and not built.get("cuda"):
                raise ImportError("it was built without CUDA")
            trouble = loaded.cuda_trouble() if backend == "cuda" else ""
            # As of the device that is current: there may be none, or one that nothing was compiled for.
            _modules[backend] = f"compiled for {', '.join(built['cuda'])}, but {trouble}" if trouble else loaded
        except RuntimeError as error:
            # An instruction set that was asked for by name: no automatic choice may pass over that either.
            raise BackendError(str(error)) from None
        except ImportError as error:
            _modules[backend] = f"{name} cannot be imported ({error}); {mend}"
    return _modules[backend]


def module(backend: str) -> ModuleType:
    """The module that holds the kernels of `backend`; BackendError when it is not there."""
    loaded = _load(backend)
    if isinstance(loaded, str):
        raise BackendError(f"backend {backend!r} cannot run: {loaded}")
    return loaded


def available(backend: str) -> tuple[bool, str]:
    """Whether `backend` can be imported here, and why."""
    if backend == "reference":
        return True, "plain torch"
    loaded = _load(backend)
    return (False, loaded) if isinstance(loaded, str) else (True, f"{loaded.__name__} imported")


def _checked(name: str | None) -> str | None:
    if name is None or name == "auto":
        return None
    if name not in BACKENDS:
        raise BackendError(f"unknown backend {name!r}: choose one of {', '.join(BACKENDS)} or 'auto'")
    if name != "reference":
        module(name)
    return name


class use_backend:  # noqa: N801 - reads as a function, as torch.no_grad does
    """Run every operator on one backend: `use_backend("reference")`, or `with use_backend("reference"): ...`.

    Args:
        name: "reference" (plain torch, the specification), "cpu" (the C++ core), "triton", "cuda" (CUDA C++), or None /
            "auto" for the automatic choice. The environment variable PERSONAFAST_BACKEND sets the one in force at the
            start.

    Raises:
        BackendError: the name is unknown, or what the backend needs is not installed. Later, when an operator has no
            kernel in the chosen backend for the device, dtype or layout it is called with: an explicit choice never
            falls back. An operator that has no kernel in *any* backend runs its vectorised torch form.
    """

    def __init__(self, name: str | None) -> None:
        global _forced
        self._previous = forced()
        _forced = _checked(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _forced
        _forced = self._previous


def forced() -> str | None:
    """The backend asked for by name, or None while the choice is automatic."""
    global _forced, _environment_read
    if not _environment_read:
        _environment_read = True
        try:
            _forced = _checked(os.environ.get(VARIABLE) or None)
        except BackendError as error:
            _environment_read = False
            raise BackendError(f"{VARIABLE}: {error}") from None
    return _forced


def pick(op: str, device: str, size: int = 0) -> str:
    """The implementation of `op` to run on tensors of `device`: "reference", "cpu", "triton", "cuda" or "torch".

    "torch" is the vectorised torch form of an operator, where no kernel applies and none was asked for. `size` is that
    of the call, in the unit of the operator's `Limit`.
    """
    name = _forced if _environment_read else forced()
    if name is None:
        return _pick_automatically(op, device, size)
    if name == "reference":
        return name
    kernels = KERNELS[op]
    if not kernels:
        return "torch"
    if name not in kernels:
        raise BackendError(f"{op} has no {name!r} kernel: choose {' or '.join(map(repr, kernels))}, or 'auto'")
    if name == "cpu" and device != "cpu":
        raise BackendError(f"{op}: backend 'cpu' cannot run on {device} tensors: choose 'triton' or 'auto'")
    if name == "triton" and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise BackendError(f"{op}: backend 'triton' needs CUDA tensors (or TRITON_INTERPRET=1): choose 'cpu' or 'auto'")
    if name == "cuda" and device == "cpu":
        raise BackendError(f"{op}: backend 'cuda' needs CUDA tensors: choose 'cpu' or 'auto'")
    return name


def refuse(op: str, why: str) -> None:
    """Raise if a backend was asked for by name: its kernel cannot take this call, because of `why`."""
    name = forced()
    if name is not None:
        raise BackendError(f"{op}: backend {name!r} cannot take {why}: choose 'reference' or 'auto'")


def instead(op: str, device: str, backend: str, why: str, size: int = 0) -> str:
    """What `pick` says for a call that the kernel of `backend`, which it chose, cannot take because of `why`.

    Raises BackendError if that backend was asked for by name.
    """
    refuse(op, why)
    return _pick_automatically(op, device, size, backend)


def _pick_automatically(op: str, device: str, size: int, passed_over: str = "") -> str:
    key = op, device, passed_over
    choice = _automatic.get(key)
    if choice is None:
        choice = _automatic.setdefault(key, _choose(op, device, passed_over)[0])
    limit = LIMITS.get((op, choice))
    if limit is None or size <= limit.most:
        return choice
    return _pick_automatically(op, device, size, choice)


def _choose(op: str, device: str, passed_over: str = "") -> tuple[str, str]:
    """The best backend that is there, of those that come after the one passed over, and why."""
    kernels = [name for name in _PREFERRED.get(device, _PREFERRED["cuda"]) if name in KERNELS[op]]
    if passed_over:
        kernels = kernels[kernels.index(passed_over) + 1 :]
    if not kernels:
        return "torch", f"vectorised torch: no kernel for {device} tensors"
    for name in kernels:
        ready, why = available(name)
        if ready:
            limit = LIMITS.get((op, name))
            if limit is not None:
                why = f"{why}; above {limit.most} {limit.unit}, {_choose(op, device, name)[0]}"
            return name, why
    return "torch", f"vectorised torch: {why}"


def chosen(op: str, device: str = "cpu") -> tuple[str, str]:
    """What `op` runs on and why, for `personafast doctor`.

    Args:
        op: operator name, for example "inject_".
        device: "cpu" or "cuda".

    Returns:
        (backend, reason): backend is "reference", "cpu", "triton", "cuda" or "torch" (the operator's vectorised torch
        form), for calls that are not too large for its kernel; the reason names the limit.
    """
    if op not in KERNELS:
        raise PersonafastError(f"unknown operator {op!r}: choose one of {', '.join(sorted(KERNELS))}")
    name = forced()
    if name is None:
        return _choose(op, device)
    try:
        return pick(op, device), f"asked for by name ({name!r})"
    except BackendError as error:
        return "none", str(error)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
