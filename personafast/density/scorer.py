"""What a sampler asks of models: so little that a table over a tiny vocabulary can stand in for them."""

from __future__ import annotations

from typing import Protocol

import torch


class Scorer(Protocol):
    """Next-token logits of a reference and N policies over B rows, each row with its own committed text Y.

    A *draft* is int64 [B, j], j >= 0 tokens a row that are not committed; within a round it only grows. It may be on
    the CPU or where the models are, as logits are; everything else is given on the CPU. Caching is the scorer's own
    affair.
    """

    def propose(self, draft: torch.Tensor) -> torch.Tensor:
        """Logits after Y and the draft of what runs ahead, [B, V].

        That is the base of the target (the reference, or the policy that stands for it), or a draft model of its own.
        """
        ...

    def score(self, draft: torch.Tensor, *, reference: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Logits after Y and after each draft token.

        Returns:
            The reference's, [B, j + 1, V], or None when not asked for; the policies', [N, B, j + 1, V].
        """
        ...

    def speak(self, member: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
        """Logits after Y and the draft of one policy a row, [B, V]; member is int64 [B], the policies' indices.

        Which policy speaks may change from round to round, not within one.
        """
        ...

    def commit(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Extend row b's text by tokens[b, :counts[b]]; tokens is int64 [B, n], 0 <= counts[b] <= n.

        All but the last of them are the round's draft.
        """
        ...

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only, int64 indices into the current ones."""
        ...
