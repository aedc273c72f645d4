"""Persona vectors (BILLY, arXiv 2510.10157): extract, blend, store."""

from personafast.vectors.blend import blend
from personafast.vectors.extract import extract_vectors
from personafast.vectors.responses import Sampling
from personafast.vectors.sources import Contrast, Response, Responses, TextPairs
from personafast.vectors.traits import TraitPrompts
from personafast.vectors.vector import BLOCK_OUTPUT, PersonaVector, default_blocks

__all__ = [
    "BLOCK_OUTPUT",
    "Contrast",
    "PersonaVector",
    "Response",
    "Responses",
    "Sampling",
    "TextPairs",
    "TraitPrompts",
    "blend",
    "default_blocks",
    "extract_vectors",
]
