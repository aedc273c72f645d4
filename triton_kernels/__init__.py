"""Triton kernels, one file an operator; installed as `personafast._triton`. Call them through `personafast.ops`."""

from personafast._triton.chunk_accept import chunk_accept
from personafast._triton.chunk_scores import chunk_scores, chunk_scores_accept
from personafast._triton.inject import inject_
from personafast._triton.philox import philox_uniform
from personafast._triton.verify_draft import verify_draft

__all__ = [
    "chunk_accept",
    "chunk_scores",
    "chunk_scores_accept",
    "inject_",
    "philox_uniform",
    "verify_draft",
]
