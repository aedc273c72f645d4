"""Every way an operator with a C++ kernel can run on a CPU."""

from contextlib import contextmanager
from unittest import mock

import pytest

from personafast import ops
from personafast.ops import _backend

# "kernel" is what `tests/csrc` runs under every instruction set.
BACKENDS = ["auto", "reference", "torch", pytest.param("cpu", id="kernel")]


@contextmanager
def on(backend):
    """Run on a backend, "cpu" only where the core is built; "torch" is the form where no kernel runs."""
    if backend == "torch":
        with mock.patch.object(_backend, "pick", lambda op, device, size=0: "torch"):
            yield
        return
    if backend == "cpu":
        pytest.importorskip("personafast._C")
    with ops.use_backend(backend):
        yield
