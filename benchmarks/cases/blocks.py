"""What decoding does between the linears of a block: attention of few queries, and the gate of the MLP."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.case import Case, Contender, Draw, Inputs, nbytes
from personafast import ops

GROUPS, KEY_HEADS, WIDTH = 3, 4, 64


def attend_case(rows: int, columns: int, queries: int) -> Case:
    def make(draw: Draw) -> Inputs:
        mask = torch.ones(rows, 1, queries, columns, dtype=torch.bool)
        mask[0, :, :, : columns // 4] = False  # a row that is padded on the left
        return SimpleNamespace(
            query=draw.normal(rows, GROUPS * KEY_HEADS, queries, WIDTH),
            key=draw.normal(rows, KEY_HEADS, columns, WIDTH),
            value=draw.normal(rows, KEY_HEADS, columns, WIDTH),
            mask=mask.tril(columns - queries),
        )

    def ours(inputs: Inputs) -> torch.Tensor:
        return ops.attend(inputs.query, inputs.key, inputs.value, inputs.mask)

    def folded(inputs: Inputs) -> torch.Tensor:
        query = inputs.query.reshape(rows, KEY_HEADS, GROUPS * queries, WIDTH)
        mask = inputs.mask.expand(-1, GROUPS, -1, -1).reshape(rows, 1, GROUPS * queries, columns)
        out = F.scaled_dot_product_attention(query, inputs.key, inputs.value, attn_mask=mask)
        return out.reshape(rows, GROUPS * KEY_HEADS, queries, WIDTH)

    def grouped(inputs: Inputs) -> torch.Tensor:
        return F.scaled_dot_product_attention(
            inputs.query, inputs.key, inputs.value, attn_mask=inputs.mask, enable_gqa=True
        )

    def traffic(inputs: Inputs) -> int:
        return nbytes(inputs.key, inputs.value) + 2 * nbytes(inputs.query)

    return Case(
        name=f"attend-rows{rows}-columns{columns}-queries{queries}",
        operator="attend",
        shape={"B": rows, "G": GROUPS, "K": KEY_HEADS, "D": WIDTH, "n": columns, "q": queries},
        make=make,
        plain=grouped,
        ours=Contender("ours", ours, traffic),
        baselines=(
            Contender("torch, enable_gqa", grouped, traffic),
            Contender("torch, heads that share keys as queries of one", folded, traffic),
        ),
    )


def silu_mul_case(rows: int, width: int) -> Case:
    def make(draw: Draw) -> Inputs:
        return SimpleNamespace(gate=draw.normal(rows, width), up=draw.normal(rows, width))

    def ours(inputs: Inputs) -> torch.Tensor:
        return ops.silu_mul(inputs.gate, inputs.up)

    def plain(inputs: Inputs) -> torch.Tensor:
        return F.silu(inputs.gate) * inputs.up

    def traffic(inputs: Inputs) -> int:
        return 3 * nbytes(inputs.gate)

    return Case(
        name=f"silu_mul-{rows}x{width}",
        operator="silu_mul",
        shape={"T": rows, "I": width},
        make=make,
        plain=plain,
        ours=Contender("ours", ours, traffic),
        baselines=(Contender("F.silu, then a product", plain, traffic),),
    )


CASES = (
    attend_case(2, 512, 1),
    attend_case(17, 48, 1),
    attend_case(17, 512, 1),
    attend_case(5, 512, 9),
    silu_mul_case(2, 11008),
    silu_mul_case(17, 11008),
)
