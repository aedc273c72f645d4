"""Steering while decoding: what persona vectors at every block cost beside the model without them.

All contenders of a batch size take turns in one run, and every case is a view of it: what is compared with what. A
sample is the difference between a long and a short generation, as for `decode`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import personafast as pf
from benchmarks import machine
from benchmarks.bandwidth import reader
from benchmarks.case import Absent
from benchmarks.check import CheckFailed
from benchmarks.decode import HF, PROMPT, SHAPES, Generate, drawn, generator, model_bytes, per_token, sharing
from benchmarks.measure import READ, Measurement
from benchmarks.sampler import Sample, interleave
from benchmarks.views import Run, View
from personafast.models.anatomy import anatomy
from personafast.vectors import PersonaVector, blend

SHAPE = SHAPES[0]
VECTORS = 32
# A vector's numbers against those of the residual stream: enough to change what is said.
STRENGTH = 0.05

ATTACHED = "attached, no persona"
STOCK = "8 blends of 4, stock generate"
HOOKS = "steering-vectors' hooks, one vector for all rows"


def personas(count: int, vectors: int) -> str:
    return f"{count} blend{'s' if count > 1 else ''} of {vectors}"


VIEWS = (
    View(
        "steer-rows8",
        HF,
        {ATTACHED: None, personas(1, 4): 1 / 1.02, personas(8, 4): 1 / 1.02, STOCK: 1 / 1.02, HOOKS: None},
        rows=8,
    ),
    View("steer-rows8-attached", ATTACHED, {personas(8, 4): 1 / 1.02}, rows=8),
    View("steer-rows8-vectors", personas(8, 1), {personas(8, 4): None, personas(8, VECTORS): 1 / 1.02}, rows=8),
    View("steer-rows64-personas", personas(1, 4), {personas(8, 4): None, personas(64, 4): 1 / 1.02}, rows=64),
)


def directions(model: Any) -> dict[str, PersonaVector]:
    """Random vectors that act at every block."""
    shape = anatomy(model).shape
    drawn_from = torch.Generator().manual_seed(2)
    size = (shape.num_blocks, shape.hidden_size)
    return {
        f"trait{index}": PersonaVector(
            STRENGTH * torch.randn(size, generator=drawn_from), blocks=tuple(range(shape.num_blocks))
        )
        for index in range(VECTORS)
    }


@contextlib.contextmanager
def by_hand(model: Any, rows: torch.Tensor) -> Iterator[None]:
    """Plain hooks that add rows [blocks, B, hidden] at the output of every block."""

    def hook(row: torch.Tensor, _: Any, __: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        changed = hidden + row[:, None].to(hidden.dtype)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    hooks = [
        block.register_forward_hook(functools.partial(hook, row))
        for block, row in zip(anatomy(model).blocks, rows, strict=True)
    ]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()


class Contenders:
    """The models, and a way to decode with each contender."""

    def __init__(self, model: Any, ids: torch.Tensor, stack: contextlib.ExitStack) -> None:
        self.model, self.ids = model, ids
        self.library = pf.PersonaLibrary()
        self.vectors = directions(model)
        for name, vector in self.vectors.items():
            self.library.add_vector(name, vector)
        self.attached = sharing(model)
        self.handle = stack.enter_context(pf.attach(self.attached, self.library, max_personas=128))

    def batch(self, count: int, vectors: int) -> list[pf.Persona]:
        """A persona a row, `count` different ones, each a blend of its own of `vectors` vectors."""
        names = list(self.vectors)
        made = []
        for index in range(count):
            chosen = [names[(index + step) % VECTORS] for step in range(vectors)]
            # No two alike, also where there are more personas than vectors to begin with.
            made.append(pf.Persona(vectors={name: (1 + index / 64) / vectors for name in chosen}))
        return [made[row % count] for row in range(self.ids.shape[0])]

    def steered(self, count: int, vectors: int) -> Generate:
        return generator(
            self.attached, self.ids, custom_generate=self.handle.generate, personas=self.batch(count, vectors)
        )

    def stock(self, tokens: int) -> torch.Tensor:
        with self.handle.using(self.batch(8, 4)):
            return generator(self.attached, self.ids)(tokens)

    def hooks(self) -> Generate:
        try:
            from steering_vectors import SteeringVector
        except ImportError as error:
            raise Absent(f"steering-vectors is not installed ({error})") from None
        vector = self.vectors["trait0"].directions.to(torch.bfloat16)
        theirs, model = SteeringVector(dict(enumerate(vector))), self.model

        def run(tokens: int) -> torch.Tensor:
            with theirs.apply(model):
                return generator(model, self.ids)(tokens)

        return run

    def runners(self, names: Sequence[str]) -> tuple[dict[str, Generate], dict[str, str]]:
        """(ways to decode, why others are absent)."""
        known: dict[str, Any] = {
            HF: lambda: generator(self.model, self.ids),
            ATTACHED: lambda: generator(self.attached, self.ids, custom_generate=self.handle.generate),
            STOCK: lambda: self.stock,
            HOOKS: self.hooks,
        }
        for count in (1, 8, 64):
            for vectors in (1, 4, VECTORS):
                known[personas(count, vectors)] = functools.partial(self.steered, count, vectors)
        found: dict[str, Generate] = {}
        absent: dict[str, str] = {}
        for name in names:
            try:
                found[name] = known[name]()
            except Absent as why:
                absent[name] = str(why)
        return found, absent

    def check(self) -> None:
        """Logits of steered rows, against hooks that add the blends by hand, in bf16 and in float32.

        Raises:
            CheckFailed: ours are more than twice as far from float32 as the plain ones, or the vectors change nothing.
        """
        ids = self.ids[:8]
        chosen = self.batch(8, 4)[:8]
        rows = torch.stack([blend(self.vectors, persona.vectors) for persona in chosen], dim=1)
        exact_model = copy.deepcopy(self.model).float()
        plain = exact_model(ids).logits.double()
        with by_hand(exact_model, rows):
            exact = exact_model(ids).logits.double()
        del exact_model
        with by_hand(self.model, rows):
            usual = self.model(ids).logits.double()
        with self.handle.using(chosen):
            ours = self.attached(ids).logits.double()
        errors = [float((found - exact).abs().max()) for found in (ours, usual)]
        if not errors[0] <= 2 * errors[1] + 1e-6:
            raise CheckFailed(f"steered logits are off by {errors[0]:.3g}, plain hooks by {errors[1]:.3g}")
        if not float((exact - plain).abs().max()) > 10 * errors[0]:
            raise CheckFailed("the vectors change less than bf16 does: nothing is being compared")


@functools.cache
def measured(rows: int, tokens: int, rounds: int) -> Run:
    """All contenders of a batch size, timed in turns.

    Raises:
        CheckFailed: steered logits are wrong; nothing has been timed.
        Absent: the memory is not there.
    """
    if machine.available_memory() < 6 << 30:
        raise Absent("needs 6 GiB of memory")
    ids = torch.randint(5, SHAPE.config["vocab_size"], (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    wanted = dict.fromkeys(name for view in VIEWS if view.rows == rows for name in view.contenders)
    with contextlib.ExitStack() as stack, torch.no_grad():
        model = make()
        contenders = Contenders(model, ids, stack)
        contenders.check()
        runners, absent = contenders.runners(list(wanted))
        samples: dict[str, Sample] = {READ: lambda: statistics.median(reader().sample() for _ in range(9))}
        for name, runner in runners.items():
            samples[name] = functools.partial(per_token, runner, tokens)
        taken = interleave(samples, 0.0, min_rounds=rounds, max_rounds=rounds)
    read = [reader().nbytes / seconds / 1e9 for seconds in taken.pop(READ)]
    return Run(SHAPE, taken, absent, read, model_bytes(model), tokens)


def make() -> Any:
    return drawn(SHAPE)


def measure_steering(view: View, tokens: int, rounds: int) -> Measurement:
    """One view of the run; raises what `measured` does."""
    return measured(view.rows, tokens, rounds).seen_as(view)
