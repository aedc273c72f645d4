"""The operators: each is `personafast.ops.<name>` and `torch.ops.personafast.<name>`, on every backend alike.

Importing this imports torch and nothing else: no triton, no transformers.
"""

from personafast.ops import philox
from personafast.ops._add_inject_rms_norm import add_inject_rms_norm
from personafast.ops._aggregate_logits import aggregate_logits
from personafast.ops._aggregator import Aggregator
from personafast.ops._attend import attend
from personafast.ops._backend import BACKENDS, available, chosen, use_backend
from personafast.ops._chunk_accept import chunk_accept
from personafast.ops._chunk_scores import chunk_scores
from personafast.ops._chunk_scores_accept import chunk_scores_accept
from personafast.ops._inject import inject_
from personafast.ops._linear import linear
from personafast.ops._lora_delta import lora_delta_
from personafast.ops._mask_bits import pack_mask, unpack_mask
from personafast.ops._masked_linear import masked_linear
from personafast.ops._rms_norm import rms_norm
from personafast.ops._silu_mul import silu_mul
from personafast.ops._sparse_linear import compress, sparse_linear
from personafast.ops._steer import SteerMode, steer_
from personafast.ops._token_logprobs import token_logprobs
from personafast.ops._verify_draft import verify_draft

__all__ = [
    "BACKENDS",
    "Aggregator",
    "SteerMode",
    "add_inject_rms_norm",
    "aggregate_logits",
    "attend",
    "available",
    "chosen",
    "chunk_accept",
    "chunk_scores",
    "chunk_scores_accept",
    "compress",
    "inject_",
    "linear",
    "lora_delta_",
    "masked_linear",
    "pack_mask",
    "philox",
    "rms_norm",
    "silu_mul",
    "sparse_linear",
    "steer_",
    "token_logprobs",
    "unpack_mask",
    "use_backend",
    "verify_draft",
]
