"""Triton kernels, one file an operator; installed as `personafast._triton`. Call them through `personafast.ops`."""

from personafast._triton.aggregate_logits import aggregate_logits
from personafast._triton.inject import inject_
from personafast._triton.token_logprobs import token_logprobs

__all__ = ["aggregate_logits", "inject_", "token_logprobs"]
