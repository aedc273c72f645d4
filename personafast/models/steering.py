"""Steering at the blocks: what the rows of a batch carry is done to the residual stream after each block."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

from personafast import ops
from personafast.models.anatomy import Anatomy
from personafast.models.banks import DirectionBank, VectorBank
from personafast.models.places import Generation, Places
from personafast.models.steps import HeldSteps, Lane, RowSteps
from personafast.ops._inject import injected
from personafast.ops._steer import steered


class SteeredBlocks:
    """The hooks on the blocks of one model, and the banks they read.

    Attributes:
        adds: what is added, a row for every blend, block by block.
        directions: what the other operations steer along.
        rows: what the rows of the forward passes carry now, or None.
        generation: the call of the model's `generate` that is running, or None.
    """

    def __init__(self, model: nn.Module, parts: Anatomy, max_personas: int) -> None:
        self._model, self._blocks = model, parts.blocks
        self.adds = VectorBank(parts, max_personas)
        self.directions = DirectionBank(parts, max_personas)
        self.rows: RowSteps | HeldSteps | None = None
        self.generation: Generation | None = None
        self._hooks: list[Any] = []
        self._names: tuple[str, ...] = ()
        # Of the pass that runs: where its tokens stand, and the lanes by (batch, length, device).
        self._places: Places | None = None
        self._lanes: dict[Any, tuple[Lane, ...]] = {}

    def install(self) -> None:
        """Hook the blocks, and the module that calls them, which knows masks and positions.

        Hooks are partials of methods, not closures: a deep copy of the model gets a steering of its own.
        """
        decoder = _caller(self._model, self._blocks[0])
        self._names = tuple(inspect.signature(decoder.forward).parameters)
        self._hooks.append(decoder.register_forward_pre_hook(self._begin, with_kwargs=True))
        for index, block in enumerate(self._blocks):
            self._hooks.append(block.register_forward_hook(functools.partial(self._after, index)))

    def remove(self) -> None:
        """Take the hooks out again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def carry(self, rows: RowSteps | HeldSteps | None) -> None:
        """Let the forward passes from now on carry these steps."""
        self.rows, self._places = rows, None
        self._lanes.clear()

    @property
    def made(self) -> tuple[int, int]:
        """Changes whenever there is a bank that recordings from before do not know."""
        return self.adds.made, self.directions.made

    def used(self, adds: bool) -> set[int]:
        """Slots of a bank that the rows in force use."""
        return set() if self.rows is None else self.rows.used(adds)

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(self.rows, RowSteps) and self.rows.shaped:
            self._lanes.clear()
            own = None if self.generation is self.rows.prompts.outer else self.generation
            self._places = Places({**dict(zip(self._names, args, strict=False)), **kwargs}, own)
            # Refused here, before a block has put anything into the cache.
            self.rows.check(self._places)

    def _over(self, rows: RowSteps | HeldSteps, batch: int, length: int, device: torch.device) -> tuple[Lane, ...]:
        if not rows.shaped:
            return rows.over(batch, length, device, None)
        key = (batch, length, device)
        if key not in self._lanes:
            self._lanes[key] = rows.over(batch, length, device, self._places)
        return self._lanes[key]

    def _after(self, block: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        rows = self.rows
        if rows is None or (rows.blocks is not None and block not in rows.blocks):
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        batch, length, width = hidden.shape
        lanes = self._over(rows, batch, length, hidden.device)
        flat = hidden.reshape(-1, width)
        out_of_place = torch.is_grad_enabled() and hidden.requires_grad
        acted = False
        for lane in lanes:
            if lane.blocks is not None and block not in lane.blocks:
                continue
            bank = (self.adds if lane.adds else self.directions).at(block)
            if bank is None:
                continue
            if not acted and not out_of_place:
                # A block that hands its input on unchanged must not have that input edited under its caller.
                if args and isinstance(args[0], torch.Tensor) and args[0].data_ptr() == flat.data_ptr():
                    flat = flat.clone()
            acted = True
            if lane.adds:
                if out_of_place:
                    flat = injected(flat, bank, lane.slots, lane.scale)
                else:
                    ops.inject_(flat, bank, lane.slots, lane.scale)
            else:
                mode, params = self.directions.settings(block)
                if out_of_place:
                    flat = steered(flat, bank, lane.slots, mode, params, lane.scale)
                else:
                    ops.steer_(flat, bank, lane.slots, mode, params, lane.scale)
        if not acted or flat.data_ptr() == hidden.data_ptr():
            return None
        changed = flat.view(batch, length, width)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed


def _caller(model: nn.Module, block: nn.Module) -> nn.Module:
    """The module whose forward goes through the list that holds `block`."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and any(part is block for part in child):
                return module
    return model
