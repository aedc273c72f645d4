"""Launching the CUDA C++ kernels of the core: on the device of the tensors, in torch's current stream of it."""

from __future__ import annotations

import functools

import torch

from personafast.ops import _backend


def launch(name: str, index: int, *args: int | float) -> None:
    """Call the launcher `name` of the core, such as "inject_cuda", with `args` and the stream.

    Args:
        name: a function of `personafast._C`.
        index: the device that every address in `args` belongs to.
        args: in the order of the operator's header.

    Raises:
        KernelError: CUDA refused the launch. Later launches are not affected, unless CUDA says that its context is
            lost.
    """
    if index != torch._C._cuda_getDevice():
        with torch.cuda.device(index):
            return launch(name, index, *args)
    getattr(_backend.module("cuda"), name)(*args, torch._C._cuda_getCurrentRawStream(index))


@functools.cache
def has_clusters(index: int) -> bool:
    """Whether device `index` runs blocks in clusters that share their memory: compute capability 9.0 and later."""
    return torch.cuda.get_device_capability(index) >= (9, 0)
