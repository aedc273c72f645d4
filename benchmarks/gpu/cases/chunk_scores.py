"""chunk_scores and chunk_accept on a GPU, as one operator and apart."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from benchmarks.case import Contender, Inputs, nbytes
from benchmarks.gpu.case import GpuCase, GpuDraw, Specimen, meta
from personafast import ops


def _chunk(rows: int, members: int, chunk: int, rule: ops.Aggregator) -> GpuCase:
    def make(draw: GpuDraw) -> Inputs:
        return SimpleNamespace(
            ref=-draw.uniform(rows, chunk) * 4,
            policies=-draw.uniform(members, rows, chunk) * 4,
            weights=0.2 + draw.uniform(rows, members),
            carried=draw.normal(rows, members, dtype=torch.float32),
            aggregator=torch.full((rows,), int(rule), dtype=torch.int32, device=draw.device),
            p=torch.ones(rows, device=draw.device),
            bound=draw.uniform(rows, chunk) * 4,
            log_u=draw.uniform(rows, chunk).log(),
            lengths=draw.integers(1, chunk + 1, rows),
        )

    def plain(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        ratios = (inputs.policies - inputs.ref).cumsum(2) + inputs.carried.T[..., None]
        weights = inputs.weights.T[..., None]
        if rule == ops.Aggregator.GEOMETRIC:
            scores = (weights * ratios).sum(0)
        else:
            scores = (weights.log() + ratios).logsumexp(0)
        count = torch.arange(1, chunk + 1, dtype=torch.int32, device=scores.device)
        stands = (inputs.log_u < scores - inputs.bound) & (count <= inputs.lengths[:, None])
        return scores, (stands * count).amax(1)

    def ours(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        return ops.chunk_scores_accept(
            inputs.ref,
            inputs.policies,
            inputs.weights,
            inputs.carried,
            inputs.aggregator,
            inputs.p,
            inputs.bound,
            inputs.log_u,
            inputs.lengths,
        )

    def traffic(inputs: Inputs) -> int:
        of_rows = nbytes(inputs.weights, inputs.carried, inputs.aggregator, inputs.p, inputs.lengths, inputs.lengths)
        return of_rows + nbytes(inputs.ref, inputs.ref, inputs.policies, inputs.bound, inputs.log_u)

    return GpuCase(
        name=f"chunk_scores_accept-{rule.name.lower()}-rows{rows}-chunk{chunk}-policies{members}",
        operator="chunk_scores_accept",
        shape={"B": rows, "k": chunk, "N": members},
        make=make,
        plain=plain,
        ours=Contender("ours", ours, traffic),
        baselines=(Contender("the same in torch", plain, traffic),),
        launches=1,
    )


def cases(tiny: bool = False) -> tuple[GpuCase, ...]:
    rules = (ops.Aggregator.LINEAR, ops.Aggregator.GEOMETRIC)
    return tuple(_chunk(3, 2, 3, rule) if tiny else _chunk(64, 4, 8, rule) for rule in rules)


def _specimen(operator: str, rows: int, members: int, chunk: int, dtype: torch.dtype, carried: bool) -> Specimen:
    from personafast import _triton

    def call() -> None:
        scores = (
            meta(rows, chunk, dtype=dtype),
            meta(members, rows, chunk, dtype=dtype),
            meta(rows, members, dtype=torch.float32),
            meta(rows, members, dtype=torch.float32) if carried else None,
            meta(rows, dtype=torch.int32),
            meta(rows, dtype=torch.float32),
        )
        accept = (*(meta(rows, chunk, dtype=torch.float32) for _ in range(2)), meta(rows, dtype=torch.int32))
        if operator == "chunk_scores":
            _triton.chunk_scores(*scores)
        elif operator == "chunk_accept":
            _triton.chunk_accept(meta(rows, chunk, dtype=dtype), *accept)
        else:
            _triton.chunk_scores_accept(*scores, *accept)

    size = str(dtype).removeprefix("torch.")
    name = f"{size}, {rows} x {chunk}" + ("" if operator == "chunk_accept" else f", {members} members")
    traffic = rows * chunk * dtype.itemsize
    if operator != "chunk_accept":
        traffic += rows * members * (chunk * dtype.itemsize + 4 + 4 * carried) + rows * (4 * chunk + 8)
    if operator != "chunk_scores":
        traffic += rows * (8 * chunk + 8)
    return Specimen(operator, name, call, 1, traffic, listed=dtype == torch.float32)


SPECIMENS = (
    _specimen("chunk_scores_accept", 64, 4, 8, torch.float32, True),
    _specimen("chunk_scores_accept", 8, 16, 64, torch.bfloat16, False),
    _specimen("chunk_scores", 64, 4, 8, torch.float32, True),
    _specimen("chunk_accept", 64, 4, 8, torch.float32, True),
    _specimen("chunk_accept", 8, 4, 300, torch.float64, True),
)
