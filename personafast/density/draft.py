"""What may run ahead of the target: drafted tokens, the law they were sampled from, and who makes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from personafast.density.direct import Process
from personafast.density.draws import Draws, Stream, choose
from personafast.density.host import send
from personafast.density.scorer import Scorer
from personafast.density.transcript import Transcript
from personafast.errors import PersonafastError

# How far from 0 the log of a draft's total probability may lie.
_NORMALISED = 1e-3
# A draft that stands whole with less than this is not drafted further.
_WORTH_GOING_ON = 0.5


@dataclass(frozen=True)
class Draft:
    """Tokens that may follow the text of every row, all on the CPU or all where the models are.

    Attributes:
        tokens: int64 [B, j]; beyond a row's length they are not looked at.
        logp: floating [B, j, V], the normalised log-probabilities every token was sampled from, given those before it;
            None for a draft that is certain of its tokens.
        lengths: int32 [B], 0 to j. A row's length may depend on its text and on its drafted tokens up to there, not
            on what would have come after.
        deterministic: says that logp is None because nothing was sampled.
    """

    tokens: torch.Tensor
    logp: torch.Tensor | None
    lengths: torch.Tensor
    deterministic: bool = False

    @staticmethod
    def empty(rows: int, device: torch.device | None = None) -> Draft:
        """No tokens, on the CPU by default."""
        tokens = torch.zeros(rows, 0, dtype=torch.long, device=device)
        return Draft(tokens, None, torch.zeros(rows, dtype=torch.int32, device=device), deterministic=True)

    def check(self, rows: int, chunk: int, vocabulary: int | None = None) -> None:
        """Raise `PersonafastError` unless this is a draft of at most `chunk` tokens for so many rows."""
        tokens, lengths, logp = self.tokens, self.lengths, self.logp
        if tokens.dim() != 2 or tokens.shape[0] != rows or tokens.shape[1] > chunk or tokens.dtype != torch.int64:
            _fail(f"`tokens` is {_kind(tokens)}, expected int64 [{rows}, j] with j at most {chunk}")
        if lengths.shape != (rows,) or lengths.dtype != torch.int32:
            _fail(f"`lengths` is {_kind(lengths)}, expected int32 [{rows}]")
        if logp is None and not self.deterministic:
            _fail(
                "the probabilities are missing: give `logp`, those the tokens were sampled from, or "
                "`deterministic=True` if nothing was sampled"
            )
        if logp is None:
            return
        known = "V" if vocabulary is None else vocabulary
        if logp.dim() != 3 or logp.shape[:2] != tokens.shape or not logp.dtype.is_floating_point:
            _fail(f"`logp` is {_kind(logp)}, expected floating [{rows}, {tokens.shape[1]}, {known}]")
        if vocabulary is not None and logp.shape[2] != vocabulary:
            _fail(f"`logp` is {_kind(logp)}, expected floating [{rows}, {tokens.shape[1]}, {known}]")

    def check_values(self, vocabulary: int | None = None) -> None:
        """Raise `PersonafastError` unless lengths, tokens and log-probabilities can be what they say they are."""
        width = self.tokens.shape[1]
        wrong = (self.lengths < 0) | (self.lengths > width)
        if bool(wrong.any()):
            row = int(wrong.int().argmax())
            _fail(f"`lengths` of row {row} is {int(self.lengths[row])}, expected 0 to {width}")
        within = torch.arange(width, device=self.tokens.device) < self.lengths[:, None]
        if vocabulary is None and self.logp is not None:
            vocabulary = self.logp.shape[2]
        outside = self.tokens < 0
        if vocabulary is not None:
            outside = outside | (self.tokens >= vocabulary)
        if bool((outside & within).any()):
            row, place = (outside & within).nonzero()[0].tolist()
            allowed = "0 or more" if vocabulary is None else f"0 to {vocabulary - 1}"
            _fail(f"`tokens` of row {row} hold {int(self.tokens[row, place])}, expected {allowed}")
        if self.logp is None:
            return
        total = self.logp.float().logsumexp(-1)
        wrong = ~(total.abs() <= _NORMALISED) & within
        if bool(wrong.any()):
            row, place = wrong.nonzero()[0].tolist()
            _fail(
                f"`logp` of row {row}, place {place} sums to {float(total[row, place].exp()):g}, expected 1: the "
                "normalised log-probabilities that the token was sampled from"
            )
        index = torch.where(within, self.tokens, 0)[..., None]
        impossible = (self.logp.gather(2, index)[..., 0] == -torch.inf) & within
        if bool(impossible.any()):
            row, place = impossible.nonzero()[0].tolist()
            _fail(
                f"`logp` of row {row} gives its token at place {place} no probability, so it cannot be a sample of it"
            )


class Drafter(Protocol):
    """Makes drafts, round by round."""

    def draft(self, transcript: Transcript, draws: Draws | None, chunk: int) -> Draft:
        """At most `chunk` tokens a row, as wide as the longest row needs.

        What is random must come from `draws` at `Stream.PROPOSE`, keyed by the position where the round starts: a
        place that is drafted again in a later round needs new numbers. Without draws there is nothing to sample: the
        target takes its most probable token.
        """
        ...

    def commit(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """Row b goes on with tokens[b, :counts[b]]; tokens is int64 [B, n], 0 <= counts[b] <= n; both on the CPU."""
        ...

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows only, int64 indices into the current ones, on the CPU."""
        ...


class ModelDrafter:
    """Samples from what runs ahead in a scorer: the reference, a merge, a smaller model (`Scorer.propose`).

    Any law is exact as long as it is the one stored with the draft; the nearer it is to the target, the more of the
    draft stands. So it takes the target's own support mask and warpers.

    On another device than the CPU nobody looks at what it drafts: drafts are as wide as they may be, and their lengths,
    which are the same there, are told with what becomes of them.

    Args:
        scorer: proposes.
        temperature: divides the logits first, as `Rule.policy_temperature` does.
        doubt: c of the guess that a drafted token of probability p stands with p / (p + c (1 - p)). A row's draft ends
            where, by that guess, all of it stands with less than one half: what follows would mostly be in vain. At 0
            every draft is as long as it may be.
        min_p: float32 [B] on the CPU, keeps tokens of at least this share of the largest probability; None keeps all.
        process: the target's processors and warpers, (ids [b, l], log-probabilities [b, V]) -> scores [b, V].
    """

    def __init__(
        self,
        scorer: Scorer,
        *,
        temperature: float = 1.0,
        doubt: float = 0.0,
        min_p: torch.Tensor | None = None,
        process: Process | None = None,
    ) -> None:
        self._scorer, self._temperature, self._min_p, self._process = scorer, temperature, min_p, process
        self._doubt = doubt

    def draft(self, transcript: Transcript, draws: Draws | None, chunk: int) -> Draft:
        """See `Drafter.draft`."""
        host = transcript.host
        room = room_for_draft(transcript, chunk)
        widest, room = int(room.max()), host.send(room)
        lengths, going = torch.zeros_like(room), room > 0
        tokens = torch.zeros(room.numel(), 0, dtype=torch.long, device=room.device)
        ids = transcript.shown() if self._process is not None else tokens
        u = None if draws is None else host.send(draws.uniform(Stream.PROPOSE, transcript.positions, chunk))
        laws, stands = [], torch.ones(room.numel(), device=room.device)
        while tokens.shape[1] < widest and (host.remote or bool(going.any())):
            logp = self._law(torch.cat([ids, tokens], dim=1), self._scorer.propose(tokens))
            # Where processors leave nothing, a draft ends; that this is so depends on what was drafted already.
            dead = ~(logp[:, 0] <= 0)
            going = going & ~dead
            logp = torch.where(dead[:, None], 0.0, logp)
            token = logp.argmax(dim=-1) if u is None else choose(logp, u[:, tokens.shape[1]], host)
            lengths = lengths + going
            going = going & (lengths < room) & ~transcript.is_eos(token)
            p = logp.gather(1, token[:, None])[:, 0].exp()
            stands = stands * p / (p + self._doubt * (1 - p))
            going = going & (stands >= _WORTH_GOING_ON)
            tokens = torch.cat([tokens, token[:, None]], dim=1)
            laws.append(logp)
        law = torch.stack(laws, dim=1) if laws and u is not None else None
        return Draft(tokens, law, lengths.to(torch.int32), deterministic=law is None)

    def commit(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """See `Drafter.commit`: the scorer is told by whoever samples."""

    def keep(self, rows: torch.Tensor) -> None:
        """See `Drafter.keep`."""
        if self._min_p is not None:
            self._min_p = self._min_p[rows]

    def _law(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logp = (logits.float() / self._temperature).log_softmax(dim=-1)
        if self._min_p is not None:
            least = logp.amax(dim=-1, keepdim=True) + send(self._min_p, logp.device).log()[:, None]
            logp = logp.masked_fill(logp < least, -torch.inf)
        if self._process is not None:
            logp = self._process(ids, logp)
        return logp.float().log_softmax(dim=-1)


class NgramDrafter:
    """Copies from the row's own text: what followed the last few tokens when they stood there before.

    The last n tokens, n from `longest` down to 1, are looked up in prompt and new text; what followed their latest
    earlier occurrence is the draft. Nothing is sampled. Rows without such an occurrence get no draft.

    Args:
        prompts: the tokens of every row's prompt, without padding.
        longest: the largest n.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], longest: int = 3) -> None:
        if longest < 1:
            raise PersonafastError(f"longest: {longest} is not at least 1")
        self._rows = [_Text(prompt, longest) for prompt in prompts]

    def draft(self, transcript: Transcript, draws: Draws | None, chunk: int) -> Draft:
        """See `Drafter.draft`."""
        room = room_for_draft(transcript, chunk)
        found = [text.continuation(most) for text, most in zip(self._rows, room.tolist(), strict=True)]
        width = max((len(tokens) for tokens in found), default=0)
        tokens = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens in found], dtype=torch.long)
        lengths = torch.tensor([len(tokens) for tokens in found], dtype=torch.int32)
        return Draft(tokens.view(len(found), width), None, lengths, deterministic=True)

    def commit(self, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        """See `Drafter.commit`."""
        for text, new, count in zip(self._rows, tokens.tolist(), counts.tolist(), strict=True):
            text.extend(new[:count])

    def keep(self, rows: torch.Tensor) -> None:
        """See `Drafter.keep`."""
        self._rows = [self._rows[row] for row in rows.tolist()]


class _Text:
    """One row's tokens, and where what follows each of their n-grams stands."""

    def __init__(self, tokens: Sequence[int], longest: int) -> None:
        self._tokens: list[int] = []
        self._longest = longest
        self._next: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            # Only now do the n-grams at the end have something that follows them.
            end = len(self._tokens)
            for n in range(1, min(self._longest, end) + 1):
                self._next[tuple(self._tokens[end - n :])] = end
            self._tokens.append(token)

    def continuation(self, most: int) -> list[int]:
        for n in range(min(self._longest, len(self._tokens)), 0, -1):
            start = self._next.get(tuple(self._tokens[-n:]))
            if start is not None:
                return self._tokens[start : start + most]
        return []


def room_for_draft(transcript: Transcript, chunk: int) -> torch.Tensor:
    """Tokens that may be drafted for every row, int64 [b], one more always following; 0 for rows that have ended."""
    return torch.where(transcript.ended, 0, (transcript.room - 1).clamp(0, chunk))


def lengths_in_row(transcript: Transcript, draft: Draft, chunk: int) -> torch.Tensor:
    """A draft's lengths, int32 [b] where the models are, cut where a row is full and behind an EOS, which counts."""
    host = transcript.host
    ends = transcript.is_eos(host.send(draft.tokens)).long()
    before_eos = (ends.cumsum(dim=1) - ends == 0).sum(dim=1)
    room = host.send(room_for_draft(transcript, chunk))
    return torch.minimum(torch.minimum(before_eos, room), host.send(draft.lengths)).to(torch.int32)


def _kind(tensor: torch.Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _fail(message: str) -> None:
    raise PersonafastError(f"draft: {message}")
