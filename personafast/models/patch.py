"""What `attach` plugs into a model: steering at the blocks, masks and LoRA updates at the linears.

Every row of a batch carries small integers: a slot for each step of steering, a mask slot and an adapter slot, -1 for
none. They index banks that live beside the model, so changing who speaks in a row changes no weight.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from personafast import ops
from personafast.errors import UnsupportedModelError
from personafast.models.anatomy import Anatomy, is_conv1d
from personafast.models.attention import AttentionPatch
from personafast.models.banks import AdapterBank
from personafast.models.batching import BatchingNote
from personafast.models.compressed import CompressedWeight
from personafast.models.mlps import find_mlps, gated
from personafast.models.norms import find_norms
from personafast.models.recomputing import Recomputing
from personafast.models.rows import DeviceSlots, RowSlots, Spread
from personafast.models.steering import SteeredBlocks
from personafast.ops._rms_norm import run_kernel, serves

if TYPE_CHECKING:
    from personafast.models.graphs import CudaGraph, Tape
    from personafast.models.static_context import StaticContext

# Contexts of fixed size that wait for the next text: each holds the keys and values of its rows.
_CONTEXTS = 4
# Their capacities are multiples of this, so that texts of about one length share them.
_STEP = 256


def _is_stock(linear: nn.Module) -> bool:
    """Whether a linear computes what nn.Linear does, and nobody else has replaced its forward."""
    return type(linear).forward is nn.Linear.forward and "forward" not in linear.__dict__


def _plain(linear: nn.Module, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - nn.Linear's name for it
    # Straight from the dictionary: nn.Module's attribute lookup costs as much as a small layer's share of the memory.
    parameters = linear._parameters
    weight = parameters.get("weight")
    if weight is None or "bias" not in parameters:  # pruned or parametrised: made anew from other parameters
        layer: Any = linear
        return ops.linear(input, layer.weight, layer.bias)
    return ops.linear(input, weight, parameters["bias"])


def _norm(norm: nn.Module, eps: str, hidden_states: torch.Tensor, *gates: Any, **named: Any) -> Any:
    weight = norm._parameters.get("weight")
    # Some norms of recurrent layers also take a gate.
    if weight is not None and not gates and not named and serves(hidden_states, weight):
        return run_kernel(hidden_states, weight, norm.__dict__[eps])
    # Its own, not our torch form: the trial allows for a last bit, identity under the reference backend does not.
    return type(norm).forward(norm, hidden_states, *gates, **named)


def model_bytes(model: nn.Module) -> int:
    """Bytes of weights that a forward pass reads: every parameter in memory once, but of an embedding only rows."""
    inputs: Any = getattr(model, "get_input_embeddings", lambda: None)()
    outputs: Any = getattr(model, "get_output_embeddings", lambda: None)()
    table = getattr(inputs, "weight", None)
    tied = table is not None and table is getattr(outputs, "weight", None)
    return sum(
        parameter.numel() * parameter.element_size()
        for parameter in model.parameters()
        if not parameter.is_meta and (tied or parameter is not table)
    )


def check_in_memory(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` when no weight is in memory and nothing (accelerate) brings it there for a pass."""
    away = all(parameter.is_meta for parameter in model.parameters())
    if away and not any(hasattr(part, "_hf_hook") for part in model.modules()):
        raise UnsupportedModelError(
            f"model: no weight of {type(model).__name__} is in memory (meta: not loaded); load it, or offload it with "
            "a device_map"
        )


class Patch:
    """The hooks on one model, and the banks they read."""

    def __init__(self, model: nn.Module, parts: Anatomy, max_personas: int) -> None:
        self.model = model
        self.parts = parts
        self.steering = SteeredBlocks(model, parts, max_personas)
        self.compressed: dict[str, CompressedWeight] = {}
        self._masks: dict[str, torch.Tensor] = {}
        self._adapters: dict[str, AdapterBank] = {}
        # What records passes, or None: see `use_graphs`.
        self._recorder: type[CudaGraph] | type[Tape] | None = None
        self._contexts: list[StaticContext] = []
        self._banks_set = 0
        self._now: Mapping[str, Spread] = {}
        self._shape = (0, 0)
        self._speakers = 0
        self._hooks: list[Any] = []
        self._recomputing = Recomputing(self, (self.steering.decoder, *parts.blocks))
        self.attention: AttentionPatch | None = None
        self._batching: BatchingNote | None = None
        # Linear -> the forward it had of its own, if any, and ours.
        self._patched: dict[nn.Module, tuple[Any, Any]] = {}

    def install(self) -> None:
        """Hook the blocks, and let the plain linears read their weights by our kernels.

        Hooks and forwards are partials of methods, not closures: a deep copy of the model gets a patch of its own.
        """
        check_in_memory(self.model)
        self._hooks.append(self.steering.decoder.register_forward_pre_hook(self._begin))
        first = self.parts.blocks[0]
        self._hooks.append(first.register_forward_pre_hook(self._note_shape, with_kwargs=True))
        self.steering.install()
        for path, linear in self.parts.linears.items():
            if _is_stock(linear):
                self._patch_linear(path)
        head = self.parts.head
        if head is not None and _is_stock(head) and head not in self._patched:
            self._replace_forward(head, functools.partial(_plain, head))
        self.attention = AttentionPatch(self.model)
        self._batching = BatchingNote(self)
        for norm, eps in find_norms(self.model):
            self._replace_forward(norm, functools.partial(_norm, norm, eps))
        for mlp in find_mlps(self.model):
            self._replace_forward(mlp, functools.partial(gated, mlp))

    def remove(self) -> bool:
        """Take everything out again; the model is as it was, bit for bit.

        Returns:
            Whether dense weights had been given up: what their mask dropped is zero now.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self.steering.remove()
        self._recomputing.remove()
        if self._batching is not None:
            self._batching.remove()
            self._batching = None
        if self.attention is not None:
            self.attention.remove()
            self.attention = None
        for linear, (previous, ours) in self._patched.items():
            if linear.__dict__.get("forward") is not ours:
                continue  # somebody else has wrapped it since; without personas it is the plain linear inside theirs
            if previous is None:
                del linear.forward
            else:
                linear.forward = previous
        self._patched.clear()
        lost = bool(self.compressed)
        for path, compressed in self.compressed.items():
            compressed.put_back(self.parts.linears[path])
        self.compressed.clear()
        return lost

    def set_masks(self, banks: Mapping[str, torch.Tensor]) -> None:
        """Give each linear its masks, module path -> int32 [P, out, ceil(in / 32)].

        Raises:
            UnsupportedModelError: the linear's weight is quantised or transposed.
        """
        self._check_maskable(banks)
        self._masks = {
            path: bank.to(self.parts.linears[path].weight.device)  # type: ignore[arg-type]
            for path, bank in banks.items()
        }
        for path in banks:
            self._patch_linear(path)
        self._banks_set += 1

    def compress(self, words: Mapping[str, torch.Tensor]) -> None:
        """Keep only what one mask keeps, module path -> int32 [out, ceil(in / 32)]; the dense weights are freed.

        Raises:
            UnsupportedModelError: a weight is quantised, transposed or also that of another module; nothing is freed.
        """
        self._check_maskable(words)
        for path in words:
            if self.parts.linears[path]._parameters.get("weight") is None:
                raise UnsupportedModelError(
                    f"keep_dense: the weight of {path} is computed from other parameters (pruned or parametrised), "
                    "which would stay; make it a parameter of its own or use keep_dense=True"
                )
        owners = Counter(id(parameter) for part in self.model.modules() for parameter in part._parameters.values())
        for path in words:
            if owners[id(self.parts.linears[path].weight)] > 1:
                raise UnsupportedModelError(
                    f"keep_dense: {path} shares its weight with another module, which needs it; use keep_dense=True"
                )
        for path, mask in words.items():
            self.compressed[path] = CompressedWeight.take(self.parts.linears[path], mask)
            self._patch_linear(path)
        self._banks_set += 1

    def _check_maskable(self, paths: Collection[str]) -> None:
        if paths:
            # Their fused kernels read weights past the linears that hold them.
            self.parts.check_attention_only("masks")
        for path in paths:
            linear = self.parts.linears[path]
            weight = getattr(linear, "weight", None)
            if not isinstance(weight, torch.Tensor):
                raise UnsupportedModelError(
                    f"masks: {path} is {type(linear).__name__} without a weight of its own name (packed by a "
                    "quantiser); masks need nn.Linear in fp32, bf16 or fp16"
                )
            if is_conv1d(linear) or not weight.is_floating_point() or weight.dtype.itemsize == 1:
                raise UnsupportedModelError(
                    f"masks: {path} is {type(linear).__name__} of {weight.dtype}; masks need nn.Linear in "
                    "fp32, bf16 or fp16"
                )
            scale = next((name for name in (*linear._parameters, *linear._buffers) if "scale" in name), None)
            if scale is not None:
                raise UnsupportedModelError(
                    f"masks: {path} is {type(linear).__name__} with a {scale}, quantised; masks need nn.Linear in "
                    "fp32, bf16 or fp16"
                )
            if type(weight) not in (torch.Tensor, nn.Parameter):
                raise UnsupportedModelError(
                    f"masks: the weight of {path} is a {type(weight).__name__}; masks need a plain tensor"
                )
            if weight.is_meta:
                raise UnsupportedModelError(
                    f"masks: the weight of {path} is not in memory (meta: offloaded or not loaded); load the "
                    "model whole"
                )

    def set_adapters(self, adapters: Sequence[Mapping[str, tuple[torch.Tensor, torch.Tensor, float]]]) -> None:
        """Give the linears these adapters; the slot of an adapter is its index."""
        paths = sorted({path for adapter in adapters for path in adapter})
        if paths:
            self.parts.check_attention_only("policies")
        self._adapters = {
            path: AdapterBank.stack(self.parts.linears[path], [adapter.get(path) for adapter in adapters])
            for path in paths
        }
        for path in paths:
            self._patch_linear(path)
        self._banks_set += 1

    def use_graphs(self, recorder: type[CudaGraph] | type[Tape] | None) -> None:
        """Let decoding record its passes with this and replay them; None calls the model for every pass."""
        self._recorder = recorder
        self._contexts.clear()

    def static_context(self, rows: int, capacity: int, device: torch.device) -> StaticContext | None:
        """A context of fixed size for some rows of up to `capacity` tokens, with the recordings of earlier texts.

        None where passes are not recorded, or the model attends in a way of its own. Give it back with `give_back`.
        """
        if self._recorder is None:
            return None
        from personafast.models.row_attention import understood
        from personafast.models.static_context import StaticContext

        if not understood(self.model):
            return None
        capacity = -(-capacity // _STEP) * _STEP
        found = next((c for c in self._contexts if c.seats == rows and c.cache.capacity == capacity), None)
        if found is not None:
            self._contexts.remove(found)
        else:
            found = StaticContext(self.model, rows, capacity, device, self._recorder)
        # A recording knows the addresses of the banks.
        found.banks_are((self._banks_set, *self.steering.made))
        return found

    def give_back(self, context: StaticContext) -> None:
        """Keep a context for the next text of its size; the one that was used longest ago goes."""
        self._contexts.append(context)
        del self._contexts[:-_CONTEXTS]

    @contextlib.contextmanager
    def rows(self, slots: RowSlots | DeviceSlots) -> Iterator[None]:
        """Let the rows of every forward pass inside the `with` carry these slots."""
        before = self._now, self.steering.rows, self._speakers
        self._now = slots.of_linears
        if isinstance(slots, RowSlots):
            self._speakers = len(slots.masks)
        self.steering.carry(slots.of_blocks)
        try:
            yield
        finally:
            self._now, _, self._speakers = before
            self.steering.carry(before[1])

    @property
    def speakers(self) -> int:
        """How many rows the personas in force were given for; 0 when nobody speaks."""
        return self._speakers if self._now or self.steering.rows is not None else 0

    @property
    def carried(self) -> tuple[Any, ...]:
        """What the pass that runs carries at blocks and linears; all of it is false when nobody speaks."""
        state = self.steering.state
        return self._now, state if state[0] is not None else None, self._shape if self._now else None

    @contextlib.contextmanager
    def carrying(self, carried: tuple[Any, ...]) -> Iterator[None]:
        """Let what is computed inside the `with` carry what a pass carried."""
        before = self._now, self.steering.state, self._shape
        now, state, shape = carried
        self._now, self.steering.state, self._shape = now, state or (None, None, {}), shape or self._shape
        try:
            yield
        finally:
            self._now, self.steering.state, self._shape = before

    def bytes_read(self, slots: RowSlots) -> int:
        """Estimated bytes of weights that a forward pass of these rows reads: the model once, and its adapters."""
        known = slots.of_linears.get("adapters")
        adapters = known.used if known is not None else set()
        factors = sum(
            (bank.a[0].numel() + bank.b[0].numel()) * bank.a.element_size() for bank in self._adapters.values()
        )
        return model_bytes(self.model) + len(adapters) * factors

    def _begin(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self._recomputing.begin()

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

    def _patch_linear(self, path: str) -> None:
        linear = self.parts.linears[path]
        if linear in self._patched:
            return
        plain = functools.partial(_plain, linear) if _is_stock(linear) else linear.forward
        self._replace_forward(linear, functools.partial(self._linear, path, linear, plain))

    def _replace_forward(self, linear: nn.Module, forward: Any) -> None:
        self._patched[linear] = (linear.__dict__.get("forward"), forward)
        linear.forward = forward

    def _linear(
        self,
        path: str,
        linear: nn.Module,
        plain: Callable[[torch.Tensor], torch.Tensor],
        input: torch.Tensor,  # noqa: A002 - nn.Linear's name for it
    ) -> torch.Tensor:
        x = input
        compressed = self.compressed.get(path)
        if compressed is not None:
            out: torch.Tensor | None = compressed(x, linear._parameters["bias"])
        elif not self._now:
            return plain(x)
        else:
            out = self._masked(path, linear, x)
        if out is None:
            out = plain(x)
        return self._adapted(path, x, out)

    def _masked(self, path: str, linear: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
        rows, bank = self._now.get("masks"), self._masks.get(path)
        if rows is None or bank is None:
            return None
        if bank.device != x.device:  # the model was moved
            bank = self._masks[path] = bank.to(x.device)
            self._banks_set += 1
        slots = rows.over(*self._rows_and_tokens(x), x.device)
        layer: Any = linear
        flat = ops.masked_linear(x.reshape(-1, x.shape[-1]), layer.weight, bank, slots, None, layer.bias)
        return flat.view(*x.shape[:-1], -1)

    def _adapted(self, path: str, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        rows, bank = self._now.get("adapters"), self._adapters.get(path)
        if rows is None or bank is None:
            return out
        slots = rows.over(*self._rows_and_tokens(x), x.device)
        return bank.add_(out, x, slots)
