"""What a blend does to its vectors: which one rules, which two pull against each other, what is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from personafast.vectors.blend import weigh
from personafast.vectors.similarity import cosines, number
from personafast.vectors.vector import PersonaVector

OPPOSED = -0.3
"""Two weighted vectors whose cosine lies below this pull against each other."""
RULING = 0.7
"""A vector with more than this share of the summed norms rules the blend."""
CANCELLED = 0.5
"""A blend that loses more than this share of the summed norms is mostly cancelled."""


@dataclass(frozen=True)
class BlockReport:
    """A blend at one block. w_i = c_i s_i v_i is a vector as `blend` adds it, with its coefficient and scaling.

    Attributes:
        block: 0-based.
        norms: name -> |w_i|, for the vectors that act here.
        shares: name -> |w_i| / sum_j |w_j|.
        ruler: the name of the largest share.
        cosines: name -> name -> cosine of w_i and w_j: that of the vectors, with its sign turned if one of the two
            coefficients is negative. None where a norm is zero.
        survives: name -> (sum_j w_j) . w_i / |w_i|^2, how much of what was asked of a vector the blend shows along that
            vector: 1 is all, less means that others take it away, more that others point the same way, below 0 that it
            is turned around. None where the norm is zero.
        norm: |sum_i w_i|.
        cancelled: 1 - |sum_i w_i| / sum_i |w_i|: 0 for vectors of one direction, 1 for a blend that vanishes; vectors
            at right angles of equal norm lose 1 - 1/sqrt(N).
    """

    block: int
    norms: Mapping[str, float]
    shares: Mapping[str, float]
    ruler: str
    cosines: Mapping[str, Mapping[str, float | None]]
    survives: Mapping[str, float | None]
    norm: float
    cancelled: float


@dataclass(frozen=True)
class BlendReport:
    """A blend at every block where something acts.

    Attributes:
        coefficients: as given.
        normalize: as given.
        blocks: one report a block, ascending; empty if every coefficient is 0.
    """

    coefficients: Mapping[str, float]
    normalize: str
    blocks: tuple[BlockReport, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to beware of, a sentence each, naming the block where it is worst; empty if nothing."""
        if not self.blocks:
            return ("Nothing acts: every coefficient is 0.",)
        return (*_opposed(self.blocks), *_ruling(self.blocks, self.normalize), *_cancelled(self.blocks))

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values, with the warnings; None stands for what is not defined."""
        return {**asdict(self), "blocks": list(asdict(self)["blocks"]), "warnings": list(self.warnings)}


def blend_report(
    vectors: Mapping[str, PersonaVector],
    coefficients: Mapping[str, float],
    *,
    blocks: Sequence[int] | None = None,
    normalize: str = "none",
) -> BlendReport:
    """Report on the blend that `blend` makes of the same arguments, in float64; raises what `blend` raises."""
    terms = weigh(vectors, coefficients, blocks=blocks, normalize=normalize)
    reports = []
    for block in sorted({block for term in terms.values() for block in term.blocks}):
        rows = {
            name: terms[name].rows[terms[name].blocks.index(block)]
            for name in coefficients
            if name in terms and block in terms[name].blocks
        }
        reports.append(_at_block(block, rows))
    return BlendReport({name: float(c) for name, c in coefficients.items()}, normalize, tuple(reports))


def _at_block(block: int, rows: Mapping[str, torch.Tensor]) -> BlockReport:
    names = list(rows)
    stacked = torch.stack([rows[name] for name in names])
    norms = stacked.norm(dim=1)
    total, summed = stacked.sum(0), float(norms.sum())
    norm = float(total.norm())
    shares = (norms / summed).nan_to_num().tolist()
    survives = (stacked @ total / norms.square()).tolist()
    table = cosines(stacked).tolist()
    return BlockReport(
        block=block,
        norms=dict(zip(names, norms.tolist(), strict=True)),
        shares=dict(zip(names, shares, strict=True)),
        ruler=names[int(norms.argmax())],
        cosines={
            name: {other: number(value) for other, value in zip(names, line, strict=True)}
            for name, line in zip(names, table, strict=True)
        },
        survives={name: number(value) for name, value in zip(names, survives, strict=True)},
        norm=norm,
        # The triangle inequality holds up to rounding only.
        cancelled=max(0.0, 1.0 - norm / summed) if summed else 0.0,
    )


def _opposed(blocks: Sequence[BlockReport]) -> list[str]:
    found: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for report in blocks:
        names = list(report.norms)
        for index, first in enumerate(names):
            for second in names[index + 1 :]:
                cosine = report.cosines[first][second]
                if cosine is not None and cosine < OPPOSED:
                    found.setdefault((first, second), []).append((cosine, report.block))
    return [
        f"{first} and {second} pull against each other: cosine {min(where)[0]:.2f} at {_place(min(where)[1], where)}."
        for (first, second), where in found.items()
    ]


def _ruling(blocks: Sequence[BlockReport], normalize: str) -> list[str]:
    found: dict[str, list[tuple[float, int]]] = {}
    for report in blocks:
        share = report.shares[report.ruler]
        if len(report.norms) > 1 and share > RULING:
            found.setdefault(report.ruler, []).append((share, report.block))
    mend = 'normalize="match" makes all equally long' if normalize == "none" else "its coefficient makes it so"
    return [
        f"{name} rules the blend: {100 * max(where)[0]:.0f} % of the summed norms at {_place(max(where)[1], where)}; "
        f"{mend}."
        for name, where in found.items()
    ]


def _cancelled(blocks: Sequence[BlockReport]) -> list[str]:
    where = [(report.cancelled, report.block) for report in blocks if report.cancelled > CANCELLED]
    if not where:
        return []
    return [f"{100 * max(where)[0]:.0f} % of the summed norms cancel at {_place(max(where)[1], where)}."]


def _place(block: int, where: Sequence[object]) -> str:
    others = len(where) - 1
    return f"block {block}" + (f" (and so at {others} more)" if others else "")
