"""The core's own threads, as Python meets them: after a fork, under several threads, and more of them than cores."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from personafast import ops

pytest.importorskip("personafast._C")

# What the core makes of `inputs`, at 2^16 multiply-adds a part.
PARTS = 4 * 1024 * 512 // 2**16


@pytest.fixture(autouse=True)
def the_core():
    with ops.use_backend("cpu"):
        yield


@pytest.fixture
def threads():
    """Sets torch's number of threads, which is also the core's, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def inputs(seed):
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(4, 512, generator=g), torch.randn(1024, 512, generator=g)
    masks = torch.randint(-(2**31), 2**31, (3, 1024, 16), generator=g, dtype=torch.int64).to(torch.int32)
    return x, weight, masks, torch.tensor([0, 2, -1, 1], dtype=torch.int32)


def masked_linear(seed):
    return ops.masked_linear(*inputs(seed))


def code_of_child(run):
    """Forks, calls `run` in the child and returns its exit code, negative for a signal."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(60)
            code = run()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def threads_alive():
    return len(os.listdir("/proc/self/task"))


def test_a_forked_child_has_threads_of_its_own(threads):
    threads(2)
    arguments = inputs(0)
    expected = ops.masked_linear(*arguments)

    def child():
        # Nothing that torch computes on threads: its own do not outlive a fork.
        before = threads_alive()
        same = all(torch.equal(ops.masked_linear(*arguments), expected) for _ in range(20))
        return 0 if same and before == 1 and threads_alive() == 2 else 2

    assert code_of_child(child) == 0
    assert torch.equal(ops.masked_linear(*arguments), expected)


def test_more_threads_than_cores(threads):
    arguments = inputs(0)
    threads(1)
    expected = ops.masked_linear(*arguments)
    many = 3 * (os.cpu_count() or 1) + 1
    threads(many)

    def child():
        same = all(torch.equal(ops.masked_linear(*arguments), expected) for _ in range(20))
        return 0 if same and threads_alive() == min(many, PARTS) else 2

    assert code_of_child(child) == 0


def test_several_threads_may_call_at_once(threads):
    threads(2)
    expected = [masked_linear(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as callers:
        for _ in range(10):
            for result, right in zip(callers.map(masked_linear, range(4)), expected, strict=True):
                assert torch.equal(result, right)


def test_a_wrong_setting_is_named(threads, monkeypatch):
    threads(2)
    arguments = inputs(0)
    monkeypatch.setenv("PERSONAFAST_SPIN_US", "soon")

    def child():
        try:
            ops.masked_linear(*arguments)
        except RuntimeError as error:
            return 0 if str(error) == "PERSONAFAST_SPIN_US=soon: expected microseconds, 0 to 1000000000" else 2
        return 3

    assert code_of_child(child) == 0
