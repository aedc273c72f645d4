"""Triton kernels, one file an operator; installed as `personafast._triton`. Call them through `personafast.ops`."""

from personafast._triton.compress import compress
from personafast._triton.inject import inject_
from personafast._triton.sparse_linear import sparse_linear

__all__ = ["compress", "inject_", "sparse_linear"]
