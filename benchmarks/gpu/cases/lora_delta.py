"""lora_delta_ on a GPU: beside the dense linear whose output it adds to."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.case import Absent, Contender, Inputs, nbytes
from benchmarks.gpu.case import GpuCase, GpuDraw, Specimen, meta
from personafast import ops


def _case(
    rows: int, features: int, outputs: int, adapters: int, rank: int, share: float | None = None, launches: int = 2
) -> GpuCase:
    """Rows of every adapter in turn. `share`: what part of the dense linear's time ours may take."""

    def make(draw: GpuDraw) -> Inputs:
        return SimpleNamespace(
            out=draw.normal(rows, outputs),
            x=draw.normal(rows, features),
            weight=draw.weight(outputs, features),
            a=draw.normal(adapters, rank, features, scale=features**-0.5),
            # As `attach` stores it: a view of [M, R, O].
            b=draw.normal(adapters, rank, outputs).transpose(1, 2),
            slots=draw.integers(0, adapters, rows),
            scale=0.5 + draw.uniform(adapters),
            ranks=torch.full((adapters,), rank, dtype=torch.int32, device=draw.device),
        )

    def ours(inputs: Inputs) -> torch.Tensor:
        i = inputs
        return ops.lora_delta_(i.out, i.x, i.a, i.b, i.slots, i.scale, i.ranks)

    def stacked(inputs: Inputs) -> torch.Tensor:
        inner = (inputs.x @ inputs.a.flatten(0, 1).T).view(-1, adapters, rank)
        index = torch.arange(adapters, device=inner.device)
        own = inputs.slots[:, None] == index
        inner = torch.where(own[:, :, None], inner * inputs.scale.to(inner.dtype)[:, None], 0.0)
        return inputs.out.addmm_(inner.flatten(1), inputs.b.transpose(1, 2).reshape(adapters * rank, outputs))

    def gathered(inputs: Inputs) -> torch.Tensor:
        slots = inputs.slots.long()
        inner = torch.bmm(inputs.a[slots], inputs.x[:, :, None]) * inputs.scale[slots].to(inputs.x.dtype)[:, None, None]
        return inputs.out.add_(torch.bmm(inputs.b[slots], inner)[:, :, 0])

    def traffic(inputs: Inputs) -> int:
        used = 1 - (1 - 1 / adapters) ** rows  # expected share of the adapters
        return int(used * nbytes(inputs.a, inputs.b)) + nbytes(inputs.x) + 2 * nbytes(inputs.out)

    def vllm(inputs: Inputs) -> Inputs:
        """vLLM's punica kernels, whose factors are lists of [M, 1, R, I] and [M, 1, O, R]."""
        try:
            from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
        except ImportError as error:
            raise Absent(f"vLLM's LoRA kernels ({error})") from None
        try:
            found = LoRAKernelMeta.make(max_loras=adapters, max_num_tokens=rows, device=inputs.x.device)
            found.prepare_tensors(inputs.slots)
            arguments = found.meta_args(rows)
        except (AttributeError, TypeError) as error:
            raise Absent(f"vLLM's LoRA kernels have another interface here ({error})") from None
        scaled = (inputs.b * inputs.scale.to(inputs.b.dtype)[:, None, None]).contiguous()
        inner = torch.zeros(1, rows, rank, dtype=torch.float32, device=inputs.x.device)

        def run(out: torch.Tensor) -> torch.Tensor:
            inner.zero_()
            lora_shrink(inputs.x, [inputs.a[:, None]], inner, *arguments, 1.0)
            lora_expand(inner, [scaled[:, None]], out, *arguments, offset_start=0, add_inputs=True)
            return out

        return SimpleNamespace(out=inputs.out, run=run)

    few = adapters * rank <= 1024
    return GpuCase(
        name=f"lora_delta_-{features}to{outputs}-rows{rows}-adapters{adapters}-rank{rank}",
        operator="lora_delta_",
        shape={"T": rows, "I": features, "O": outputs, "M": adapters, "R": rank},
        make=make,
        plain=stacked if few else gathered,
        ours=Contender("ours", ours, traffic),
        baselines=(
            Contender(
                "dense linear",
                lambda i: F.linear(i.x, i.weight),
                lambda i: nbytes(i.x, i.weight, i.out),
                goal=None if share is None else 1 / share,
                same=False,
            ),
            Contender(
                "all adapters stacked in torch" if few else "gathered factors in torch",
                stacked if few else gathered,
                traffic,
            ),
            Contender("vLLM's shrink and expand", lambda i: i.run(i.out), traffic, prepare=vllm),
        ),
        mutates=("out",),
        launches=launches,
    )


def cases(tiny: bool = False) -> tuple[GpuCase, ...]:
    if tiny:
        return (_case(5, 40, 70, 3, 4), _case(12, 320, 136, 3, 20), _case(300, 20, 70, 2, 4, launches=3))
    return (
        _case(64, 4096, 4096, 16, 16, share=0.3),
        _case(64, 4096, 14336, 16, 16, share=0.3),
        _case(1, 4096, 4096, 1, 16),
        _case(8, 4096, 4096, 8, 16),
        _case(16, 4096, 14336, 4, 64),
        _case(256, 4096, 4096, 64, 64),
        _case(4096, 4096, 4096, 4, 16, launches=3),
    )


def _specimen(
    name: str,
    rows: int,
    features: int,
    outputs: int,
    adapters: int,
    rank: int,
    dtype: torch.dtype = torch.bfloat16,
    adjacent_outputs: bool = True,
) -> Specimen:
    from personafast._triton import lora_delta_

    def call() -> None:
        b = meta(adapters, rank, outputs, dtype=dtype).transpose(1, 2)
        lora_delta_(
            meta(rows, outputs, dtype=dtype),
            meta(rows, features, dtype=dtype),
            meta(adapters, rank, features, dtype=dtype),
            b if adjacent_outputs else meta(adapters, outputs, rank, dtype=dtype),
            meta(rows, dtype=torch.int32),
            meta(adapters, dtype=torch.float32),
            meta(adapters, dtype=torch.int32),
        )

    kind = str(dtype).removeprefix("torch.")
    grouped = rows > 256
    traffic = (min(rows, adapters) * rank * (features + outputs) + rows * (features + 2 * outputs)) * dtype.itemsize
    return Specimen(
        "lora_delta_",
        f"{kind}, {rows} x {features} to {outputs}, {adapters} of rank {rank}{name}",
        call,
        3 if grouped else 2,
        traffic,
        ("lora_shrink_grouped_kernel", "lora_expand_grouped_kernel") if grouped and dtype.itemsize == 2 else (),
        listed=dtype == torch.bfloat16 and not name,
    )


SPECIMENS = (
    _specimen("", 64, 4096, 4096, 16, 16),
    _specimen("", 1, 4096, 4096, 1, 16),
    _specimen("", 256, 4096, 4096, 64, 64),
    _specimen("", 4096, 4096, 4096, 4, 16),
    _specimen(", B as [M, O, R]", 64, 4096, 4096, 16, 16, torch.float16, adjacent_outputs=False),
    _specimen("", 100, 900, 1003, 300, 200),
    _specimen("", 1000, 1003, 900, 10, 200, torch.float16),
    _specimen("", 64, 4096, 4096, 16, 16, torch.float32),
    _specimen("", 1000, 4096, 4096, 16, 64, torch.float32),
)
