"""Persona subnetworks (arXiv 2602.07164): calibrate, build, compare, store masks."""

from personafast.masks.authors import read_authors_masks
from personafast.masks.build import build_mask, build_opposing_masks, mix_masks
from personafast.masks.calibration import calibrate
from personafast.masks.checkpoint import export_compressed, load_compressed
from personafast.masks.export import export_masked
from personafast.masks.mask import PersonaMask
from personafast.masks.report import ModuleDifference, ModuleShare, differences, shares
from personafast.masks.sources import CalibrationText, read_texts
from personafast.masks.statistics import CalibrationStatistics

__all__ = [
    "CalibrationStatistics",
    "CalibrationText",
    "ModuleDifference",
    "ModuleShare",
    "PersonaMask",
    "build_mask",
    "build_opposing_masks",
    "calibrate",
    "differences",
    "export_compressed",
    "export_masked",
    "load_compressed",
    "mix_masks",
    "read_authors_masks",
    "read_texts",
    "shares",
]
