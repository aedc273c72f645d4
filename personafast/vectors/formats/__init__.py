"""Persona vectors in files: ours and those of other projects, one file here a format.

Every project numbers layers in its own way, and a vector that lands one block off is wrong without a sign of it. Each
format here states its rule (`convention`) and which row of a file belongs to which 0-based block (`row_label`).
"""

from personafast.vectors.formats.conventions import FORMATS, Format, recognise
from personafast.vectors.formats.load import load_vectors
from personafast.vectors.formats.save import save_vectors

__all__ = ["FORMATS", "Format", "load_vectors", "recognise", "save_vectors"]
