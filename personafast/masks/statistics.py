"""What a calibration gathers: sums over the inputs of every linear, in float64."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from personafast._io import read_safetensors, write_safetensors
from personafast.errors import FormatError, PersonafastError
from personafast.models.anatomy import ModelShape

STATISTICS = ("mean_abs", "l2", "sample_l2")
MOMENTS = ("x", "sample_l2")
_SUMS = ("absolute", "squares", "total", "norms")
_FORMAT = 1
_KEY = "personafast"


@dataclass
class ChannelSums:
    """Sums over the tokens that one linear has seen; x is its input.

    Attributes:
        absolute: sum of |x_j|, float64 [in].
        squares: sum of x_j^2.
        total: sum of x_j.
        norms: sum over texts of the L2 norm of x_j over the text's tokens.
        tokens: tokens seen.
        samples: texts of which at least one token was seen.
    """

    absolute: torch.Tensor
    squares: torch.Tensor
    total: torch.Tensor
    norms: torch.Tensor
    tokens: int = 0
    samples: int = 0

    @classmethod
    def zeros(cls, width: int) -> ChannelSums:
        """Nothing seen yet."""
        absolute, squares, total, norms = torch.zeros(4, width, dtype=torch.float64)
        return cls(absolute, squares, total, norms)

    def add(self, other: ChannelSums) -> None:
        """Add what another part of the texts gave."""
        for name in _SUMS:
            getattr(self, name).add_(getattr(other, name))
        self.tokens += other.tokens
        self.samples += other.samples

    def of(self, statistic: str) -> torch.Tensor:
        """One statistic, float64 [in]; zeros where no token was seen."""
        if statistic == "mean_abs":
            return self.absolute / max(self.tokens, 1)
        if statistic == "l2":
            return self.squares.sqrt()
        return self.norms / max(self.samples, 1)

    def moments(self, of: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and variance (divided by n) of x over tokens, or of the norms over texts."""
        # The square of a text's norm is its sum of squares, so both variances need the same sum.
        count, total = (self.tokens, self.total) if of == "x" else (self.samples, self.norms)
        mean = total / max(count, 1)
        return mean, (self.squares / max(count, 1) - mean.square()).clamp(min=0)


@dataclass(frozen=True)
class CalibrationStatistics(Mapping[str, torch.Tensor]):
    """Statistics of the inputs of every linear of one model; as a mapping, path -> mean |x_j|, float64 [in].

    Attributes:
        sums: path -> sums.
        shape: the model they were gathered from.
        settings: what decides them besides model and texts, as plain JSON values.
        runs: fingerprint of the texts of each calibration that has gone in -> how it was batched, batches seen and
            batches in all.
    """

    sums: Mapping[str, ChannelSums]
    shape: ModelShape
    settings: Mapping[str, Any] = field(default_factory=dict)
    runs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __getitem__(self, path: str) -> torch.Tensor:
        return self.sums[path].of("mean_abs")

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)

    @property
    def complete(self) -> bool:
        """Whether every run that has gone in has seen all of its texts."""
        return all(run["seen"] == run["batches"] for run in self.runs.values())

    @property
    def tokens(self) -> int:
        """Tokens counted; an expert has seen only those that were routed to it."""
        return max((sums.tokens for sums in self.sums.values()), default=0)

    @property
    def samples(self) -> int:
        """Texts counted."""
        return max((sums.samples for sums in self.sums.values()), default=0)

    def of(self, statistic: str) -> dict[str, torch.Tensor]:
        """Path -> A, float64 [in]: ``mean_abs`` (mean over tokens of |x_j|), ``l2`` (L2 norm over all tokens), or
        ``sample_l2`` (mean over texts of the L2 norm over a text's tokens).

        Raises:
            PersonafastError: another statistic.
        """
        if statistic not in STATISTICS:
            raise PersonafastError(f"statistic: {statistic!r} is unknown; choose one of {', '.join(STATISTICS)}")
        return {path: sums.of(statistic) for path, sums in self.sums.items()}

    def merge(self, other: CalibrationStatistics) -> CalibrationStatistics:
        """The statistics of both calibrations' texts together: sums and counts are added.

        Raises:
            PersonafastError: another model, other settings, or the same texts again.
        """
        if self.shape != other.shape:
            raise PersonafastError("statistics: of another model; only calibrations of one model can be merged")
        check_settings(self.settings, other.settings, "statistics")
        if set(self.runs) & set(other.runs):
            raise PersonafastError("statistics: these texts are in already; merge calibrations of other texts")
        if {p: s.total.shape for p, s in self.sums.items()} != {p: s.total.shape for p, s in other.sums.items()}:
            raise PersonafastError("statistics: over other linears; only calibrations of one model can be merged")
        both = {}
        for path, sums in self.sums.items():
            both[path] = ChannelSums.zeros(sums.total.numel())
            both[path].add(sums)
            both[path].add(other.sums[path])
        return CalibrationStatistics(both, self.shape, self.settings, {**self.runs, **other.runs})

    def check(self, model: nn.Module) -> None:
        """Raise `PersonafastError` unless these are statistics of such a model."""
        from personafast.masks.targets import find_targets

        targets = find_targets(model)
        if targets.parts.shape != self.shape:
            raise PersonafastError(f"statistics: {different_model(self.shape, targets.parts.shape)}")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; a file that is there is replaced whole, or not at all."""
        tensors = {f"{where}::{name}": getattr(sums, name) for where, sums in self.sums.items() for name in _SUMS}
        facts = {
            "format_version": _FORMAT,
            "model": asdict(self.shape),
            "settings": dict(self.settings),
            "runs": {key: dict(run) for key, run in self.runs.items()},
            "counts": {where: [sums.tokens, sums.samples] for where, sums in self.sums.items()},
        }
        write_safetensors(Path(path), tensors, {_KEY: json.dumps(facts)})

    @classmethod
    def load(cls, path: str | Path) -> CalibrationStatistics:
        """Read what `save` wrote.

        Raises:
            FormatError: the file is missing, truncated or something else.
        """
        path = Path(path)
        tensors, metadata = read_safetensors(path)
        try:
            facts = json.loads(metadata[_KEY])
            if facts["format_version"] != _FORMAT:
                raise FormatError(
                    f"{path}: format_version {facts['format_version']}, expected {_FORMAT}; make it again"
                )
            sums = {}
            for where, (tokens, samples) in facts["counts"].items():
                absolute, squares, total, norms = (tensors[f"{where}::{name}"] for name in _SUMS)
                sums[where] = ChannelSums(absolute, squares, total, norms, int(tokens), int(samples))
            runs = {key: {**run, "seen": int(run["seen"])} for key, run in facts["runs"].items()}
            return cls(sums, ModelShape(**facts["model"]), facts["settings"], runs)
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise FormatError(f"{path}: no file of calibration statistics ({error}); calibrate again") from None


def different_model(made: ModelShape, found: ModelShape) -> str:
    """In what a model differs from the one something was made for."""
    names = [name for name, value in asdict(made).items() if value != asdict(found)[name]]
    what = ", ".join(f"{name} {asdict(made)[name]}" for name in names)
    return (
        f"made for a model with {what}, this one has {', '.join(str(asdict(found)[name]) for name in names)}; "
        "use the model it was made for"
    )


def check_settings(known: Mapping[str, Any], asked: Mapping[str, Any], where: str) -> None:
    """Raise `PersonafastError`, naming what differs, unless two calibrations have the same settings."""
    changed = sorted(key for key in {*known, *asked} if known.get(key) != asked.get(key))
    if changed:
        what = ", ".join(f"{key} {known.get(key)!r} instead of {asked.get(key)!r}" for key in changed)
        raise PersonafastError(f"{where}: made with other settings ({what}); repeat those, or start a new file")
