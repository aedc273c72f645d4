"""Weight-only quantisation that runs on a CPU here: baselines that read fewer bits a weight, with their error."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from benchmarks.case import Absent, Contender, Inputs, nbytes

GROUP = 64


def baselines(first: Callable[[Inputs], Inputs] | None = None) -> tuple[Contender, ...]:
    """int8 and int4 linears over `inputs.weight`, or over that of `first(inputs)`."""

    def after(pack: Callable[[Inputs], Inputs]) -> Callable[[Inputs], Inputs]:
        return pack if first is None else lambda inputs: pack(first(inputs))

    return (
        Contender("int8 weight-only (torch)", _int8, _traffic, after(_pack_int8), _resident, approximate=0.02),
        Contender(
            f"int4 weight-only, groups of {GROUP} (torch)",
            _int4,
            _traffic,
            after(_pack_int4),
            _resident,
            approximate=0.2,
        ),
        Contender("int8 dynamic (torch)", _dynamic, _dynamic_traffic, after(_pack_dynamic), approximate=0.05),
        Contender(
            "int8 weight-only (torchao, compiled)", _torchao, _dynamic_traffic, after(_pack_torchao), approximate=0.02
        ),
    )


def _traffic(inputs: Inputs) -> int:
    return nbytes(inputs.x, *inputs.packed) + 2 * inputs.x.shape[0] * inputs.outputs


def _resident(inputs: Inputs) -> int:
    return nbytes(*inputs.packed)


def _per_row(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (weight.float().abs().amax(1) / 127).clamp(min=1e-12)
    return (weight.float() / scale[:, None]).round().to(torch.int8), scale


def _pack_int8(inputs: Inputs) -> Inputs:
    if not hasattr(torch, "_weight_int8pack_mm"):
        raise Absent("this torch has no _weight_int8pack_mm")
    values, scale = _per_row(inputs.weight)
    return SimpleNamespace(x=inputs.x, packed=(values, scale.to(inputs.x.dtype)), outputs=values.shape[0])


def _int8(inputs: Inputs) -> torch.Tensor:
    return torch._weight_int8pack_mm(inputs.x, *inputs.packed)


def _pack_int4(inputs: Inputs) -> Inputs:
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        raise Absent("this torch has no _weight_int4pack_mm_for_cpu")
    weight = inputs.weight
    outputs, features = weight.shape
    groups = weight.float().view(outputs, features // GROUP, GROUP)
    low, high = groups.amin(2), groups.amax(2)
    scale = ((high - low) / 15).clamp(min=1e-12)
    # Values 0 to 15 stand for scale * (value - 8) + zero.
    values = ((groups - low[..., None]) / scale[..., None]).round().to(torch.int32).view(outputs, features)
    scale_and_zero = torch.stack((scale, low + 8 * scale), -1).transpose(0, 1).contiguous().to(inputs.x.dtype)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    return SimpleNamespace(x=inputs.x, packed=(packed, scale_and_zero), outputs=outputs)


def _int4(inputs: Inputs) -> torch.Tensor:
    packed, scale_and_zero = inputs.packed
    return torch.ops.aten._weight_int4pack_mm_for_cpu(inputs.x, packed, GROUP, scale_and_zero)


def _pack_dynamic(inputs: Inputs) -> Inputs:
    values, scale = _per_row(inputs.weight)
    outputs, features = values.shape
    try:
        zeros = torch.zeros(outputs, dtype=torch.long)
        warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
        quantised = torch._make_per_channel_quantized_tensor(values, scale.double(), zeros, 0)
        packed = torch.ops.quantized.linear_prepack(quantised, None)
    except (AttributeError, RuntimeError) as error:
        raise Absent(f"this torch has no dynamic int8 linear ({str(error).splitlines()[0]})") from None
    return SimpleNamespace(x=inputs.x, linear=packed, outputs=outputs, features=features)


def _dynamic(inputs: Inputs) -> torch.Tensor:
    # The operator takes and gives float32.
    return torch.ops.quantized.linear_dynamic(inputs.x.float(), inputs.linear, True).to(inputs.x.dtype)


def _dynamic_traffic(inputs: Inputs) -> int:
    return inputs.outputs * inputs.features + nbytes(inputs.x) + 2 * inputs.x.shape[0] * inputs.outputs


@functools.cache
def _compiled_linear() -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    # As torchao's own pages say to use it; eager, it unpacks the weight first.
    return torch.compile(lambda x, weight: F.linear(x, weight), mode="max-autotune", dynamic=False)


def _pack_torchao(inputs: Inputs) -> Inputs:
    try:
        quantization = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise Absent(f"torchao is not installed ({error})") from None
    outputs, features = inputs.weight.shape
    linear = torch.nn.Linear(features, outputs, bias=False, device="meta")
    linear.weight = torch.nn.Parameter(inputs.weight.clone(), requires_grad=False)
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    packed = SimpleNamespace(x=inputs.x, quantised=linear.weight, outputs=outputs, features=features)
    try:
        _torchao(packed)
    except Exception as error:  # a compiler that is missing or fails is not ours to mend
        raise Absent(f"torchao does not run compiled here ({type(error).__name__})") from None
    return packed


def _torchao(inputs: Inputs) -> torch.Tensor:
    return _compiled_linear()(inputs.x, inputs.quantised)
