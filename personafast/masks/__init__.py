"""Persona subnetworks (arXiv 2602.07164): calibrate, build, store masks."""

from personafast.masks.build import build_mask, calibrate
from personafast.masks.mask import PersonaMask

__all__ = ["PersonaMask", "build_mask", "calibrate"]
