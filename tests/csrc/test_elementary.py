"""exp, log, expm1 and log1p of every instruction set, against float64."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

core = pytest.importorskip("personafast._C")

FUNCTIONS = {
    "exp": (core.exp, np.exp),
    "log": (core.log, np.log),
    "expm1": (core.expm1, np.expm1),
    "log1p": (core.log1p, np.log1p),
}
ULPS = {"exp": 1.02, "log": 1.02, "expm1": 1.6, "log1p": 1.6}


def apply(name, x):
    out = np.full(x.size + 2, np.nan, dtype=np.float32)
    FUNCTIONS[name][0](x.ctypes.data, out[1:].ctypes.data, x.size)
    assert np.isnan(out[[0, -1]]).all(), "wrote beyond its output"
    return out[1:-1]


def floats(name, seed):
    """Bits at random, every float of one binade, and where it matters most."""
    g = np.random.default_rng(seed)
    bits = g.integers(0, 2**32, 2**20, dtype=np.uint32).view(np.float32)
    binade = np.arange(0x3F800000, 0x40000000, 7, dtype=np.uint32).view(np.float32)
    if name == "exp":
        return np.concatenate([bits, -np.float32(104.5) * binade + 105, g.uniform(-105, 90, 2**20).astype(np.float32)])
    if name == "expm1":
        bits = bits[(np.abs(bits) < 88) | (bits < 0)]
        return np.concatenate([bits, -binade, binade, g.uniform(-105, 88, 2**20).astype(np.float32)])
    if name == "log1p":
        bits = bits[(bits >= -0.25) & (bits <= 1)]
        return np.concatenate([bits, binade - 1, -binade / 8, g.uniform(-0.25, 1, 2**20).astype(np.float32)])
    return np.concatenate([np.abs(bits), binade, binade / 2, binade * np.float32(2.0**-149)])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernel_is_within_an_ulp(name):
    x = floats(name, 0)
    x = x[~np.isnan(x)]
    with np.errstate(all="ignore"):
        exact = FUNCTIONS[name][1](x.astype(np.float64))
        rounded = exact.astype(np.float32)
        y = apply(name, x)
        finite = np.isfinite(rounded)
        assert np.array_equal(y[~finite], rounded[~finite])
        ulps = np.abs(y[finite].astype(np.float64) - exact[finite]) / np.spacing(np.abs(rounded[finite]))
    assert ulps.max() < ULPS[name], f"{ulps.max():.3f} ulp at {x[finite][ulps.argmax()]!r}"


def test_kernel_knows_the_ends_of_the_range():
    inf, nan, tiny = math.inf, math.nan, 2.0**-149
    x = np.array([-inf, -104, -1e38, -0.0, 0.0, tiny, 88.8, 1e38, inf, nan, -nan], dtype=np.float32)
    np.testing.assert_array_equal(apply("exp", x), np.array([0, 0, 0, 1, 1, 1, inf, inf, inf, nan, nan], np.float32))
    x = np.array([0.0, -0.0, 1.0, inf, nan, -nan, -1.0, -tiny, -inf], dtype=np.float32)
    np.testing.assert_array_equal(apply("log", x), np.array([-inf, -inf, 0, inf] + [nan] * 5, np.float32))
    x = np.array([-inf, -104, -1e38, -0.0, 0.0, tiny, nan, -nan], dtype=np.float32)
    np.testing.assert_array_equal(apply("expm1", x), np.array([-1, -1, -1, 0, 0, tiny, nan, nan], np.float32))
    x = np.array([-0.0, 0.0, tiny, -tiny, nan, -nan], dtype=np.float32)
    np.testing.assert_array_equal(apply("log1p", x), np.array([0, 0, tiny, -tiny, nan, nan], np.float32))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kernel_gives_a_number_the_same_result_wherever_it_stands(name):
    x = np.abs(np.random.default_rng(1).uniform(size=67)).astype(np.float32)
    whole = apply(name, x)
    for count in range(len(x)):
        assert np.array_equal(apply(name, x[:count]), whole[:count])
        assert np.array_equal(apply(name, x[count:]), whole[count:])


@pytest.mark.parametrize("isa", core.build_info()["isas_supported"])
def test_every_instruction_set(isa):
    command = (sys.executable, "-m", "pytest", "-k", "kernel", "-p", "no:cacheprovider", str(Path(__file__)))
    result = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PERSONAFAST_CPU_ISA": isa}, timeout=300
    )
    assert result.returncode == 0 and "passed" in result.stdout, result.stdout
