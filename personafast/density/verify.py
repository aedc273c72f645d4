"""Token-level sampling from the target, exactly, several tokens a round: a draft runs ahead and is verified."""

from __future__ import annotations

import math

import torch

from personafast import ops
from personafast.density.direct import Process
from personafast.density.draft import Draft, Drafter, ModelDrafter, lengths_in_row
from personafast.density.draws import Draws, check_target, nothing_left, settle
from personafast.density.host import Host
from personafast.density.normaliser import log_normalisers
from personafast.density.rule import Rule
from personafast.density.scorer import Scorer
from personafast.density.transcript import Transcript
from personafast.errors import PersonafastError


def sample_verify(
    scorer: Scorer,
    transcript: Transcript,
    rule: Rule,
    draws: Draws | None,
    drafter: Drafter,
    *,
    chunk: int,
    block: bool = False,
    process: Process | None = None,
    carry: bool = False,
    want_log_z: bool = False,
    vocabulary: int | None = None,
) -> None:
    """Draw from the token-level target of `sample_direct`, with a draft of up to `chunk` tokens a round.

    One forward pass gives the targets q_1 ... q_(k+1) at the drafted tokens and after them. Drafted tokens stand
    while u < q(x) / p(x), p being what they were sampled from, and the first that does not is drawn anew from
    (q - p)+ (arXiv 2211.17192); with `block`, the chunk is verified as a whole and more of it stands (arXiv
    2403.10444). See `ops.verify_draft`. The law does not depend on how good the draft is, and no bound on q / p is
    needed. Where nothing is drafted, a row's token is the one `sample_direct` draws.

    Args:
        scorer: the models.
        transcript: receives the tokens; says when rows end.
        rule: weights, aggregator and support mask of every row.
        draws: uniforms; None keeps drafted tokens while they are the most probable ones, and then takes that.
        drafter: makes the drafts.
        chunk: k, most tokens drafted a round.
        block: verify chunks as blocks.
        process: user processors and warpers, (ids [b, l], log-target [b, V]) -> scores [b, V]. They are applied at
            every place of a draft, those behind a token they forbid included, and may hold no state.
        carry: as for `sample_direct`; inside a draft the ratios grow from place to place.
        want_log_z: make `GenerationStats.log_z`.
        vocabulary: size of the vocabulary, to check the tokens of a draft without probabilities before models see
            them.

    Raises:
        PersonafastError: the first draft is not what it has to be, or a target has no token left.
    """
    if chunk < 1:
        raise PersonafastError(f"chunk: {chunk} is not at least 1")
    host = transcript.host
    carried = rule.no_ratios() if carry else None
    checked = False
    while transcript.open:
        draft = _drafted(drafter, transcript, draws, chunk, vocabulary, not checked)
        checked = checked or draft.tokens.shape[1] > 0
        lengths = lengths_in_row(transcript, draft, chunk)
        places = torch.arange(draft.tokens.shape[1] + 1, device=lengths.device)
        tokens = torch.where(places[:-1] < lengths[:, None], host.send(draft.tokens), 0)

        reference, policies = scorer.score(tokens, reference=True)
        assert reference is not None
        so_far = _carried(rule, carried, reference, policies, tokens)
        plain = rule.targets(reference, policies, so_far)
        # Nothing follows an EOS: the token that is drawn behind it is not kept.
        over = transcript.is_eos(tokens) & (places[:-1] < lengths[:, None])
        last_place = lengths - over.any(dim=1).to(lengths.dtype)
        target = _processed(process, transcript, tokens, plain, last_place)
        logp = _normalised(target, tokens, last_place, transcript.ended, host)

        if draws is None:
            new, accepted = _most_probable(logp, tokens, lengths)
        else:
            law = None if draft.logp is None else host.send(draft.logp)
            seeds, positions = host.send(draws.seeds), host.send(transcript.positions)
            new, accepted = ops.verify_draft(logp, law, tokens, lengths, seeds, positions, block)
        last = accepted.long()
        host.expect(new.gather(1, last[:, None])[:, 0] < 0, nothing_left)
        texts, stood, drafted = host.read(new, accepted, lengths)
        transcript.count(drafted, stood)
        # A row that has ended stays as it is until it leaves the batch.
        counts = torch.where(transcript.ended, 0, stood.long() + 1)
        before = transcript.positions
        transcript.append(texts, counts)
        if want_log_z:
            drawn = new.clamp(min=0)
            transcript.add_log_z(log_normalisers(rule, reference, policies, plain, drawn, so_far), before)
        if so_far is not None:
            rows = torch.arange(last.numel(), device=last.device)
            step = rule.log_ratios(reference[rows, last], policies[:, rows, last], new[rows, last])
            carried = so_far[rows, last] + step
        scorer.commit(texts.clamp(min=0), counts)
        drafter.commit(texts.clamp(min=0), counts)
        kept = transcript.shrink()
        if kept is not None:
            carried = carried[host.send(kept)] if carried is not None else None
            for part in (scorer, rule, draws, drafter):
                if part is not None:
                    part.keep(kept)


def _drafted(
    drafter: Drafter, transcript: Transcript, draws: Draws | None, chunk: int, vocabulary: int | None, first: bool
) -> Draft:
    rows = transcript.alive.numel()
    # The row with the most room needs no longer draft: one token always follows it.
    chunk = min(chunk, int(torch.where(transcript.ended, 1, transcript.room).max()) - 1)
    if chunk == 0:
        return Draft.empty(rows)
    draft = drafter.draft(transcript, draws, chunk)
    draft.check(rows, chunk, vocabulary)
    # Ours is what it says, and looking at it would wait for the device.
    if first and not (transcript.host.remote and isinstance(drafter, ModelDrafter)):
        draft.check_values(vocabulary)
    return draft


def _carried(
    rule: Rule, carried: torch.Tensor | None, reference: torch.Tensor, policies: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor | None:
    """Log ratios of the text before every place of a draft, float32 [B, k + 1, N]."""
    if carried is None:
        return None
    batch, chunk = tokens.shape
    members, vocabulary = policies.shape[0], reference.shape[2]
    steps = rule.log_ratios(
        reference[:, :chunk].reshape(-1, vocabulary),
        policies[:, :, :chunk].reshape(members, -1, vocabulary),
        tokens.flatten(),
    )
    steps = torch.cat([carried[:, None], steps.view(batch, chunk, members)], dim=1)
    return steps.cumsum(dim=1)


def _processed(
    process: Process | None,
    transcript: Transcript,
    tokens: torch.Tensor,
    target: torch.Tensor,
    last_place: torch.Tensor,
) -> torch.Tensor:
    """Apply processors at every place some row looks at, with the tokens that lead there.

    Which places those are a device does not tell: there it is all of them.
    """
    if process is None:
        return target
    ids = torch.cat([transcript.shown(), tokens], dim=1)
    first = ids.shape[1] - tokens.shape[1]
    last = tokens.shape[1] if transcript.host.remote else int(last_place.max())
    found = [process(ids[:, : first + j], target[:, j]) for j in range(last + 1)]
    return torch.cat([torch.stack(found, dim=1).to(target.dtype), target[:, len(found) :]], dim=1)


def _normalised(
    target: torch.Tensor, tokens: torch.Tensor, last_place: torch.Tensor, ended: torch.Tensor, host: Host
) -> torch.Tensor:
    """Log-probabilities, float32 [B, k + 1, V]; places that cannot be reached are uniform if they are nothing else."""
    logp = settle(target.float(), ended).log_softmax(dim=-1)
    wrong = ~(logp[..., 0] <= 0)
    if not host.remote and not bool(wrong.any()):
        return logp
    possible = logp[:, :-1].gather(2, tokens[..., None])[..., 0] > -torch.inf
    reached = torch.cat([torch.ones_like(possible[:, :1]), possible], dim=1).cumprod(dim=1).bool()
    reached &= torch.arange(logp.shape[1], device=logp.device) <= last_place[:, None]
    check_target(torch.where((wrong & reached).any(dim=1), torch.nan, 0.0), host)
    return torch.where(wrong[..., None], -math.log(logp.shape[2]), logp)


def _most_probable(
    logp: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`ops.verify_draft` at temperature 0: drafted tokens stand while they are the target's first choice."""
    best = logp.argmax(dim=-1)
    chunk = tokens.shape[1]
    within = torch.arange(chunk, device=tokens.device) < lengths[:, None]
    accepted = ((best[:, :chunk] == tokens) & within).long().cumprod(dim=1).sum(dim=1)
    # What stands is the target's choice too, so its choices are the row's tokens, up to the first that was not drafted.
    beyond = torch.arange(chunk + 1, device=tokens.device) > accepted[:, None]
    return best.masked_fill(beyond, -1), accepted.to(torch.int32)
