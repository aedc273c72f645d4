"""From what a persona says about steering to steps of rows: blends are made, put into the banks, and given lanes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from personafast.errors import PersonafastError
from personafast.models.banks import ADDED, Lease, VectorBank
from personafast.models.steering import SteeredBlocks
from personafast.models.steps import END, Bound, Step, Steps, Window
from personafast.ops import SteerMode
from personafast.persona import Persona
from personafast.steering import FirstTokens, LinearSchedule, Steering
from personafast.vectors.blend import blend
from personafast.vectors.vector import PersonaVector

_MODES = {
    "ablate": SteerMode.ABLATE,
    "clamp": SteerMode.CLAMP,
    "norm_preserving": SteerMode.NORM_PRESERVING,
    "replace": SteerMode.REPLACE,
}
_SPANS: Mapping[str, tuple[tuple[Bound, Bound], ...]] = {
    "all": (((0, 0), (END, 0)),),
    "prompt": (((0, 0), (0, 1)),),
    # The last token of the prompt leads to the first generated one.
    "response": (((-1, 1), (END, 0)),),
    "last": (((-1, 1), (0, 1)),),
}


@dataclass(frozen=True)
class _Part:
    """A blend and its share of a bank's row."""

    step: Steering
    share: float


@dataclass(frozen=True)
class Recipe:
    """One step, not yet in a bank.

    Attributes:
        lane: as in `Step`.
        parts: blends whose sum is the bank's row; more than one only of an addition.
        window: where and how strongly it acts.
        use: as for `VectorBank.slot`.
        key: equal for recipes that share a row of the bank.
    """

    lane: int
    parts: tuple[_Part, ...]
    window: Window
    use: tuple[int, float, float]
    key: Hashable

    @property
    def adds(self) -> bool:
        """Whether it is an addition."""
        return self.lane % 2 == 0

    def row(self, vectors: Mapping[str, PersonaVector]) -> torch.Tensor:
        """The bank's row at every block, float32 [num_blocks, H].

        Raises:
            PersonafastError: as `blend`; an operation other than "add" whose direction is zero wherever it acts.
        """
        total: torch.Tensor | None = None
        for part in self.parts:
            step = part.step
            found = part.share * blend(vectors, step.vectors, blocks=step.blocks, normalize=step.normalize)
            total = found if total is None else total + found
        assert total is not None
        if not self.adds and not bool(total.any()):
            step = self.parts[0].step
            raise PersonafastError(
                f"steering: {step.operation!r} along {', '.join(map(repr, step.vectors))} has no direction: it is zero "
                "at every block it acts at; give other blocks or vectors"
            )
        return total


def recipes(persona: Persona | None, vectors: Mapping[str, PersonaVector]) -> list[Recipe]:
    """The steps of a persona. Additions that follow each other at the same tokens become one."""
    found: list[Recipe] = []
    for step in () if persona is None else persona.steps:
        window = window_of(step)
        before = found[-1] if found else None
        if step.operation == "add" and before is not None and before.adds and _together(before.window, window):
            # Strengths differ from blend to blend then, so they go into the row.
            parts = before.parts
            if len(parts) == 1:
                parts = (replace(parts[0], share=before.window.strength),)
            parts = (*parts, _Part(step, window.strength))
            key = tuple(_content(part.step, vectors, part.share) for part in parts)
            found[-1] = Recipe(before.lane, parts, replace(window, strength=1.0), ADDED, key)
            continue
        last = before.lane if before is not None else -1
        if step.operation == "add":
            lane, use = 2 * (last // 2 + 1), ADDED
        else:
            lane = last + 1 if last % 2 == 0 else last + 2
            low, high = step.range if step.operation == "clamp" else (1.0, 1.0)
            use = (int(_MODES[step.operation]), low, high)
        found.append(Recipe(lane, (_Part(step, 1.0),), window, use, (_content(step, vectors, 1.0), use)))
    return found


def place(personas: Sequence[Persona | None], vectors: Mapping[str, PersonaVector], to: SteeredBlocks) -> list[Steps]:
    """The steps of every row; blends that are not in the banks are put there.

    Raises:
        PersonafastError: a blend that cannot be made, or a bank that has fewer rows than the call needs beside those
            that are held (see `Lease`). The banks are as they were then.
    """
    plans: dict[int, list[Recipe]] = {}
    for persona in personas:
        if id(persona) not in plans:
            plans[id(persona)] = recipes(persona, vectors)
    every = [recipe for plan in plans.values() for recipe in plan]
    leases: dict[tuple[bool, Hashable], Lease] = {}
    new: list[tuple[VectorBank, Recipe, torch.Tensor]] = []
    for adds, bank in ((True, to.adds), (False, to.directions)):
        own = {recipe.key: recipe for recipe in every if recipe.adds is adds}
        known = {(adds, key): lease for key in own if (lease := bank.known(key)) is not None}
        _check_room(bank, len(own), len(known))
        leases |= known
        new += [(bank, recipe, recipe.row(vectors)) for key, recipe in own.items() if (adds, key) not in known]
    # All are made by now: a call that cannot be served leaves the banks as they were.
    for bank, recipe, row in new:
        leases[recipe.adds, recipe.key] = bank.put(recipe.key, row, recipe.use)
    placed: dict[int, Steps] = {}
    for who, plan in plans.items():
        steps = []
        for recipe in plan:
            bank, lease = to.adds if recipe.adds else to.directions, leases[recipe.adds, recipe.key]
            steps.append(Step(recipe.lane, lease.slot, bank.acts(lease.slot), recipe.window, lease))
        placed[who] = tuple(steps)
    return [placed[id(persona)] for persona in personas]


def window_of(step: Steering) -> Window:
    """The window of a step, of which schedules that end are a part."""
    positions, schedule = step.positions, step.schedule
    spans = _SPANS[positions] if isinstance(positions, str) else tuple(_bounds(*span) for span in positions)
    window = Window(spans, strength=step.strength)
    if isinstance(schedule, FirstTokens):
        return replace(window, first=schedule.tokens)
    if isinstance(schedule, LinearSchedule):
        return replace(window, start=schedule.start, end=schedule.end, steps=schedule.steps)
    return window


def _bounds(start: int, stop: int | None) -> tuple[Bound, Bound]:
    of_prompt = int(start < 0)
    if stop is None:
        return (start, of_prompt), (END, 0)
    return (start, of_prompt), (stop, int(of_prompt or stop < 0))


def _together(one: Window, other: Window) -> bool:
    return replace(one, strength=1.0) == replace(other, strength=1.0)


def _content(step: Steering, vectors: Mapping[str, PersonaVector], share: float) -> Hashable:
    # By the vectors themselves: one replaced in the library under its old name, or written to in place, must not come
    # from the bank.
    blended = tuple((vectors[name], vectors[name].version, c) for name, c in sorted(step.vectors.items()))
    return blended, step.blocks, step.normalize, share


def _check_room(bank: VectorBank, needed: int, known: int) -> None:
    held = len(bank.in_use) - known
    if needed + held > bank.capacity:
        others = f" beside {held} of personas in force and of texts that are being written" if held else ""
        raise PersonafastError(
            f"personas: this call needs {needed} rows of the bank, one for each different blend or operation"
            f"{others}, and it has {bank.capacity}; attach with a larger max_personas"
        )
