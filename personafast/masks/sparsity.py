"""Which share of every linear is dropped."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

from torch import nn

from personafast.errors import PersonafastError
from personafast.masks.targets import ATTENTION, MLP, module_kind, refuse_unknown

Sparsity = float | Mapping[str, float]


def resolve(model: nn.Module, paths: Iterable[str], sparsity: Sparsity) -> dict[str, tuple[str, float]]:
    """Path -> (the key it goes by, its sparsity), for the linears that are masked.

    Args:
        model: the model, to tell its head and embeddings.
        paths: what can be masked.
        sparsity: one number for all, or numbers by key: ``attention`` and ``mlp``, or patterns over the path such as
            ``*.layers.0.*``. A pattern goes before a class, and of several patterns the last one counts. A linear that
            no key covers is not masked.

    Raises:
        PersonafastError: a sparsity outside [0, 1), a key that covers nothing, or one that names the head or an
            embedding.
    """
    paths = list(paths)
    if not isinstance(sparsity, Mapping):
        return {path: ("", _checked("sparsity", sparsity)) for path in paths}
    for key, value in sparsity.items():
        _checked(f"sparsity[{key!r}]", value)
    found: dict[str, tuple[str, float]] = {}
    used = set()
    ordered = sorted(sparsity, key=lambda key: key not in (ATTENTION, MLP))
    for key in ordered:
        for path in paths:
            if module_kind(path) == key if key in (ATTENTION, MLP) else fnmatch.fnmatchcase(path, key):
                found[path] = (key, sparsity[key])
                used.add(key)
    for key in sparsity:
        if key not in used:
            refused = refuse_unknown(model, key, "sparsity")
            if "never masked" in str(refused):
                raise refused
            raise PersonafastError(
                f"sparsity: {key!r} covers no linear; give attention, mlp, or a pattern such as '*.layers.0.*'"
            )
    return {path: found[path] for path in paths if path in found}


def _checked(where: str, value: float) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise PersonafastError(f"{where}: {value} is not in [0, 1)")
    return value
