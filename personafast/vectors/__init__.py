"""Persona vectors (BILLY, arXiv 2510.10157): extract, blend, store, look at."""

from personafast.vectors.blend import blend
from personafast.vectors.blended import blended_vector
from personafast.vectors.extract import extract_vectors
from personafast.vectors.formats import load_vectors, save_vectors
from personafast.vectors.orthogonal import orthogonalise, remove_component
from personafast.vectors.project import Projection, project
from personafast.vectors.report import BlendReport, BlockReport, blend_report
from personafast.vectors.responses import Sampling
from personafast.vectors.similarity import cosines
from personafast.vectors.sources import Contrast, Response, Responses, TextPairs
from personafast.vectors.traits import TraitPrompts
from personafast.vectors.vector import BLOCK_OUTPUT, PersonaVector, default_blocks

__all__ = [
    "BLOCK_OUTPUT",
    "BlendReport",
    "BlockReport",
    "Contrast",
    "PersonaVector",
    "Projection",
    "Response",
    "Responses",
    "Sampling",
    "TextPairs",
    "TraitPrompts",
    "blend",
    "blend_report",
    "blended_vector",
    "cosines",
    "default_blocks",
    "extract_vectors",
    "load_vectors",
    "orthogonalise",
    "project",
    "remove_component",
    "save_vectors",
]
