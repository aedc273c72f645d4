"""What acts on the residual stream: inject_, steer_ and add_inject_rms_norm."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from benchmarks.case import Case, Contender, Draw, Inputs, nbytes
from personafast import ops

HIDDEN, SLOTS, EPS = 4096, 64, 1e-6
# One token of 8 rows, and a prompt's tokens.
ROWS = (8, 512)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _rows_and_bank(draw: Draw, rows: int) -> Inputs:
    return SimpleNamespace(
        hidden=draw.normal(rows, HIDDEN),
        bank=draw.normal(SLOTS, HIDDEN, scale=0.1),
        slots=draw.integers(0, SLOTS, rows),
        scale=0.5 + draw.uniform(rows),
    )


def inject_case(rows: int) -> Case:
    def plain(inputs: Inputs) -> torch.Tensor:
        added = inputs.bank[inputs.slots].to(inputs.scale.dtype) * inputs.scale[:, None]
        return inputs.hidden.add_(added)

    def traffic(inputs: Inputs) -> int:
        return 2 * nbytes(inputs.hidden) + nbytes(inputs.slots, inputs.scale) + _bank_rows(inputs, rows)

    return Case(
        name=f"inject_-{rows}x{HIDDEN}",
        operator="inject_",
        shape={"T": rows, "H": HIDDEN, "S": SLOTS},
        make=lambda draw: _rows_and_bank(draw, rows),
        plain=plain,
        ours=Contender(
            "ours", lambda inputs: ops.inject_(inputs.hidden, inputs.bank, inputs.slots, inputs.scale), traffic
        ),
        baselines=(Contender("gather, scale and add in torch", plain, traffic),),
        mutates=("hidden",),
    )


def _bank_rows(inputs: Inputs, rows: int) -> int:
    """The rows of the bank that are read, no more than there are."""
    return nbytes(inputs.bank) * min(rows, SLOTS) // SLOTS


def steer_case(rows: int) -> Case:
    """Norm-preserving addition, the one that reads every row twice."""

    def make(draw: Draw) -> Inputs:
        inputs = _rows_and_bank(draw, rows)
        inputs.mode = torch.full((SLOTS,), int(ops.SteerMode.NORM_PRESERVING), dtype=torch.int8)
        inputs.params = 0.5 + draw.uniform(SLOTS, 2)
        return inputs

    def plain(inputs: Inputs) -> torch.Tensor:
        hidden = inputs.hidden.to(_wide(inputs.hidden.dtype))
        factor = inputs.scale * inputs.params[inputs.slots, 0]
        moved = hidden + factor[:, None] * inputs.bank[inputs.slots]
        ratio = hidden.norm(dim=1, keepdim=True) / moved.norm(dim=1, keepdim=True)
        return inputs.hidden.copy_(moved * ratio)

    def ours(inputs: Inputs) -> torch.Tensor:
        return ops.steer_(inputs.hidden, inputs.bank, inputs.slots, inputs.mode, inputs.params, inputs.scale)

    def traffic(inputs: Inputs) -> int:
        return 2 * nbytes(inputs.hidden) + _bank_rows(inputs, rows)

    return Case(
        name=f"steer_-{rows}x{HIDDEN}-norm_preserving",
        operator="steer_",
        shape={"T": rows, "H": HIDDEN, "S": SLOTS},
        make=make,
        plain=plain,
        ours=Contender("ours", ours, traffic),
        baselines=(Contender("the same in torch", plain, traffic),),
        mutates=("hidden",),
    )


def rms_norm_case(rows: int) -> Case:
    def make(draw: Draw) -> Inputs:
        return SimpleNamespace(hidden=draw.normal(rows, HIDDEN), weight=draw.normal(HIDDEN, scale=0.1) + 1)

    def plain(inputs: Inputs) -> torch.Tensor:
        # As transformers' LlamaRMSNorm has it.
        wide = inputs.hidden.to(_wide(inputs.hidden.dtype))
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return inputs.weight * scaled.to(inputs.hidden.dtype)

    def traffic(inputs: Inputs) -> int:
        return 2 * nbytes(inputs.hidden) + nbytes(inputs.weight)

    return Case(
        name=f"rms_norm-{rows}x{HIDDEN}",
        operator="rms_norm",
        shape={"T": rows, "H": HIDDEN},
        make=make,
        plain=plain,
        ours=Contender("ours", lambda inputs: ops.rms_norm(inputs.hidden, inputs.weight, EPS), traffic),
        baselines=(Contender("six operators of torch", plain, traffic),),
    )


def norm_case(rows: int) -> Case:
    def make(draw: Draw) -> Inputs:
        inputs = _rows_and_bank(draw, rows)
        inputs.update = draw.normal(rows, HIDDEN)
        inputs.weight = draw.normal(HIDDEN, scale=0.1) + 1
        return inputs

    def plain(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        wide = _wide(inputs.hidden.dtype)
        added = inputs.bank[inputs.slots].to(wide) * inputs.scale[:, None]
        residual = (inputs.update.to(wide) + inputs.hidden + added).to(inputs.hidden.dtype)
        normed = torch.nn.functional.rms_norm(residual, (HIDDEN,), inputs.weight, EPS)
        return normed, residual

    def ours(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.add_inject_rms_norm(
            inputs.update, inputs.hidden, inputs.bank, inputs.slots, inputs.scale, inputs.weight, EPS
        )

    def traffic(inputs: Inputs) -> int:
        return 4 * nbytes(inputs.hidden) + _bank_rows(inputs, rows) + nbytes(inputs.weight)

    return Case(
        name=f"add_inject_rms_norm-{rows}x{HIDDEN}",
        operator="add_inject_rms_norm",
        shape={"T": rows, "H": HIDDEN, "S": SLOTS},
        make=make,
        plain=plain,
        ours=Contender("ours", ours, traffic),
        baselines=(Contender("add, gather, scale, add and rms_norm in torch", plain, traffic),),
    )


CASES: tuple[Case, ...] = (
    *(kind(rows) for kind in (inject_case, steer_case, norm_case) for rows in ROWS),
    # The rows of a decoding step; with more the model keeps torch's.
    *(rms_norm_case(rows) for rows in (1, 8)),
)
