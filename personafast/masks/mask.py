"""A persona mask: one bit a weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        PersonafastError: words whose shape does not fit `in_features`, or a `gamma` outside [0, 1].
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
        check_gamma(self.metadata.get("gamma", 0))

    @property
    def gamma(self) -> float:
        """What dropped weights are multiplied with: the gate is G = M + gamma (1 - M); 0 drops them whole."""
        gamma = self.metadata.get("gamma", 0)
        assert isinstance(gamma, (int, float))
        return float(gamma)

    def with_metadata(self, **changes: object) -> PersonaMask:
        """The same bits with some entries of the metadata set, as in ``mask.with_metadata(gamma=0.2)``."""
        return PersonaMask(self.words, self.in_features, {**self.metadata, **changes})

    def dense(self, path: str) -> torch.Tensor:
        """The mask of one linear as bool [out, in]."""
        return ops.unpack_mask(self.words[path], self.in_features[path])

    def gate(self, path: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """G = M + gamma (1 - M) of one linear, [out, in]."""
        return torch.where(self.dense(path), 1.0, self.gamma).to(dtype)

    def union(self, *others: PersonaMask) -> PersonaMask:
        """Keep a weight where this mask or any of `others` keeps it.

        Raises:
            PersonafastError: masks over other linears or of other shapes.
        """
        return self._joined("union", others, torch.bitwise_or)

    def intersection(self, *others: PersonaMask) -> PersonaMask:
        """Keep a weight where this mask and all of `others` keep it.

        Raises:
            PersonafastError: masks over other linears or of other shapes.
        """
        return self._joined("intersection", others, torch.bitwise_and)

    def difference(self, *others: PersonaMask) -> PersonaMask:
        """Keep a weight where this mask keeps it and none of `others` does.

        Raises:
            PersonafastError: masks over other linears or of other shapes.
        """
        return self._joined("difference", others, lambda own, other: own & ~other)

    def overlap(self, other: PersonaMask) -> float:
        """Jaccard index: weights that both keep, as a share of those that either keeps; 1 for two empty masks.

        Raises:
            PersonafastError: masks over other linears or of other shapes.
        """
        both, either = self.intersection(other), self.union(other)
        kept = sum(either.kept_of(path) for path in either.words)
        return sum(both.kept_of(path) for path in both.words) / kept if kept else 1.0

    @property
    def kept(self) -> float:
        """Share of weights kept, over all masked linears; 1 for a mask over none."""
        total = sum(self.size_of(path) for path in self.words)
        return sum(self.kept_of(path) for path in self.words) / total if total else 1.0

    def kept_of(self, path: str) -> int:
        """Weights of one linear that are kept."""
        return count_bits(self.words[path], self.in_features[path])

    def size_of(self, path: str) -> int:
        """Weights of one linear, kept or not."""
        return self.words[path].shape[0] * self.in_features[path]

    def _joined(
        self,
        name: str,
        others: tuple[PersonaMask, ...],
        join: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> PersonaMask:
        words = {path: own.clone() for path, own in self.words.items()}
        for other in others:
            self.check_comparable(other)
            for path in words:
                words[path] = join(words[path], other.words[path])
        return PersonaMask(words, self.in_features, {"method": name})

    def check_comparable(self, other: PersonaMask) -> None:
        """Raise `PersonafastError` unless two masks lie over the same linears."""
        if {path: (w.shape, self.in_features[path]) for path, w in self.words.items()} != {
            path: (w.shape, other.in_features[path]) for path, w in other.words.items()
        }:
            raise PersonafastError("mask: only masks over the same linears of one model can be joined")


def check_gamma(gamma: object) -> None:
    """Raise `PersonafastError` unless a soft gate can have this gamma."""
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0 <= gamma <= 1:
        raise PersonafastError(f"gamma: {gamma} is not in [0, 1]")


def count_bits(words: torch.Tensor, width: int) -> int:
    """Set bits of a mask's words, int32 [out, ceil(width / 32)]; the bits beyond `width` do not count."""
    used = words.cpu().clone()
    if width % 32:
        used[:, -1] &= (1 << width % 32) - 1
    # Byte by byte: a table of 256 counts stays in cache, and no unpacked copy of the mask is made.
    return int(_BITS[used.view(torch.uint8).int()].sum())


_BITS = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.uint8)
