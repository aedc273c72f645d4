"""The text each row has so far, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from personafast.density.host import Host

# Drop finished rows from the batch once they are more than this share of it.
_SHRINK = 0.25


@dataclass
class GenerationStats:
    """What a call did.

    Attributes:
        rounds: sampler rounds (one target token each for `direct` and `token_rs`, one chunk for the others).
        tokens: tokens committed, over all rows.
        forwards: member forward passes (one member of one row in one call of the model counts 1).
        calls: calls of the model.
        row_rounds: int64 [B] on the CPU, the rounds of every row until it ended.
        proposed, accepted: proposed tokens, and those of them that were accepted (`verify`, `block`, `scr`,
            `token_rs`), in rows that had not ended.
        accepted_lengths: at index j, how many rounds of a row accepted j drafted tokens (`verify`, `block`, `scr`).
        scored, clipped: chunk scores compared with a bound, and those above it: their share is `clipped_mass`, a
            measure of the bias of an estimated bound (`scr`).
        salvaged: rounds of a row that accepted a part of their chunk only, the other source of bias (`scr`).
        exact: exact tokens drawn in warm-up rounds (`scr`) and after the retry cap (`scr`, `token_rs`).
        log_z: float32 [B], for rows that were asked for it: the log normalisers of a row's targets, log b(y) +
            log g(r(y)) - log q(y), summed over its tokens, of the targets as they are before processors and warpers. 0
            for a row that is only its reference. For `scr` an estimate: the log of the mean of exp(S) over the chunks
            proposed to the row.
        weight_bytes: estimated bytes of weights that the calls read: every model once a call, adapters in use on top.
        clamped_share: under the linear rule with negative weights, the mean share of the target's mass that was below
            zero and set to 0; None where nothing had to be.
        notes: what was chosen for the caller, and why.
    """

    rounds: int = 0
    tokens: int = 0
    forwards: int = 0
    calls: int = 0
    proposed: int = 0
    accepted: int = 0
    scored: int = 0
    clipped: int = 0
    salvaged: int = 0
    exact: int = 0
    row_rounds: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    accepted_lengths: list[int] = field(default_factory=list)
    log_z: torch.Tensor | None = None
    weight_bytes: int = 0
    clamped_share: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def acceptance(self) -> float | None:
        """Share of proposed tokens accepted; None where nothing is proposed."""
        return self.accepted / self.proposed if self.proposed else None

    @property
    def clipped_mass(self) -> float | None:
        """Share of scores above their bound; None where there is no bound."""
        return self.clipped / self.scored if self.scored else None

    @property
    def forwards_per_token(self) -> float:
        """Member forward passes per committed token."""
        return self.forwards / max(1, self.tokens)

    @property
    def tokens_per_round(self) -> float:
        """Committed tokens per round of a row."""
        return self.tokens / max(1, int(self.row_rounds.sum()))

    @property
    def bytes_per_token(self) -> float:
        """Bytes of weights read per committed token."""
        return self.weight_bytes / max(1, self.tokens)


class Transcript:
    """Committed tokens of B rows; rows that ended leave the batch.

    It is kept on the CPU, whatever device the models are on, and so are the tensors it gives and takes, unless it is
    said otherwise.

    Args:
        prompt: int64 [B, L], as the caller gave it (padding included), on the device of the models.
        limit: most new tokens a row.
        eos: ids that end a row.
        criteria: transformers stopping criteria beyond length and EOS, (ids [B, l], scores) -> bool [B], called with
            all rows, where the models are; one whose `row_by_row` is true gets only those that were extended, on the
            CPU.
        on_tokens: called with the new tokens of every commit, for streaming.
        may_shrink: let rows that have ended leave the batch.
        looked_at: whether somebody looks at what `shown` gives.

    Attributes:
        limit: as given.
        alive: int64 [b], the rows of the call that are in the batch.
        host: what goes between the CPU and the device of the models.
    """

    def __init__(
        self,
        prompt: torch.Tensor,
        limit: int,
        eos: Sequence[int],
        criteria: Sequence[Callable[..., Any]] = (),
        on_tokens: Callable[[torch.Tensor], None] | None = None,
        may_shrink: bool = True,
        looked_at: bool = True,
    ) -> None:
        batch = prompt.shape[0]
        self.stats = GenerationStats(row_rounds=torch.zeros(batch, dtype=torch.long))
        self.alive = torch.arange(batch)
        self.host = Host(prompt.device)
        self._prompt = prompt.cpu()
        self.limit = limit
        self._eos = torch.tensor(list(eos), dtype=torch.long)
        self._sent_eos = self.host.send(self._eos)
        self._criteria = list(criteria)
        self._on_tokens = on_tokens
        self._may_shrink, self._looked_at = may_shrink, looked_at
        self._tokens = torch.zeros(batch, limit, dtype=torch.long)
        self._length = torch.zeros(batch, dtype=torch.long)
        self._done = torch.zeros(batch, dtype=torch.bool)

    @property
    def positions(self) -> torch.Tensor:
        """New tokens so far of the rows in the batch, int64 [b]."""
        return self._length[self.alive]

    @property
    def room(self) -> torch.Tensor:
        """Tokens the rows in the batch may still get, int64 [b]."""
        return self.limit - self.positions

    @property
    def ended(self) -> torch.Tensor:
        """Which rows in the batch have ended, bool [b]."""
        return self._done[self.alive]

    @property
    def open(self) -> bool:
        """Whether any row goes on."""
        return self.limit > 0 and not bool(self._done.all())

    def is_eos(self, tokens: torch.Tensor) -> torch.Tensor:
        """Which tokens end a row, on their own device."""
        return torch.isin(tokens, self._eos if tokens.is_cpu else self._sent_eos)

    def ids(self) -> torch.Tensor:
        """Prompt and new tokens of the rows in the batch, int64 [b, L + l]; ragged rows are aligned at the right."""
        return self._aligned(self.alive, self.positions)

    def shown(self) -> torch.Tensor:
        """`ids`, where the models are; without columns if it is another device and nobody looks at them."""
        if self.host.remote and not self._looked_at:
            return torch.zeros(self.alive.numel(), 0, dtype=torch.long, device=self.host.device)
        return self.host.send(self.ids())

    def append(self, tokens: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Add tokens[b, :counts[b]] to the rows in the batch, up to where a row ends.

        A row that ended before takes what it is given for show only: nothing of it is kept.

        Returns:
            bool [b], rows that have ended.
        """
        self.stats.rounds += 1
        self.stats.row_rounds[self.alive] += (~self.ended).long()
        for j in range(int(counts.max())):
            adds = (~self._done[self.alive]) & (counts > j)
            rows = self.alive[adds]
            if not rows.numel():
                break
            new = tokens[adds, j]
            self._tokens[rows, self._length[rows]] = new
            self._length[rows] += 1
            self.stats.tokens += rows.numel()
            ended = torch.isin(new, self._eos) | (self._length[rows] >= self.limit)
            if self._criteria:
                ended = ended | self._stopped(rows)
            self._done[rows] = ended
            if self._on_tokens is not None:
                self._on_tokens(new)
        return self._done[self.alive]

    def count(self, proposed: torch.Tensor, accepted: torch.Tensor) -> None:
        """Note how many tokens a round proposed to every row of the batch and how many it accepted; int [b] each.

        Comes before the round's `append`: rows that have ended do not count.
        """
        going = ~self.ended
        stats, lengths = self.stats, torch.bincount(accepted[going].long()).tolist()
        stats.proposed += int(proposed[going].sum())
        stats.accepted += int(accepted[going].sum())
        stats.accepted_lengths += [0] * (len(lengths) - len(stats.accepted_lengths))
        for length, rows in enumerate(lengths):
            stats.accepted_lengths[length] += rows

    def add_log_z(self, values: torch.Tensor, before: torch.Tensor) -> None:
        """Note the log normalisers [b, m] of a round's tokens, as far as `append` kept them.

        Args:
            values: one a token that was appended, where the models are; what lies beyond is not looked at.
            before: `positions` before the `append`.
        """
        if self.stats.log_z is None:
            self.stats.log_z = torch.zeros(self._done.shape, device=values.device)
        kept = torch.arange(values.shape[1]) < (self.positions - before)[:, None]
        added = torch.where(self.host.send(kept), values.float(), 0.0).sum(dim=1)
        self.stats.log_z[self.host.send(self.alive)] += added

    def shrink(self) -> torch.Tensor | None:
        """Rows of the batch to go on with, int64 indices into it, when enough have ended; None to go on with all."""
        ended = self._done[self.alive]
        share = float(ended.float().mean())
        if not self._may_shrink or share <= _SHRINK or share == 1:
            return None
        rows = (~ended).nonzero().flatten()
        self.alive = self.alive[rows]
        return rows

    def sequences(self, pad: int) -> torch.Tensor:
        """Prompt and new tokens of every row, int64 [B, L + longest] where the models are, `pad` after a row's end."""
        longest = int(self._length.max())
        new = self._tokens[:, :longest].clone()
        new[torch.arange(longest) >= self._length[:, None]] = pad
        return self.host.send(torch.cat([self._prompt, new], dim=1))

    def _stopped(self, rows: torch.Tensor) -> torch.Tensor:
        """Which of these rows some criterion ends, bool [n].

        As in stock generate a criterion sees all rows of the call, every row at its own place, and its own text is as
        wide as the tensor: criteria cut the prompt off by its width, or count columns.
        """
        found = torch.zeros_like(self._done)
        lengths = self._length[rows]
        for length in lengths.unique().tolist():
            asked = rows[lengths == length]
            for criterion in self._criteria:
                if getattr(criterion, "row_by_row", False):
                    found[asked] |= criterion(self._aligned(asked, self._length[asked]), ())
                    continue
                said = torch.as_tensor(criterion(self.host.send(self._texts(length)), ())).to(found.device)
                found[asked] |= said.expand(found.shape)[asked]
        return found[rows]

    def _texts(self, length: int) -> torch.Tensor:
        """Every row of the call where rows of `length` new tokens stand: longer ones are cut, shorter ones filled."""
        return self._aligned(torch.arange(self._length.numel()), self._length.clamp(max=length))

    def _aligned(self, rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        longest = int(lengths.max())
        whole = torch.cat([self._prompt[rows], self._tokens[rows, :longest]], dim=1)
        if bool((lengths == longest).all()):
            return whole
        # Row b moves right by what it lacks; what comes in from the left is a copy of its first token.
        index = torch.arange(whole.shape[1]) - (longest - lengths)[:, None]
        return whole.gather(1, index.clamp(min=0))
