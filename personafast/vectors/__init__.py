"""Persona vectors (BILLY, arXiv 2510.10157): extract, blend, store."""

from personafast.vectors.blend import blend
from personafast.vectors.extract import Contrast, extract_vectors
from personafast.vectors.formats import load_vectors, save_vectors
from personafast.vectors.vector import BLOCK_OUTPUT, PersonaVector, default_blocks

__all__ = [
    "BLOCK_OUTPUT",
    "Contrast",
    "PersonaVector",
    "blend",
    "default_blocks",
    "extract_vectors",
    "load_vectors",
    "save_vectors",
]
