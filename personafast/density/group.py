"""Members that share the forward passes of one model, and what of their rows' text they have been fed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from personafast.density.host import send
from personafast.density.transcript import GenerationStats
from personafast.models.context import RaggedContext
from personafast.models.patch import Patch
from personafast.models.places import Prompts
from personafast.models.rows import RowSlots
from personafast.models.steps import Steps

if TYPE_CHECKING:
    from personafast.models.static_context import StaticContext


class Group:
    """R rows of one model: logits over drafts, and texts that grow by what is committed.

    Which tokens are in a text is known on the CPU; those of a draft may be on the device, where they were drawn.

    A group need not take part in a round: what is committed meanwhile is fed when it is asked next.

    Args:
        patch: the model with its banks.
        prompts: token ids a row.
        slots: (steps, mask, adapter) a row.
        written: how many tokens at the end of each prompt were generated; None for none.
        stats: receives calls, forward passes and bytes read.
        device: where the model is.
        room: the most tokens that a row gets beside its prompt, drafts included; None if nobody knows, and then no
            pass is recorded.
    """

    def __init__(
        self,
        patch: Patch,
        prompts: Sequence[list[int]],
        slots: Sequence[tuple[Steps, int, int]],
        stats: GenerationStats,
        device: torch.device,
        room: int | None = None,
        written: Sequence[int] | None = None,
    ) -> None:
        patch.parts.check_attention_only("personas")
        self._patch, self._stats = patch, stats
        steps, masks, adapters = zip(*slots, strict=True)
        ends = [len(prompt) for prompt in prompts]
        if written is not None:
            ends = [end - tail for end, tail in zip(ends, written, strict=True)]
        self._slots = RowSlots.of(steps, masks, adapters, Prompts(ends))
        self._weights = patch.bytes_read(self._slots)
        longest = max(len(prompt) for prompt in prompts)
        static = None if room is None else patch.static_context(len(prompts), longest + room, device)
        self._static = static
        self._context: RaggedContext | StaticContext
        if static is None:
            self._context = RaggedContext(patch.model, list(prompts), device)
        else:
            self._context = static.start(prompts)
            static.slots.set(self._slots)
        self._last = torch.tensor([prompt[-1] for prompt in prompts], dtype=torch.long)
        # Committed tokens that are not in the cache; the prompt, which is none of them, is fed with the first draft.
        self._pending = torch.empty(len(prompts), 0, dtype=torch.long)
        self._live: torch.Tensor | None = None  # which of them are, bool [R, m]; None for all
        # Draft tokens in the cache, beyond the text; None while this round has not asked the group.
        self._fed: int | None = None

    def logits(self, draft: torch.Tensor, keep: int) -> torch.Tensor:
        """Feed what is new of the draft [R, j]; the last `keep` next-token logits, float32 [R, keep, V]."""
        if self._fed is None:
            pending, live = self._pending, self._live
            if live is not None:
                live = torch.cat([live, live.new_ones(draft.shape)], dim=1)
            tokens = torch.cat([send(pending, draft.device), draft], dim=1) if draft.shape[1] else pending
        else:
            tokens, live = draft[:, self._fed :], None
        self._fed = draft.shape[1]
        with self._patch.rows(self._slots if self._static is None else self._static.slots):
            logits = self._context.feed(tokens, keep, live)
        self._stats.forwards += tokens.shape[0]
        self._stats.calls += 1
        self._stats.weight_bytes += self._weights
        return logits

    def commit(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Extend the rows' texts by tokens[:, :counts], of which all but the last are the round's draft; on the CPU."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        if self._fed is None:
            self._hold(tokens, place < counts[:, None])
            return
        # The newest token of a row stays out of the cache, so that feeding it gives the logits that follow.
        kept = (counts - 1).clamp(min=0, max=self._fed)
        nothing = counts == 0
        # A row that gets none goes back to before its last token, which is pending again.
        self._context.rollback(self._fed - kept + nothing.long())
        self._fed = None
        self._pending, self._live = self._last[:, None], None
        if bool((counts - kept == 1).all()):
            self._pending = tokens.gather(1, kept[:, None])
        else:
            self._live = nothing[:, None]
            self._hold(tokens, (place >= kept[:, None]) & (place < counts[:, None]))
        newest = tokens.gather(1, (counts - 1).clamp(min=0)[:, None])[:, 0]
        self._last = torch.where(nothing, self._last, newest)

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only."""
        self._context.keep(rows)
        self._slots = self._slots.select(rows)
        self._pending, self._last = self._pending[rows], self._last[rows]
        if self._live is not None:
            self._live = self._live[rows]

    def close(self) -> None:
        """The text is done: what was recorded for it serves the next one."""
        if self._static is not None:
            self._patch.give_back(self._static)
            self._static = None

    def _hold(self, tokens: torch.Tensor, live: torch.Tensor) -> None:
        """Let the live ones of these tokens wait, behind those that do."""
        before = self._pending.new_ones(self._pending.shape, dtype=torch.bool) if self._live is None else self._live
        tokens, live = torch.cat([self._pending, tokens], dim=1), torch.cat([before, live], dim=1)
        # A stable sort of the flags moves the live ones to the right and keeps their order.
        most = int(live.sum(dim=1).max())
        order = live.long().argsort(dim=1, stable=True)[:, live.shape[1] - most :]
        self._pending, live = tokens.gather(1, order), live.gather(1, order)
        self._live = None if bool(live.all()) else live
