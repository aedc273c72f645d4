"""Triton kernels, one file an operator; installed as `personafast._triton`. Call them through `personafast.ops`."""

from personafast._triton.add_inject_rms_norm import add_inject_rms_norm
from personafast._triton.aggregate_logits import aggregate_logits
from personafast._triton.inject import inject_
from personafast._triton.mask_bits import pack_mask, unpack_mask
from personafast._triton.steer import steer_
from personafast._triton.token_logprobs import token_logprobs

__all__ = ["add_inject_rms_norm", "aggregate_logits", "inject_", "pack_mask", "steer_", "token_logprobs", "unpack_mask"]
