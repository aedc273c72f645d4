import sys
from pathlib import Path

# The benchmarks are a package at the root of the repository and no part of an installation. Last on the path, so that
# an installed personafast is not hidden by the sources.
sys.path.append(str(Path(__file__).resolve().parents[2]))
