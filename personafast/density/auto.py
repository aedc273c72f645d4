"""Which sampler serves a call, when the caller leaves it open (`sampler="auto"`), and why (METHODS 3.4)."""

from __future__ import annotations

from dataclasses import dataclass

# Rows times members from which a forward pass costs arithmetic rather than one read of the weights.
COMPUTE_BOUND = 64


@dataclass(frozen=True)
class Call:
    """What the choice depends on.

    Attributes:
        rows: rows of the batch.
        members: most members of a row, its reference included.
        ratios: whether any row has density ratios.
        separate: whether some policy is a model of its own.
        mixture: whether every row is a mixture: the linear rule, no negative weight, no base.
        sampling: False for greedy decoding.
        other_warpers: name of a processor that acts on the target, a temperature among them, or None.
        mergeable: whether every row's policies can be added into one set of weights.
        by_row: whether the models let rows accept different numbers of tokens.
    """

    rows: int
    members: int
    ratios: bool
    separate: bool
    mixture: bool
    sampling: bool
    other_warpers: str | None
    mergeable: bool
    by_row: bool = True


@dataclass(frozen=True)
class Choice:
    """A sampler, what drafts for it, and the reason."""

    sampler: str
    draft: str
    why: str


def choose(call: Call) -> Choice:
    """The cheapest exact sampler for a call; `scr`, which is approximate, is never chosen."""
    draft = "merge" if call.mergeable else "reference"
    if not call.ratios:
        return Choice("direct", draft, "auto: direct, since no row has density ratios")
    if call.mixture and call.sampling and call.other_warpers is None:
        why = "auto: mixture, since the linear rule lets one policy speak at a time; min_p acts on the one that speaks"
        return Choice("mixture", draft, why)
    if call.separate and call.rows > 1 and not call.by_row:
        why = "auto: direct, since a model of these cannot let rows accept different numbers of tokens"
        return Choice("direct", draft, why)
    if call.separate:
        why = "auto: block, since the policies are separate models and one pass of each scores a whole draft; drafts: "
        why += "the merge of the policies" if draft == "merge" else "the reference, since they cannot be merged"
        return Choice("block", draft, why)
    why = "auto: direct, since all members share one read of the weights"
    at_once = call.rows * call.members
    if at_once > COMPUTE_BOUND:
        why += (
            f"; {call.rows} rows of {call.members} members are bound by arithmetic, of which a merge would need "
            f"1/{call.members}"
        )
    if call.mixture and call.other_warpers is not None:
        why += f"; a mixture's chunks cannot take {call.other_warpers}"
    return Choice("direct", draft, why)
