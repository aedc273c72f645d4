"""Triton kernels, one file an operator; installed as `personafast._triton`. Call them through `personafast.ops`."""

from personafast._triton.add_inject_rms_norm import add_inject_rms_norm
from personafast._triton.aggregate_logits import aggregate_logits
from personafast._triton.chunk_accept import chunk_accept
from personafast._triton.chunk_scores import chunk_scores, chunk_scores_accept
from personafast._triton.compress import compress
from personafast._triton.inject import inject_
from personafast._triton.lora_delta import lora_delta_
from personafast._triton.mask_bits import pack_mask, unpack_mask
from personafast._triton.masked_linear import masked_linear
from personafast._triton.philox import philox_uniform
from personafast._triton.sparse_linear import sparse_linear
from personafast._triton.steer import steer_
from personafast._triton.token_logprobs import token_logprobs
from personafast._triton.verify_draft import verify_draft

__all__ = [
    "add_inject_rms_norm",
    "aggregate_logits",
    "chunk_accept",
    "chunk_scores",
    "chunk_scores_accept",
    "compress",
    "inject_",
    "lora_delta_",
    "masked_linear",
    "pack_mask",
    "philox_uniform",
    "sparse_linear",
    "steer_",
    "token_logprobs",
    "unpack_mask",
    "verify_draft",
]
