"""A persona vector: one direction a block, and the blocks it is meant for."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from personafast.errors import PersonafastError

BLOCK_OUTPUT = "block_output"
"""The hook point that vectors act at here: the residual stream at the output of a block."""


def default_blocks(num_blocks: int) -> tuple[int, ...]:
    """Where a vector acts when nothing is said: one block, 60 % of the way up (arXiv 2510.10157 takes 20 of 32)."""
    return (min(num_blocks - 1, round(0.6 * num_blocks)),)


@dataclass(frozen=True, eq=False)
class PersonaVector:
    """Directions read at one place of every block; two vectors are equal only if they are the same object.

    Attributes:
        directions: float32 [num_blocks, hidden]; row b belongs to the 0-based block b.
        blocks: the blocks it is added to unless a `Persona` says otherwise.
        metadata: where it came from (method, texts), as plain JSON values.
        hook_point: where in the block the activations were read: `BLOCK_OUTPUT`, or another project's name for another
            place. A vector of another place can be kept and looked at, but neither blended with ours nor attached.
        missing: the blocks that have no direction, and why: files of other projects cannot hold every block. Their rows
            are zero, and they cannot be steered.

    Raises:
        PersonafastError: a shape that is not two-dimensional, NaN or infinity, a block out of range or missing, a
            nameless hook point.
    """

    directions: torch.Tensor
    blocks: Sequence[int] = ()
    metadata: Mapping[str, object] = field(default_factory=dict)
    hook_point: str = BLOCK_OUTPUT
    missing: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        directions = torch.as_tensor(self.directions).detach().to(device="cpu", dtype=torch.float32, copy=True)
        if directions.dim() != 2 or 0 in directions.shape:
            raise PersonafastError(
                f"vector: expected [num_blocks, hidden], got shape {list(directions.shape)}; one row a block"
            )
        bad = (~torch.isfinite(directions)).any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise PersonafastError(f"vector: NaN or infinity in the rows of blocks {bad[:8]}; extract it again")
        if not isinstance(self.hook_point, str) or not self.hook_point:
            raise PersonafastError(
                f"vector: hook_point {self.hook_point!r} is not a name; leave it out for block outputs"
            )
        count = directions.shape[0]
        missing = {int(block): str(why) for block, why in sorted(self.missing.items())}
        if any(not 0 <= block < count for block in missing):
            raise PersonafastError(f"vector: missing {list(missing)} has a block that is not in 0..{count - 1}")
        if len(missing) == count:
            raise PersonafastError(f"vector: every block is missing ({missing[0]}); there is nothing to steer with")
        if missing:
            directions[list(missing)] = 0.0
        object.__setattr__(self, "directions", directions.contiguous())
        object.__setattr__(self, "missing", missing)
        try:
            blocks = tuple(operator.index(block) for block in self.blocks) or self._default_blocks()
        except TypeError:
            raise PersonafastError(f"vector: blocks {self.blocks!r} are not 0-based block indices") from None
        self.check_blocks(blocks)
        object.__setattr__(self, "blocks", blocks)

    def check_blocks(self, blocks: Sequence[int]) -> None:
        """Raise `PersonafastError` unless every one of `blocks` exists and has a direction."""
        count = self.directions.shape[0]
        for block in blocks:
            if not 0 <= block < count:
                raise PersonafastError(f"vector: block {block} is not in 0..{count - 1}")
            if block in self.missing:
                raise PersonafastError(
                    f"vector: block {block} has no direction ({self.missing[block]}); name other blocks"
                )

    def _default_blocks(self) -> tuple[int, ...]:
        """The usual block, or the nearest one to it that has a direction."""
        count = self.directions.shape[0]
        (usual,) = default_blocks(count)
        return (min((block for block in range(count) if block not in self.missing), key=lambda b: abs(b - usual)),)

    @property
    def version(self) -> int:
        """Changes when `directions` is written to in place."""
        return 0 if self.directions.is_inference() else self.directions._version

    @property
    def norms(self) -> torch.Tensor:
        """Euclidean norm at every block, float32 [num_blocks]."""
        return self.directions.norm(dim=1)
