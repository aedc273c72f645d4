"""The `Scorer` over patched Hugging Face models: members that share a model are rows of one batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from personafast.density.group import Group
from personafast.density.host import Host, judge, send
from personafast.density.transcript import GenerationStats
from personafast.errors import PersonafastError
from personafast.models.patch import Patch
from personafast.models.steps import NOBODY, Steps

# Whether models of one row run side by side on a GPU; in turn otherwise, as always on a CPU.
FORK = True


@dataclass(frozen=True)
class Member:
    """One distribution that takes part in a row: a prompt, and what is switched on in a model.

    Attributes:
        prompt: its token ids; members of one row may differ in it.
        steps: of steering, which live in the model's banks.
        mask, adapter: slots of the model's banks, -1 for none.
        patch: the model with its banks; None for the one the scorer was made for.
        name: what an error calls it.
        written: how many tokens at the end of `prompt` were generated.
    """

    prompt: list[int]
    steps: Steps
    mask: int
    adapter: int
    patch: Patch | None = None
    name: str = field(default="the reference", compare=False)
    written: int = 0

    @property
    def steered(self) -> bool:
        """Whether steering, a mask or an adapter sets it apart from the plain model."""
        return bool(self.steps) or not self.mask == self.adapter == NOBODY


class _Seats:
    """Members of one model, what they are in the rows of the batch, and their common cache.

    Attributes:
        row, index: int64 [F] on the CPU, every member's row and what it is there: its policy's index, or -1.
    """

    def __init__(
        self, patch: Patch, stats: GenerationStats, device: torch.device, room: int | None, host: Host | None
    ) -> None:
        self._make = (patch, stats, device, room)
        self._device, self._host = device, host
        self._members: list[Member] = []
        self._row: list[int] = []
        self._index: list[int] = []
        self._checked = False

    def add(self, member: Member, row: int, index: int) -> None:
        """Seat a member: policy `index` of `row`, or -1 for its reference."""
        self._members.append(member)
        self._row.append(row)
        self._index.append(index)

    def close(self) -> None:
        """All members are here: make their group."""
        patch, stats, device, room = self._make
        self.group = Group(
            patch,
            [member.prompt for member in self._members],
            [(member.steps, member.mask, member.adapter) for member in self._members],
            stats,
            device,
            room,
            [member.written for member in self._members],
        )
        self._seat(torch.tensor(self._row, dtype=torch.long), torch.tensor(self._index, dtype=torch.long))

    def logits(self, draft: torch.Tensor, keep: int) -> torch.Tensor:
        """Logits of the members after the rows' drafts, [F, keep, V]; the first ones of all must be numbers."""
        logits = self.group.logits(draft[self.row if draft.is_cpu else self.there], keep)
        if not self._checked:
            self._checked = True
            wrong = (logits.isnan() | (logits == torch.inf)).flatten(1).any(dim=1)
            if self._host is None:
                judge(wrong, self._not_finite)
            else:
                self._host.expect(wrong, self._not_finite)
        return logits

    def place(self, logits: torch.Tensor, reference: torch.Tensor | None, policies: torch.Tensor) -> None:
        """Put the group's logits [F, j, V] where they belong in [B, j, V] and [N, B, j, V]."""
        if self._of_references is None:
            policies[self._index_there, self.there] = logits
            return
        seats, row, index = self._of_policies
        policies[index, row] = logits[seats]
        if reference is not None:
            seats, row = self._of_references
            reference[row] = logits[seats]

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """Where this model runs while others do."""
        return torch.cuda.Stream(self._device)

    def keep(self, new: torch.Tensor) -> bool:
        """Go on with the rows that have a new index, int64 [B]; whether any member is left."""
        left = (new[self.row] >= 0).nonzero().flatten()
        if not left.numel():
            return False
        self.group.keep(left)
        self._seat(new[self.row[left]], self.index[left])
        return True

    def _seat(self, row: torch.Tensor, index: torch.Tensor) -> None:
        """Say which rows the members are in, and send it to where their logits are."""
        self.row, self.index = row, index
        self.there, self._index_there = send(row, self._device), send(index, self._device)
        policies, references = (index >= 0).nonzero().flatten(), (index < 0).nonzero().flatten()
        self._of_policies = tuple(send(part, self._device) for part in (policies, row[policies], index[policies]))
        self._of_references: tuple[torch.Tensor, torch.Tensor] | None = None
        if references.numel():
            self._of_references = (send(references, self._device), send(row[references], self._device))

    def _not_finite(self, wrong: Sequence[int]) -> NoReturn:
        raise PersonafastError(
            f"{self._members[wrong[0]].name}: its logits are not finite (row {self._row[wrong[0]]} of the batch); "
            "load the model in a wider dtype, or look for NaN in its weights"
        )


class ModelScorer:
    """Reference and policies of B rows.

    Members of one model share its forward passes, one row each; models run side by side on a GPU, else one after the
    other. Drafts may be on the CPU or where the models are; what is committed, and which rows go on, is told on the
    CPU.

    Args:
        patch: the model with its banks, of every member that names no other.
        references: the reference member of every row; None for a row whose target does not depend on it. Its logits
            are then zeros.
        policies: the policy members of every row, ragged: a row may have none.
        ahead: the member of every row that proposes, in a cache of its own. A row whose reference proposes has it
            scored there and nowhere else. None: nothing proposes, and all members share every forward pass.
        stats: receives the number of forward passes and the bytes they read.
        device: where the models are.
        room: the most tokens that a row gets, drafts included; None if nobody knows, and then no pass is recorded.
        host: finds out about logits that are no numbers when it reads next; None looks at them at once.
    """

    def __init__(
        self,
        patch: Patch,
        references: Sequence[Member | None],
        policies: Sequence[Sequence[Member]],
        *,
        ahead: Sequence[Member] | None = None,
        stats: GenerationStats,
        device: torch.device,
        room: int | None = None,
        host: Host | None = None,
    ) -> None:
        self._rows = len(references)
        self._device = device
        self._count = max((len(row) for row in policies), default=0)
        joint: dict[int, _Seats] = {}
        leading: dict[int, _Seats] = {}

        def seat(seats: dict[int, _Seats], member: Member, row: int, index: int) -> None:
            own = member.patch or patch
            seats.setdefault(id(own), _Seats(own, stats, device, room, host)).add(member, row, index)

        own_reference = torch.zeros(self._rows, dtype=torch.bool)
        for b, reference in enumerate(references):
            if ahead is not None:
                seat(leading, ahead[b], b, -1)
                own_reference[b] = reference is not None and ahead[b] == reference
            if reference is not None and not own_reference[b]:
                seat(joint, reference, b, -1)
        for i in range(self._count):
            for b, row in enumerate(policies):
                if i < len(row):
                    seat(joint, row[i], b, i)
        self._joint, self._leading = list(joint.values()), list(leading.values())
        for seats in [*self._joint, *self._leading]:
            seats.close()
        self._regular = self._is_regular()
        # Rows whose reference proposes: it is scored there.
        self._propose_for(own_reference.nonzero().flatten())
        self._proposed: list[torch.Tensor] = []

    def propose(self, draft: torch.Tensor) -> torch.Tensor:
        """See `Scorer.propose`; only with `ahead`."""
        missing = draft.shape[1] + 1 - len(self._proposed)
        if missing > 0:
            self._proposed.extend(self._spread(self._leading, draft, missing).unbind(dim=1))
        return self._proposed[draft.shape[1]]

    def score(self, draft: torch.Tensor, *, reference: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """See `Scorer.score`."""
        places = draft.shape[1] + 1
        of_reference: torch.Tensor | None = None
        policies: torch.Tensor | None = None
        for seats, logits in self._side_by_side(draft, places):
            shape = (self._rows, *logits.shape[1:])
            if self._regular:
                own = logits.shape[0] - self._count * self._rows
                of_reference, policies = logits[:own] if own else None, logits[own:].view(self._count, *shape)
                break
            policies = logits.new_zeros(self._count, *shape) if policies is None else policies
            of_reference = logits.new_zeros(shape) if of_reference is None and reference else of_reference
            seats.place(logits, of_reference, policies)
        if reference and self._proposing.numel():
            self.propose(draft)
            proposed = torch.stack(self._proposed[:places], dim=1)
            if of_reference is None or self._proposing.numel() == self._rows:
                of_reference = proposed
            else:
                of_reference[self._proposing_there] = proposed[self._proposing_there]
        if policies is None:
            assert of_reference is not None
            policies = of_reference.new_zeros(0, *of_reference.shape)
        if reference and of_reference is None:
            of_reference = policies.new_zeros(policies.shape[1:])
        return (of_reference if reference else None), policies

    def _side_by_side(self, draft: torch.Tensor, keep: int) -> list[tuple[_Seats, torch.Tensor]]:
        """Logits of all members, model by model: on a GPU at the same time, each in a stream of its own."""
        if not (FORK and self._device.type == "cuda" and len(self._joint) > 1):
            return [(seats, seats.logits(draft, keep)) for seats in self._joint]
        here, found = torch.cuda.current_stream(self._device), []
        for seats in self._joint:
            stream = seats.stream
            stream.wait_stream(here)
            with torch.cuda.stream(stream):
                logits = seats.logits(draft, keep)
                # It was allocated in that stream, and is read in this one.
                logits.record_stream(here)
            found.append((seats, logits))
        for seats in self._joint:
            here.wait_stream(seats.stream)
        return found

    def speak(self, member: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
        """See `Scorer.speak`; models of which no member speaks are not run, and catch up when one does."""
        out: torch.Tensor | None = None
        for seats in self._joint:
            speaking = (seats.index == member[seats.row]).nonzero().flatten()
            if not speaking.numel():
                continue
            logits = seats.logits(draft, 1)[:, 0]
            out = logits.new_zeros(self._rows, logits.shape[1]) if out is None else out
            out[send(seats.row[speaking], self._device)] = logits[send(speaking, self._device)]
        assert out is not None
        return out

    def commit(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """See `Scorer.commit`."""
        for seats in [*self._joint, *self._leading]:
            seats.group.commit(tokens[seats.row], counts[seats.row])
        self._proposed.clear()

    def keep(self, rows: torch.Tensor) -> None:
        """See `Scorer.keep`."""
        new = torch.full((self._rows,), -1, dtype=torch.long)
        new[rows] = torch.arange(rows.numel())
        self._joint = [seats for seats in self._joint if seats.keep(new)]
        self._leading = [seats for seats in self._leading if seats.keep(new)]
        proposing = new[self._proposing]
        self._propose_for(proposing[proposing >= 0])
        self._rows = rows.numel()
        self._regular = self._is_regular()

    def close(self) -> None:
        """The texts are done."""
        for seats in [*self._joint, *self._leading]:
            seats.group.close()

    def _propose_for(self, rows: torch.Tensor) -> None:
        self._proposing, self._proposing_there = rows, send(rows, self._device)

    def _is_regular(self) -> bool:
        """Whether one group holds the rows' references, of all or none, then all first policies, all second ones ..."""
        if len(self._joint) != 1:
            return False
        seats, rows = self._joint[0], torch.arange(self._rows)
        own = seats.row.numel() - self._count * self._rows
        if own not in (0, self._rows):
            return False
        order = torch.cat([rows[:own], rows.repeat(self._count)])
        index = torch.cat([torch.full((own,), -1), torch.arange(self._count).repeat_interleave(self._rows)])
        return torch.equal(seats.row, order) and torch.equal(seats.index, index)

    def _spread(self, all_seats: Sequence[_Seats], draft: torch.Tensor, keep: int) -> torch.Tensor:
        out: torch.Tensor | None = None
        for seats in all_seats:
            logits = seats.logits(draft, keep)
            if len(all_seats) == 1:
                return logits
            out = logits.new_zeros(self._rows, *logits.shape[1:]) if out is None else out
            out[seats.there] = logits
        assert out is not None
        return out
