"""A persona vector: one direction a block, and the blocks it is meant for."""

from __future__ import annotations

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

    Raises:
        PersonafastError: a shape that is not two-dimensional, NaN or infinity, a block out of range, a nameless hook
            point.
    """

    directions: torch.Tensor
    blocks: Sequence[int] = ()
    metadata: Mapping[str, object] = field(default_factory=dict)
    hook_point: str = BLOCK_OUTPUT

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
        blocks = tuple(int(block) for block in self.blocks) or default_blocks(count)
        for block in blocks:
            if not 0 <= block < count:
                raise PersonafastError(f"vector: block {block} is not in 0..{count - 1}")
        object.__setattr__(self, "directions", directions.contiguous())
        object.__setattr__(self, "blocks", blocks)

    @property
    def norms(self) -> torch.Tensor:
        """Euclidean norm at every block, float32 [num_blocks]."""
        return self.directions.norm(dim=1)
