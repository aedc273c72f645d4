"""The `Scorer` over a patched Hugging Face model: every member is a row of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from personafast.density.transcript import GenerationStats
from personafast.models.cache import RaggedContext
from personafast.models.patch import Patch
from personafast.models.rows import RowSlots


@dataclass(frozen=True)
class Member:
    """One distribution that takes part in a row: a prompt, and what is switched on in the model."""

    prompt: list[int]
    vector: int
    mask: int
    adapter: int


class _Group:
    """Members that share forward passes, and what of the rows' text they have been fed."""

    def __init__(self, patch: Patch, members: Sequence[Member], stats: GenerationStats, device: torch.device) -> None:
        self._patch, self._stats = patch, stats
        self._context = RaggedContext(patch.model, [member.prompt for member in members], device)
        self._slots = RowSlots.of([m.vector for m in members], [m.mask for m in members], [m.adapter for m in members])
        self._last = torch.tensor([member.prompt[-1] for member in members], dtype=torch.long, device=device)
        # The prompt is fed with the first draft, so at first nothing is pending; later the last committed token is.
        self._pending: torch.Tensor | None = torch.empty(len(members), 0, dtype=torch.long, device=device)
        self._fed = 0

    def logits(self, draft: torch.Tensor, keep: int) -> torch.Tensor:
        """Feed what is new of the draft [R, j]; the last `keep` next-token logits, float32 [R, keep, V]."""
        tokens = draft[:, self._fed :]
        if self._pending is not None:
            tokens, self._pending = torch.cat([self._pending, tokens], dim=1), None
        self._stats.forwards += tokens.shape[0]
        self._stats.calls += 1
        with self._patch.rows(self._slots):
            logits = self._context.feed(tokens, keep)
        self._fed = draft.shape[1]
        return logits

    def commit(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Keep the cache up to, and without, the last committed token; that one is pending."""
        if self._pending is not None:
            raise RuntimeError("a group was committed to before it was scored")
        # The token that was pending has been fed: a row that gets none is rolled back to before it.
        self._context.rollback(self._fed + 1 - counts)
        newest = tokens.gather(1, (counts - 1).clamp(min=0)[:, None]).squeeze(1)
        self._last = torch.where(counts > 0, newest, self._last)
        self._pending = self._last[:, None]
        self._fed = 0

    def keep(self, rows: torch.Tensor) -> None:
        self._context.keep(rows)
        self._slots = self._slots.select(rows.cpu())
        if self._pending is not None:
            self._pending = self._pending[rows]
        self._last = self._last[rows]


class ModelScorer:
    """Reference and policies of B rows in one patched model.

    Args:
        patch: the model with its banks.
        references: the reference member of every row; None for a row whose target does not depend on it (not with
            `split`). Its logits are then zeros.
        policies: the policy members of every row, ragged: a row may have none.
        split: keep the reference in a cache of its own, so that it can run ahead (`propose`); otherwise all members
            share every forward pass.
        stats: receives the number of forward passes.
    """

    def __init__(
        self,
        patch: Patch,
        references: Sequence[Member | None],
        policies: Sequence[Sequence[Member]],
        *,
        split: bool,
        stats: GenerationStats,
        device: torch.device,
    ) -> None:
        flat = [member for row in policies for member in row]
        self._rows = len(references)
        self._count = max((len(row) for row in policies), default=0)
        # Where flat policy f stands in [N, B].
        self._row = torch.tensor([b for b, row in enumerate(policies) for _ in row], dtype=torch.long, device=device)
        self._index = torch.tensor([i for row in policies for i in range(len(row))], dtype=torch.long, device=device)
        present = [b for b, member in enumerate(references) if member is not None]
        self._present = torch.tensor(present, dtype=torch.long, device=device)
        own = [member for member in references if member is not None]
        self._reference: _Group | None = None
        if split:
            self._reference = _Group(patch, own, stats, device)
            self._joint = _Group(patch, flat, stats, device) if flat else None
        else:
            self._joint = _Group(patch, [*own, *flat], stats, device)

    def propose(self, draft: torch.Tensor) -> torch.Tensor:
        """See `Scorer.propose`; only with `split`."""
        assert self._reference is not None
        return self._reference.logits(draft, 1)[:, 0]

    def score(self, draft: torch.Tensor, *, reference: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """See `Scorer.score`; the reference only without `split`."""
        positions = draft.shape[1] + 1
        if self._joint is None:
            return None, draft.new_empty(0, self._rows, positions, 0, dtype=torch.float32)
        own = draft[self._row]
        if self._reference is not None:
            return None, self._spread(self._joint.logits(own, positions))
        logits = self._joint.logits(torch.cat([draft[self._present], own]), positions)
        count = self._present.numel()
        of_reference = logits[:count]
        if reference and count < self._rows:
            of_reference = logits.new_zeros(self._rows, *logits.shape[1:])
            of_reference[self._present] = logits[:count]
        return (of_reference if reference else None), self._spread(logits[count:])

    def commit(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """See `Scorer.commit`."""
        flat = (tokens[self._row], counts[self._row])
        if self._reference is not None:
            self._reference.commit(tokens, counts)
            if self._joint is not None:
                self._joint.commit(*flat)
        else:
            assert self._joint is not None
            self._joint.commit(torch.cat([tokens[self._present], flat[0]]), torch.cat([counts[self._present], flat[1]]))

    def keep(self, rows: torch.Tensor) -> None:
        """See `Scorer.keep`."""
        new = torch.full((self._rows,), -1, dtype=torch.long, device=rows.device)
        new[rows] = torch.arange(rows.numel(), device=rows.device)
        members = (new[self._row] >= 0).nonzero().flatten()
        present = (new[self._present] >= 0).nonzero().flatten()
        if self._reference is not None:
            self._reference.keep(rows)
            if self._joint is not None:
                self._joint.keep(members)
        else:
            assert self._joint is not None
            self._joint.keep(torch.cat([present, members + self._present.numel()]))
        self._row, self._index = new[self._row[members]], self._index[members]
        self._present = new[self._present[present]]
        self._rows = rows.numel()

    def _spread(self, flat: torch.Tensor) -> torch.Tensor:
        """[F, j, V] of the policies that are there -> [N, B, j, V], zeros where a row has fewer."""
        out = flat.new_zeros(self._count, self._rows, *flat.shape[1:])
        out[self._index, self._row] = flat
        return out
