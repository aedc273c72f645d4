"""Triton kernels, one file an operator; installed as `personafast._triton`. Call them through `personafast.ops`."""

from personafast._triton.inject import inject_
from personafast._triton.masked_linear import masked_linear

__all__ = ["inject_", "masked_linear"]
