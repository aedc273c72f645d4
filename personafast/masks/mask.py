"""A persona mask: one bit a weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from personafast import ops
from personafast.errors import PersonafastError


@dataclass(frozen=True)
class PersonaMask:
    """Bit masks over linears; a set bit keeps the weight.

    Attributes:
        words: module path -> int32 [out, ceil(in / 32)], packed along `in`, LSB first.
        in_features: module path -> in, since the last word may be partly used.
        metadata: how it was made, as plain JSON values.

    Raises:
        PersonafastError: words whose shape does not fit `in_features`.
    """

    words: Mapping[str, torch.Tensor]
    in_features: Mapping[str, int]
    metadata: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path, words in self.words.items():
            if path not in self.in_features:
                raise PersonafastError(f"mask: in_features lacks {path!r}")
            expected = -(-self.in_features[path] // 32)
            if words.dim() != 2 or words.dtype != torch.int32 or words.shape[1] != expected:
                raise PersonafastError(
                    f"mask[{path!r}]: expected int32 [out, {expected}], got {words.dtype} {list(words.shape)}"
                )

    def dense(self, path: str) -> torch.Tensor:
        """The mask of one linear as bool [out, in]."""
        return ops.unpack_mask(self.words[path], self.in_features[path])

    def union(self, *others: PersonaMask) -> PersonaMask:
        """Keep a weight where this mask or any of `others` keeps it.

        Raises:
            PersonafastError: masks over other linears or of other shapes.
        """
        words = {path: own.clone() for path, own in self.words.items()}
        for other in others:
            if {path: w.shape for path, w in other.words.items()} != {path: w.shape for path, w in words.items()}:
                raise PersonafastError("mask: only masks over the same linears of one model can be joined")
            for path in words:
                words[path] |= other.words[path]
        return PersonaMask(words, self.in_features, {"method": "union"})

    @property
    def kept(self) -> float:
        """Share of weights kept, over all masked linears."""
        kept = total = 0
        for path in self.words:
            mask = self.dense(path)
            kept += int(mask.sum())
            total += mask.numel()
        return kept / total
