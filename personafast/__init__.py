"""Hugging Face models that speak with several personas at once, at close to the cost of one."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from personafast._version import __version__

if TYPE_CHECKING:
    from personafast.errors import BackendError, FormatError, PersonafastError, UnsupportedModelError
    from personafast.handle import PersonaHandle, attach
    from personafast.library import PersonaLibrary
    from personafast.persona import Persona
    from personafast.policies import PolicySet
    from personafast.processor import MPGLogitsProcessor
    from personafast.steering import FirstTokens, LinearSchedule, Steering

# Resolved on first use: `import personafast` must stay free of transformers, triton, vllm, peft and matplotlib.
_HOME = {
    "attach": "personafast.handle",
    "PersonaHandle": "personafast.handle",
    "MPGLogitsProcessor": "personafast.processor",
    "Persona": "personafast.persona",
    "PersonaLibrary": "personafast.library",
    "Steering": "personafast.steering",
    "FirstTokens": "personafast.steering",
    "LinearSchedule": "personafast.steering",
    "PolicySet": "personafast.policies",
    "PersonafastError": "personafast.errors",
    "UnsupportedModelError": "personafast.errors",
    "FormatError": "personafast.errors",
    "BackendError": "personafast.errors",
}
_SUBMODULES = {"density", "evaluate", "masks", "models", "ops", "vectors", "zoo"}

__all__ = [
    "BackendError",
    "FirstTokens",
    "FormatError",
    "LinearSchedule",
    "MPGLogitsProcessor",
    "Persona",
    "PersonaHandle",
    "PersonaLibrary",
    "PersonafastError",
    "PolicySet",
    "Steering",
    "UnsupportedModelError",
    "__version__",
    "attach",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"personafast.{name}")
    raise AttributeError(f"module 'personafast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *_SUBMODULES})
