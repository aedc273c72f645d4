"""What masks keep, linear by linear, and in what two masks differ."""

from __future__ import annotations

from dataclasses import dataclass

from personafast.masks.mask import PersonaMask, count_bits
from personafast.masks.targets import block_of, module_kind, short_name


@dataclass(frozen=True)
class ModuleShare:
    """How much of one linear a mask keeps.

    Attributes:
        path: the linear.
        block: index of its block.
        name: its name inside the block.
        kind: ``attention`` or ``mlp``.
        weights: weights of the linear.
        kept: how many are kept.
        nbytes: bytes of the mask's words.
    """

    path: str
    block: int
    name: str
    kind: str
    weights: int
    kept: int
    nbytes: int

    @property
    def share(self) -> float:
        """Share kept."""
        return self.kept / self.weights


@dataclass(frozen=True)
class ModuleDifference:
    """In how much of one linear two masks differ.

    Attributes:
        path: the linear.
        block: index of its block.
        name: its name inside the block.
        kind: ``attention`` or ``mlp``.
        weights: weights of the linear.
        first: weights the first mask keeps.
        second: weights the second mask keeps.
        both: weights both keep.
    """

    path: str
    block: int
    name: str
    kind: str
    weights: int
    first: int
    second: int
    both: int

    @property
    def share(self) -> float:
        """Share of weights that exactly one of the masks keeps: differing bits over all bits."""
        return (self.first + self.second - 2 * self.both) / self.weights

    @property
    def jaccard(self) -> float:
        """Weights that both keep over those that either keeps; 1 where neither keeps any."""
        either = self.first + self.second - self.both
        return self.both / either if either else 1.0


def shares(mask: PersonaMask) -> list[ModuleShare]:
    """What a mask keeps of every linear, in the mask's order."""
    return [
        ModuleShare(
            path,
            block_of(path),
            short_name(path),
            module_kind(path),
            mask.size_of(path),
            mask.kept_of(path),
            words.numel() * words.element_size(),
        )
        for path, words in mask.words.items()
    ]


def differences(first: PersonaMask, second: PersonaMask) -> list[ModuleDifference]:
    """In what two masks differ, linear by linear, in the first one's order.

    Raises:
        PersonafastError: masks over other linears or of other shapes.
    """
    first.check_comparable(second)
    return [
        ModuleDifference(
            path,
            block_of(path),
            short_name(path),
            module_kind(path),
            first.size_of(path),
            first.kept_of(path),
            second.kept_of(path),
            count_bits(words & second.words[path], first.in_features[path]),
        )
        for path, words in first.words.items()
    ]


def summed(rows: list[ModuleDifference], path: str = "") -> ModuleDifference:
    """Several linears as one, for a total."""
    kinds = {row.kind for row in rows}
    return ModuleDifference(
        path,
        -1,
        path,
        kinds.pop() if len(kinds) == 1 else "",
        *(sum(getattr(row, name) for row in rows) for name in ("weights", "first", "second", "both")),
    )


def totals(rows: list[ModuleDifference]) -> list[ModuleDifference]:
    """The sum over each class of modules, where there are several, and the sum over all."""
    kinds = dict.fromkeys(row.kind for row in rows)
    parts = [summed([row for row in rows if row.kind == kind], kind) for kind in kinds] if len(kinds) > 1 else []
    return [*parts, summed(rows, "all")]
