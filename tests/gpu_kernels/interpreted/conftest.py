import os

import pytest
import torch

# Triton reads TRITON_INTERPRET when a kernel is defined, so these tests have a process of their own: `make test` runs
# `TRITON_INTERPRET=1 pytest tests/gpu_kernels/interpreted` before all others.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]


@pytest.fixture(autouse=True)
def _triton():
    from personafast import ops

    with ops.use_backend("triton"):
        yield


@pytest.fixture(autouse=True)
def _poison():
    """Fresh memory is NaN, or the greatest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
