"""Steering at the blocks: what the rows of a batch carry is done to the residual stream after each block."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from torch._compile import _disable_dynamo

from personafast import ops
from personafast.errors import PersonafastError, UnsupportedModelError
from personafast.models.anatomy import Anatomy
from personafast.models.banks import DirectionBank, VectorBank
from personafast.models.places import Generation, Places, repeated
from personafast.models.steps import HeldSteps, Lane, RowSteps
from personafast.ops._inject import injected
from personafast.ops._steer import steered


class SteeredBlocks:
    """The hooks on the blocks of one model, and the banks they read.

    Attributes:
        decoder: the module that calls the blocks.
        adds: what is added, a row for every blend, block by block.
        directions: what the other operations steer along.
        rows: what the rows of the forward passes carry now, or None.
        generation: the call of the model's `generate` that is running, or None.
    """

    def __init__(self, model: nn.Module, parts: Anatomy, max_personas: int) -> None:
        self._model, self._blocks = model, parts.blocks
        self.decoder = _caller(model, parts.blocks[0])
        self._hidden = parts.shape.hidden_size
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
        decoder = self.decoder
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
        if rows is not None and rows.plain is not None and self.adds.device not in (None, rows.plain.device):
            rows.plain = rows.plain.to(self.adds.device)
        self.state = rows, None, {}

    @property
    def state(self) -> tuple[RowSteps | HeldSteps | None, Places | None, dict[Any, tuple[Lane, ...]]]:
        """What the pass that runs carries, and where its tokens stand: to be set again when it is computed again."""
        return self.rows, self._places, self._lanes

    @state.setter
    def state(self, state: tuple[RowSteps | HeldSteps | None, Places | None, dict[Any, tuple[Lane, ...]]]) -> None:
        self.rows, self._places, self._lanes = state

    @property
    def made(self) -> tuple[int, int]:
        """Changes whenever there is a bank that recordings from before do not know."""
        return self.adds.made, self.directions.made

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if isinstance(self.rows, RowSteps) and self.rows.shaped:
            place = _place_outside if torch.compiler.is_compiling() else SteeredBlocks._place
            place(self, args, kwargs)

    def _place(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = self.rows
        assert isinstance(rows, RowSteps)
        if kwargs.get("cu_seq_lens_q") is not None:
            raise PersonafastError(
                "personas: this pass packs several texts into a row, where positions and schedules have no meaning; "
                "give a row a text, or steps at all tokens"
            )
        self._lanes = {}
        own = None if self.generation is rows.prompts.outer else self.generation
        self._places = Places({**dict(zip(self._names, args, strict=False)), **kwargs}, own)
        # Refused here, before a block has put anything into the cache.
        rows.check(self._places)

    def _over(self, rows: RowSteps | HeldSteps, batch: int, length: int, device: torch.device) -> tuple[Lane, ...]:
        if not rows.shaped:
            return rows.over(batch, length, device, None)
        key = (batch, length, device)
        if key not in self._lanes:
            self._lanes[key] = rows.over(batch, length, device, self._places)
        return self._lanes[key]

    def _after(self, block: int, _: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if torch.compiler.is_compiling():
            if self.rows is None:
                return None
            return self._traced(block, output) if self.rows.plain is not None else _outside(self, block, args, output)
        return self._eager(block, args, output)

    def _traced(self, block: int, output: Any) -> Any:
        """Additions at all tokens, as operators that a compiler sees through; the personas are values of its graph."""
        rows, bank = self.rows, self.adds.at(block)
        assert isinstance(rows, RowSteps) and rows.plain is not None
        if bank is None:
            return None
        hidden = self._stream(output)
        batch, length, width = hidden.shape
        slots = repeated(rows.plain, batch, "personas")[:, None].expand(batch, length).reshape(-1)
        return _with_stream(output, injected(hidden.reshape(-1, width), bank, slots).view(batch, length, width))

    def _eager(self, block: int, args: tuple[Any, ...], output: Any) -> Any:
        rows = self.rows
        if rows is None or (rows.blocks is not None and block not in rows.blocks):
            return None
        hidden = self._stream(output)
        batch, length, width = hidden.shape
        lanes = self._over(rows, batch, length, hidden.device)
        flat = hidden.reshape(-1, width)
        out_of_place = torch.is_grad_enabled() and hidden.requires_grad
        acted = False
        for lane in lanes:
            if lane.blocks is not None and block not in lane.blocks:
                continue
            bank = (self.adds if lane.adds else self.directions).on(block, hidden.device)
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
        return _with_stream(output, flat.view(batch, length, width))

    def _stream(self, output: Any) -> torch.Tensor:
        """The residual stream [B, L, H] in what a block returns, alone or first among other things."""
        hidden = output[0] if isinstance(output, (tuple, list)) else output
        if not isinstance(hidden, torch.Tensor) or hidden.dim() != 3 or hidden.shape[2] != self._hidden:
            found = list(hidden.shape) if isinstance(hidden, torch.Tensor) else type(hidden).__name__
            raise UnsupportedModelError(
                f"model: a block of {type(self._model).__name__} returns {found}, expected [rows, tokens, "
                f"{self._hidden}]; vectors cannot be added there"
            )
        return hidden


# Called by a compiled model, it runs as it does in a model that is not: lanes and positions are worked out in Python.
_outside = _disable_dynamo(SteeredBlocks._eager)
_place_outside = _disable_dynamo(SteeredBlocks._place)


def _with_stream(output: Any, hidden: torch.Tensor) -> Any:
    """What a block returned, with another residual stream."""
    return type(output)([hidden, *output[1:]]) if isinstance(output, (tuple, list)) else hidden


def _caller(model: nn.Module, block: nn.Module) -> nn.Module:
    """The module whose forward goes through the list that holds `block`."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and any(part is block for part in child):
                return module
    return model
