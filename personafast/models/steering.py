"""Steering at the blocks: what the rows of a batch carry is added to the residual stream after each block."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from personafast import ops
from personafast.models.anatomy import Anatomy
from personafast.models.banks import VectorBank
from personafast.models.rows import NOBODY, Spread


class SteeredBlocks:
    """The hooks on the blocks of one model, and the bank they read.

    Attributes:
        vectors: a row for every blend, block by block.
        rows: what the rows of the forward passes carry now, or None.
    """

    def __init__(self, parts: Anatomy, max_personas: int) -> None:
        self._blocks = parts.blocks
        self.vectors = VectorBank(parts, max_personas)
        self.rows: Spread | None = None
        self._hooks: list[Any] = []

    def install(self) -> None:
        """Hook the blocks.

        Hooks are partials of methods, not closures: a deep copy of the model gets a steering of its own.
        """
        for index, block in enumerate(self._blocks):
            self._hooks.append(block.register_forward_hook(functools.partial(self._after, index)))

    def remove(self) -> None:
        """Take the hooks out again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @property
    def used(self) -> set[int]:
        """Slots of the bank that the rows in force use."""
        return set() if self.rows is None else self.rows.used

    def _after(self, block: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        rows = self.rows
        if rows is None:
            return None
        bank = self.vectors.at(block)
        if bank is None:
            return None
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        batch, length, width = hidden.shape
        slots = rows.over(batch, length, hidden.device)
        flat = hidden.reshape(-1, width)
        if torch.is_grad_enabled() and hidden.requires_grad:
            keep = (slots != NOBODY).to(flat.dtype).unsqueeze(1)
            flat = flat + keep * bank[slots.clamp(min=0).long()]
        else:
            # A block that hands its input on unchanged must not have that input edited under its caller.
            if args and isinstance(args[0], torch.Tensor) and args[0].data_ptr() == flat.data_ptr():
                flat = flat.clone()
            ops.inject_(flat, bank, slots)
            if flat.data_ptr() == hidden.data_ptr():
                return None
        changed = flat.view(batch, length, width)
        return type(output)([changed, *output[1:]]) if isinstance(output, (tuple, list)) else changed
