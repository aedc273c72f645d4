"""token_logprobs: the head, the softmax and the gather in one."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.case import Case, Contender, Draw, Inputs, nbytes
from personafast import ops

VOCABULARY, HIDDEN = 128256, 2048
ROWS = (1, 16, 64)
BLOCK = 1 << 14


def logprobs_case(rows: int) -> Case:
    def make(draw: Draw) -> Inputs:
        return SimpleNamespace(
            hidden=draw.normal(rows, HIDDEN),
            head=draw.weight(VOCABULARY, HIDDEN),
            tokens=draw.integers(0, VOCABULARY, rows, dtype=torch.int64),
        )

    def plain(inputs: Inputs) -> torch.Tensor:
        logits = F.linear(inputs.hidden, inputs.head).float()
        return logits.log_softmax(-1).gather(1, inputs.tokens[:, None])[:, 0]

    def exact(inputs: Inputs) -> torch.Tensor:
        hidden = inputs.hidden.double()
        logits = torch.cat([F.linear(hidden, block.double()) for block in inputs.head.split(BLOCK)], 1)
        return logits.log_softmax(-1).gather(1, inputs.tokens[:, None])[:, 0]

    def traffic(inputs: Inputs) -> int:
        return nbytes(inputs.hidden, inputs.head, inputs.tokens) + 4 * rows

    return Case(
        name=f"token_logprobs-{VOCABULARY}x{HIDDEN}-rows{rows}",
        operator="token_logprobs",
        shape={"V": VOCABULARY, "H": HIDDEN, "T": rows},
        make=make,
        plain=plain,
        exact=exact,
        ours=Contender("ours", lambda inputs: ops.token_logprobs(inputs.hidden, inputs.head, inputs.tokens), traffic),
        baselines=(Contender("head, log_softmax and gather in torch", plain, traffic, goal={16: 1.5}.get(rows)),),
        extra_memory=True,
    )


CASES: tuple[Case, ...] = tuple(logprobs_case(rows) for rows in ROWS)
