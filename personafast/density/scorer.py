"""What a sampler asks of models: so little that a table over a tiny vocabulary can stand in for them."""

from __future__ import annotations

from typing import Protocol

import torch


class Scorer(Protocol):
    """Next-token logits of a reference and N policies over B rows, each row with its own committed text Y.

    A *draft* is int64 [B, j], j >= 0 tokens a row that are not committed. Caching is the scorer's own affair.
    """

    def propose(self, draft: torch.Tensor) -> torch.Tensor:
        """Reference logits after Y and the draft, [B, V]."""
        ...

    def score(self, draft: torch.Tensor, *, reference: bool) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Logits after Y and after each draft token.

        Returns:
            The reference's, [B, j + 1, V], or None when not asked for; the policies', [N, B, j + 1, V].
        """
        ...

    def commit(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Extend row b's text by tokens[b, :counts[b]]; tokens is int64 [B, n], 0 <= counts[b] <= n.

        At most one token more than was drafted and scored in this round.
        """
        ...

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only, int64 indices into the current ones."""
        ...
