"""token_logprobs on a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.case import Absent, Contender, Inputs, nbytes
from benchmarks.gpu.case import GpuCase, GpuDraw, Specimen, meta
from personafast import ops

# Llama 3.1 8B.
VOCABULARY, HIDDEN = 128256, 4096

# Logits of the exact result alive at one time are those of so many tokens.
BLOCK = 1 << 14


def _liger(inputs: Inputs) -> Inputs:
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError as error:
        raise Absent("liger-kernel is not installed") from error
    return SimpleNamespace(call=liger_fused_linear_cross_entropy, **vars(inputs))


def _cut(inputs: Inputs) -> Inputs:
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Absent("cut-cross-entropy is not installed") from error
    return SimpleNamespace(call=linear_cross_entropy, **vars(inputs))


def _head(rows: int, hidden: int, vocabulary: int) -> GpuCase:
    """The head of one decoding step, or of a chunk, at a temperature for each row."""

    def make(draw: GpuDraw) -> Inputs:
        return SimpleNamespace(
            hidden=draw.normal(rows, hidden),
            head=draw.weight(vocabulary, hidden),
            tokens=draw.integers(0, vocabulary, rows, dtype=torch.int64),
        )

    def chosen(logits: torch.Tensor, inputs: Inputs) -> torch.Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return wide.log_softmax(-1).gather(1, inputs.tokens[:, None])[:, 0]

    def plain(inputs: Inputs) -> torch.Tensor:
        return chosen(F.linear(inputs.hidden, inputs.head), inputs)

    def exact(inputs: Inputs) -> torch.Tensor:
        wide = inputs.hidden.double()
        return chosen(torch.cat([F.linear(wide, block.double()) for block in inputs.head.split(BLOCK)], 1), inputs)

    def traffic(inputs: Inputs) -> int:
        return nbytes(inputs.hidden, inputs.head, inputs.tokens) + 4 * rows

    def written(inputs: Inputs) -> int:
        return traffic(inputs) + rows * vocabulary * inputs.head.element_size()

    return GpuCase(
        name=f"token_logprobs-{vocabulary}x{hidden}-rows{rows}",
        operator="token_logprobs",
        shape={"T": rows, "V": vocabulary, "H": hidden},
        make=make,
        plain=plain,
        exact=exact,
        ours=Contender("ours", lambda i: ops.token_logprobs(i.hidden, i.head, i.tokens), traffic),
        baselines=(
            Contender(
                "the bare head in cuBLAS", lambda i: F.linear(i.hidden, i.head), written, goal=1 / 1.1, same=False
            ),
            Contender("head, log_softmax and gather in torch", plain, traffic),
            Contender(
                "Liger's fused cross entropy",
                lambda i: -i.call(i.hidden, i.head, i.tokens, reduction="none").float(),
                traffic,
                prepare=_liger,
            ),
            Contender(
                "cut cross entropy",
                lambda i: -i.call(i.hidden, i.head, i.tokens, reduction="none").float(),
                traffic,
                prepare=_cut,
            ),
        ),
        launches=2,
    )


def cases(tiny: bool = False) -> tuple[GpuCase, ...]:
    if tiny:
        return (_head(5, 72, 300),)
    return tuple(_head(rows, HIDDEN, VOCABULARY) for rows in (1, 16, 64, 256))


def _specimen(rows: int, hidden: int, dtype: torch.dtype, full: bool = False) -> Specimen:
    """`full` is a bias, a temperature and a softcap, as Gemma 2 and a sampler want them."""
    from personafast._triton import token_logprobs

    def call() -> None:
        token_logprobs(
            meta(rows, hidden, dtype=dtype),
            meta(VOCABULARY, hidden, dtype=dtype),
            meta(rows, dtype=torch.int64),
            meta(rows, dtype=torch.float32) if full else None,
            meta(VOCABULARY, dtype=dtype) if full else None,
            1.0,
            30.0 if full else 0.0,
        )

    name = f"{str(dtype).removeprefix('torch.')}, {rows} rows, {VOCABULARY} x {hidden}"
    name += ", bias, temperature and softcap" if full else ""
    traffic = (rows + VOCABULARY) * hidden * dtype.itemsize
    cores = () if dtype == torch.float32 else ("token_logprobs_kernel",)
    return Specimen("token_logprobs", name, call, 2, traffic, cores, listed=dtype == torch.bfloat16 and not full)


SPECIMENS = (
    *(_specimen(rows, HIDDEN, torch.bfloat16) for rows in (1, 64, 256)),
    *(_specimen(rows, HIDDEN, torch.bfloat16, full=True) for rows in (64, 256)),
    _specimen(64, HIDDEN, torch.float16),
    # Columns that are no multiple of a block.
    _specimen(32, 2080, torch.bfloat16, full=True),
    _specimen(8, HIDDEN, torch.float32),
    _specimen(64, 2056, torch.float32, full=True),
)
