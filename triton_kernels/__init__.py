"""Triton kernels, one file an operator; installed as `personafast._triton`. Call them through `personafast.ops`."""

from personafast._triton.inject import inject_
from personafast._triton.token_logprobs import token_logprobs

__all__ = ["inject_", "token_logprobs"]
