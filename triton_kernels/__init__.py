"""Triton kernels, one file an operator; installed as `personafast._triton`. Call them through `personafast.ops`."""

from personafast._triton.add_inject_rms_norm import add_inject_rms_norm
from personafast._triton.inject import inject_
from personafast._triton.mask_bits import pack_mask, unpack_mask
from personafast._triton.steer import steer_

__all__ = ["add_inject_rms_norm", "inject_", "pack_mask", "steer_", "unpack_mask"]
