"""Triton kernels, one file an operator; installed as `personafast._triton`. Call them through `personafast.ops`."""

from personafast._triton.inject import inject_
from personafast._triton.philox import philox_uniform
from personafast._triton.verify_draft import verify_draft

__all__ = ["inject_", "philox_uniform", "verify_draft"]
