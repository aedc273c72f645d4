"""What `attach` plugs into a model: residual injection at the blocks, masks and LoRA updates at the linears.

Every row of a batch carries three small integers: a vector slot, a mask slot and an adapter slot, -1 for none. They
index banks that live beside the model, so changing who speaks in a row changes no weight and allocates nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from personafast import ops
from personafast.errors import PersonafastError, UnsupportedModelError
from personafast.models.anatomy import Anatomy, is_conv1d

NOBODY = -1


class _TokenSlots:
    """The slots of one kind, spread over the tokens of a forward pass of any length."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows
        self._spread: dict[tuple[int, int, torch.device], torch.Tensor] = {}

    @property
    def used(self) -> set[int]:
        """The slots that rows carry."""
        return set(self._rows.tolist()) - {NOBODY}

    def over(self, batch: int, length: int, device: torch.device) -> torch.Tensor:
        """Slots [batch * length], row-major. A batch that is a multiple of the rows (beams) repeats each row."""
        key = (batch, length, device)
        if key not in self._spread:
            rows = self._rows.numel()
            if rows == 0 or batch % rows:
                raise PersonafastError(
                    f"personas: {rows} given for a batch of {batch} rows; give one a row (None for none)"
                )
            self._spread[key] = self._rows.repeat_interleave(batch // rows * length).to(device)
        return self._spread[key]


@dataclass(frozen=True)
class RowSlots:
    """Slots of the rows of a batch, each int32 [R] on the CPU; -1 leaves a row alone.

    Spread over tokens they are kept with the object, so that all steps of a decoding loop share one tensor a kind.
    """

    vectors: torch.Tensor
    masks: torch.Tensor
    adapters: torch.Tensor

    @classmethod
    def of(cls, vectors: Sequence[int], masks: Sequence[int], adapters: Sequence[int]) -> RowSlots:
        """From plain integers."""
        return cls(*(torch.tensor(list(slots), dtype=torch.int32) for slots in (vectors, masks, adapters)))

    def select(self, rows: torch.Tensor) -> RowSlots:
        """The slots of some of the rows."""
        return RowSlots(self.vectors[rows], self.masks[rows], self.adapters[rows])

    @cached_property
    def by_kind(self) -> dict[str, _TokenSlots]:
        """The kinds that any row uses."""
        kinds = {"vectors": self.vectors, "masks": self.masks, "adapters": self.adapters}
        return {kind: _TokenSlots(slots) for kind, slots in kinds.items() if bool((slots != NOBODY).any())}


class VectorBank:
    """One row a persona and block: bank[block][slot] is what a row with that slot gets added."""

    def __init__(self, parts: Anatomy, capacity: int) -> None:
        self.capacity = capacity
        self._blocks = parts.blocks
        self._hidden = parts.shape.hidden_size
        self._banks: dict[int, torch.Tensor] = {}
        self._slots: dict[object, int] = {}

    def slot(self, key: object, make: Callable[[], torch.Tensor], in_use: set[int]) -> int:
        """The slot of a blend, filled by `make() -> [num_blocks, H]` when new; if full, one not `in_use` goes."""
        if key in self._slots:
            self._slots[key] = self._slots.pop(key)  # the last used stand last
            return self._slots[key]
        rows = make()
        if len(self._slots) < self.capacity:
            slot = len(self._slots)
        else:
            oldest = next((known for known, used in self._slots.items() if used not in in_use), None)
            if oldest is None:
                raise PersonafastError(
                    f"personas: more than {self.capacity} different vector blends in one call; "
                    "attach with a larger max_personas"
                )
            slot = self._slots.pop(oldest)
        for block, row in enumerate(rows):
            if block in self._banks or bool(row.any()):
                self._bank(block)[slot].copy_(row)
        self._slots[key] = slot
        return slot

    def at(self, block: int) -> torch.Tensor | None:
        """The bank [S, H] of a block, or None when no blend acts there."""
        return self._banks.get(block)

    def _bank(self, block: int) -> torch.Tensor:
        if block not in self._banks:
            home = next(p for p in self._blocks[block].parameters())
            dtype = home.dtype if home.is_floating_point() else torch.bfloat16
            self._banks[block] = torch.zeros(self.capacity, self._hidden, dtype=dtype, device=home.device)
        return self._banks[block]


@dataclass(frozen=True)
class AdapterBank:
    """The LoRA factors of all adapters of one linear: A [M, R, in], B [M, out, R], scale [M], ranks [M]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: torch.Tensor
    ranks: torch.Tensor

    @classmethod
    def stack(
        cls, linear: nn.Module, factors: Sequence[tuple[torch.Tensor, torch.Tensor, float] | None]
    ) -> AdapterBank:
        """Stack (A, B, scale) of every adapter, None for one that leaves this linear alone."""
        weight = linear.weight
        assert isinstance(weight, torch.Tensor)
        dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
        present = [f for f in factors if f is not None]
        rank = max(f[0].shape[0] for f in present)
        a = torch.zeros(len(factors), rank, present[0][0].shape[1], dtype=dtype)
        # A view of [M, R, out]: that layout is what one product over all adapters reads.
        b = torch.zeros(len(factors), rank, present[0][1].shape[0], dtype=dtype).transpose(1, 2)
        scale = torch.zeros(len(factors), dtype=torch.float32)
        ranks = torch.zeros(len(factors), dtype=torch.int32)
        for slot, factor in enumerate(factors):
            if factor is not None:
                r = factor[0].shape[0]
                a[slot, :r], b[slot, :, :r] = factor[0], factor[1]
                scale[slot], ranks[slot] = factor[2], r
        return cls(*(tensor.to(weight.device) for tensor in (a, b, scale, ranks)))


class Patch:
    """The hooks on one model, and the banks they read."""

    def __init__(self, model: nn.Module, parts: Anatomy, max_personas: int) -> None:
        self.model = model
        self.parts = parts
        self.vectors = VectorBank(parts, max_personas)
        self._masks: dict[str, torch.Tensor] = {}
        self._adapters: dict[str, AdapterBank] = {}
        self._now: dict[str, _TokenSlots] = {}
        self._shape = (0, 0)
        self._hooks: list[Any] = []
        self._patched: dict[str, Any] = {}

    def install(self) -> None:
        """Hook the blocks. Linears are patched when a mask or an adapter needs them."""
        first = self.parts.blocks[0]
        self._hooks.append(first.register_forward_pre_hook(self._note_shape, with_kwargs=True))
        for index, block in enumerate(self.parts.blocks):
            self._hooks.append(block.register_forward_hook(self._injector(index)))

    def remove(self) -> None:
        """Take everything out again; the model is as it was, bit for bit."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for path, previous in self._patched.items():
            linear = self.parts.linears[path]
            if previous is None:
                del linear.forward
            else:
                linear.forward = previous
        self._patched.clear()

    def set_masks(self, banks: Mapping[str, torch.Tensor]) -> None:
        """Give each linear its masks, module path -> int32 [P, out, ceil(in / 32)].

        Raises:
            UnsupportedModelError: the linear's weight is quantised or transposed.
        """
        for path in banks:
            linear = self.parts.linears[path]
            weight = linear.weight
            assert isinstance(weight, torch.Tensor)
            if is_conv1d(linear) or not weight.is_floating_point():
                raise UnsupportedModelError(
                    f"masks: {path} is {type(linear).__name__} of {weight.dtype}; masks need nn.Linear in "
                    "fp32, bf16 or fp16"
                )
        self._masks = {
            path: bank.to(self.parts.linears[path].weight.device)  # type: ignore[arg-type]
            for path, bank in banks.items()
        }
        for path in banks:
            self._patch_linear(path)

    def set_adapters(self, adapters: Sequence[Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]]) -> None:
        """Give the linears these adapters; the slot of an adapter is its index."""
        paths = sorted({path for adapter in adapters for path in adapter})
        self._adapters = {
            path: AdapterBank.stack(self.parts.linears[path], [adapter.get(path) for adapter in adapters])
            for path in paths
        }
        for path in paths:
            self._patch_linear(path)

    @contextlib.contextmanager
    def rows(self, slots: RowSlots) -> Iterator[None]:
        """Let the rows of every forward pass inside the `with` carry these slots."""
        before = self._now
        self._now = slots.by_kind
        try:
            yield
        finally:
            self._now = before

    @property
    def vector_slots(self) -> set[int]:
        """Vector slots that the rows in force use."""
        rows = self._now.get("vectors")
        return set() if rows is None else rows.used

    def _note_shape(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if isinstance(hidden, torch.Tensor) and hidden.dim() == 3:
            self._shape = (hidden.shape[0], hidden.shape[1])

    def _rows_and_tokens(self, x: torch.Tensor) -> tuple[int, int]:
        """(rows, tokens a row) of a linear's input; some families flatten the two into one dimension."""
        if x.dim() == 3:
            return x.shape[0], x.shape[1]
        if x.dim() == 2 and x.shape[0] == self._shape[0] * self._shape[1]:
            return self._shape
        raise UnsupportedModelError(
            f"model: a linear was called with shape {list(x.shape)}, which does not tell the rows of the batch apart; "
            "leave this linear out of the mask or the policy"
        )

    def _injector(self, block: int) -> Callable[..., Any]:
        def inject(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            rows = self._now.get("vectors")
            if rows is None:
                return None
            bank = self.vectors.at(block)
            if bank is None:
                return None
            hidden = output[0] if isinstance(output, tuple) else output
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
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        return inject

    def _patch_linear(self, path: str) -> None:
        if path in self._patched:
            return
        linear = self.parts.linears[path]
        self._patched[path] = linear.__dict__.get("forward")
        linear.forward = self._persona_linear(path, linear, linear.forward)

    def _persona_linear(
        self, path: str, linear: nn.Module, plain: Callable[[torch.Tensor], torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            if not self._now:
                return plain(x)
            out = self._masked(path, linear, x)
            if out is None:
                out = plain(x)
            return self._adapted(path, x, out)

        return forward

    def _masked(self, path: str, linear: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        rows, bank = self._now.get("masks"), self._masks.get(path)
        if rows is None or bank is None:
            return None
        slots = rows.over(*self._rows_and_tokens(x), x.device)
        layer: Any = linear
        flat = ops.masked_linear(x.reshape(-1, x.shape[-1]), layer.weight, bank, slots, None, layer.bias)
        return flat.view(*x.shape[:-1], -1)

    def _adapted(self, path: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        rows, bank = self._now.get("adapters"), self._adapters.get(path)
        if rows is None or bank is None:
            return out
        slots = rows.over(*self._rows_and_tokens(x), x.device)
        flat = out.reshape(-1, out.shape[-1])
        ops.lora_delta_(flat, x.reshape(-1, x.shape[-1]), bank.a, bank.b, slots, bank.scale, bank.ranks)
        return flat.view(out.shape)
