"""Triton kernels, one file an operator; installed as `personafast._triton`. Call them through `personafast.ops`."""

from personafast._triton.inject import inject_
from personafast._triton.lora_delta import lora_delta_

__all__ = ["inject_", "lora_delta_"]
