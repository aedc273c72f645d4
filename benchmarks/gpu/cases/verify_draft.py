"""verify_draft and philox.uniform on a GPU."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import torch

from benchmarks.case import Absent, Contender, Inputs, nbytes
from benchmarks.gpu.case import GpuCase, GpuDraw, Specimen, meta
from personafast import ops


def _verify(rows: int, chunk: int, vocabulary: int, block: bool, near: float, certain: bool = False) -> GpuCase:
    """Judged by the reference. The distributions are as peaked as a language model's, the draft `near` to the target.

    Between tokens of equal weight a limit that rounding moves would now and then be another token.
    """

    def make(draw: GpuDraw) -> Inputs:
        logits = draw.normal(rows, chunk, vocabulary, dtype=torch.float32, scale=4.0)
        target = draw.normal(rows, chunk + 1, vocabulary, dtype=torch.float32, scale=4.0)
        target[:, :-1] = logits + near / 4 * target[:, :-1]
        draft = logits.log_softmax(-1)
        tokens = torch.multinomial(draft.exp().view(-1, vocabulary), 1, generator=draw.generator)
        return SimpleNamespace(
            target=target.log_softmax(-1),
            draft=None if certain else draft,
            tokens=tokens.view(rows, chunk),
            lengths=torch.full((rows,), chunk, dtype=torch.int32, device=draw.device),
            seeds=draw.integers(0, 2**62, rows, dtype=torch.int64),
            positions=draw.integers(0, 4096, rows, dtype=torch.int64),
        )

    def call(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return inputs.target, inputs.draft, inputs.tokens, inputs.lengths, inputs.seeds, inputs.positions

    def ours(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return ops.verify_draft(*call(inputs), block)

    def reference(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        with ops.use_backend("reference"):
            return ours(inputs)

    def vectorised(inputs: Inputs) -> tuple[torch.Tensor, ...]:
        return importlib.import_module("personafast.ops._verify_draft")._vectorised(*call(inputs), block)

    def traffic(inputs: Inputs) -> int:
        """What the outcome needs: target and draft at the places from where it ends on, the target behind a draft."""
        row = nbytes(inputs.target[0, 0])
        total = 0
        for accepted in ours(inputs)[1].tolist():
            places = chunk - accepted if block else min(1, chunk - accepted)
            total += row * (places * (1 if certain else 2) if places else 1)
        return total

    def chain(inputs: Inputs) -> torch.Tensor:
        return inputs.run(inputs.draft_p, inputs.ids, inputs.target_p)[0]

    kind = ("block" if block else "token") + ("-certain" if certain else "")
    baselines = [Contender("the same in vectorised torch", vectorised, traffic)]
    if not block and not certain:
        baselines.append(Contender("FlashInfer, from probabilities", chain, traffic, _flashinfer, same=False))
    return GpuCase(
        name=f"verify_draft-{kind}-rows{rows}-chunk{chunk}-near{near:g}",
        operator="verify_draft",
        shape={"B": rows, "k": chunk, "V": vocabulary},
        make=make,
        plain=reference,
        exact=reference,
        ours=Contender("ours", ours, traffic),
        baselines=tuple(baselines),
        launches=2,
    )


def _flashinfer(inputs: Inputs) -> Inputs:
    try:
        from flashinfer.sampling import chain_speculative_sampling
    except ImportError as error:
        raise Absent(f"FlashInfer is not installed ({error})") from None
    return SimpleNamespace(
        **vars(inputs),
        run=chain_speculative_sampling,
        draft_p=inputs.draft.exp(),
        ids=inputs.tokens.int(),
        target_p=inputs.target.exp(),
    )


def _uniform(rows: int, numbers: int) -> GpuCase:
    def make(draw: GpuDraw) -> Inputs:
        return SimpleNamespace(
            seeds=draw.integers(0, 2**62, rows, dtype=torch.int64),
            positions=draw.integers(0, 2**40, rows, dtype=torch.int64),
        )

    def plain(inputs: Inputs) -> torch.Tensor:
        return ops.philox.reference(inputs.seeds, inputs.positions, 2, numbers)

    def traffic(inputs: Inputs) -> int:
        return nbytes(inputs.seeds, inputs.positions) + 8 * rows * numbers

    return GpuCase(
        name=f"philox.uniform-rows{rows}-numbers{numbers}",
        operator="philox.uniform",
        shape={"B": rows, "n": numbers},
        make=make,
        plain=plain,
        ours=Contender("ours", lambda i: ops.philox.uniform(i.seeds, i.positions, 2, numbers), traffic),
        baselines=(Contender("the same in torch", plain, traffic),),
        launches=1,
    )


def cases(tiny: bool = False) -> tuple[GpuCase, ...]:
    if tiny:
        verified = (_verify(2, 2, 37, block, 0.5, certain) for block in (False, True) for certain in (False, True))
        return (*verified, _uniform(2, 3))
    shapes = [(near, block) for near in (0.1, 1.0) for block in (False, True)]
    return (
        *(_verify(8, 8, 128256, block, near) for near, block in shapes),
        _verify(8, 8, 128256, False, 1.0, certain=True),
        _verify(1, 8, 128256, True, 0.1),
        _uniform(64, 8),
    )


def _specimen(
    rows: int, chunk: int, vocabulary: int, block: bool, dtype: torch.dtype, draft: torch.dtype | None
) -> Specimen:
    from personafast._triton import verify_draft

    def call() -> None:
        verify_draft(
            meta(rows, chunk + 1, vocabulary, dtype=dtype),
            None if draft is None else meta(rows, chunk, vocabulary, dtype=draft),
            meta(rows, chunk, dtype=torch.int64),
            meta(rows, dtype=torch.int32),
            meta(rows, dtype=torch.int64),
            meta(rows, dtype=torch.int64),
            block,
        )

    of_draft = "certain draft" if draft is None else f"draft {str(draft).removeprefix('torch.')}"
    name = f"{'block' if block else 'token'}, {str(dtype).removeprefix('torch.')}, {of_draft}, "
    # Of a block as if no place could be left out.
    places = chunk if block else 1
    size = vocabulary * (dtype.itemsize + (0 if draft is None else draft.itemsize))
    traffic = rows * (places * size + (vocabulary * dtype.itemsize if block else 0))
    listed = dtype == torch.float32 and rows == 8
    return Specimen("verify_draft", f"{name}{rows} x {chunk} x {vocabulary}", call, 2, traffic, listed=listed)


def _uniform_specimen(rows: int, numbers: int) -> Specimen:
    from personafast._triton import philox_uniform

    def call() -> None:
        philox_uniform(meta(rows, dtype=torch.int64), meta(rows, dtype=torch.int64), 2, numbers)

    return Specimen("philox.uniform", f"{rows} x {numbers}", call, 1, 8 * rows * (2 + numbers))


SPECIMENS = (
    *(_specimen(8, 8, 128256, block, torch.float32, torch.float32) for block in (False, True)),
    _specimen(8, 8, 128256, True, torch.float32, None),
    _specimen(1, 1, 50257, False, torch.float16, torch.bfloat16),
    _specimen(64, 16, 262144, True, torch.bfloat16, torch.bfloat16),
    _specimen(256, 4, 32000, False, torch.bfloat16, None),
    _uniform_specimen(64, 8),
)
