"""Persona vectors (BILLY, arXiv 2510.10157): extract, blend, store."""

from personafast.vectors.blend import blend
from personafast.vectors.extract import Contrast, extract_vectors
from personafast.vectors.vector import PersonaVector, default_blocks

__all__ = ["Contrast", "PersonaVector", "blend", "default_blocks", "extract_vectors"]
