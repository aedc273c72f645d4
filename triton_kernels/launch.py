"""Launching a kernel: what it is compiled to is looked up once, then a launch is little more than the driver's call.

`kernel[grid](...)` binds arguments, asks for options and specialises anew at every call, which costs the host several
times what the launch itself does. Here a `Config` is made once for each shape, and its compiled kernel is found again
by the identity of the config and by what Triton specialises on: dtypes, alignment, and integers that are 1, divisible
by 16 or wider than 32 bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from personafast.errors import KernelError


class Device(NamedTuple):
    """What configurations are chosen by: compute capability (90 for 9.0), multiprocessors, shared bytes a block."""

    capability: int
    multiprocessors: int
    shared_bytes: int


# What the interpreter stands in for.
INTERPRETED = Device(90, 132, 227 << 10)


class Config:
    """How a kernel is compiled for one kind of call. Make it in a cached function: it is compared by identity.

    Args:
        constants: values of the kernel's constexpr parameters, which come last in its signature, in their order.
        num_warps: warps of 32 threads a program.
        num_stages: loads of a loop that are in flight at once.
        options: further options of Triton's compiler, such as maxnreg, launch_pdl or enable_fp_fusion, which is on
            unless it is said otherwise here: versions of Triton differ in what they do by themselves.
    """

    __slots__ = ("constants", "options", "values")

    def __init__(
        self, constants: Mapping[str, int | bool | float], num_warps: int = 4, num_stages: int = 3, **options: Any
    ) -> None:
        self.constants = dict(constants)
        self.values = tuple(constants.values())
        self.options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **options}

    def __repr__(self) -> str:
        return f"Config({self.constants}, {self.options})"


def device_of(tensor: torch.Tensor) -> Device:
    """The facts about the device that a kernel over `tensor` runs on."""
    return INTERPRETED if tensor.is_cpu else _facts(_index(tensor))


def cdiv(size: int, block: int) -> int:
    """Blocks that cover `size`. Triton's own, made for kernels too, takes longer than a launch of ours."""
    return -(-size // block)


def next_power_of_2(size: int) -> int:
    """The smallest power of two that is not less than `size`; see `cdiv`."""
    return 1 << (size - 1).bit_length() if size > 0 else 1


def interpreting() -> bool:
    """Whether kernels were defined under TRITON_INTERPRET=1, and so run on CPU tensors."""
    return bool(knobs.runtime.interpret)


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    config: Config,
    *args: torch.Tensor | int | float | None,
) -> None:
    """Run `kernel` over `grid` on the device of its tensors, in torch's current stream.

    Args:
        kernel: a function under `triton.jit`, its constexpr parameters last.
        grid: programs along the three axes; nothing is launched if there are none.
        config: the constexpr parameters and the options.
        args: what comes before the constexpr parameters, in order; at least one is a tensor. None is known when the
            kernel is compiled.

    Raises:
        KernelError: the kernel could not be compiled, loaded or launched. Later launches are not affected, unless CUDA
            says that its context is lost.
    """
    if not (grid[0] and grid[1] and grid[2]):
        return
    if not isinstance(kernel, JITFunction) or _watched():  # interpreted, or somebody profiles launches
        kernel[grid](*args, **config.constants, **config.options)
        return
    # Kernels live as long as their modules; Triton's own hash of one takes a lock.
    key: list[Any] = [id(kernel), config]
    passed: list[Any] = []
    tensor: torch.Tensor | None = None
    for arg in args:
        if type(arg) is int:
            key.append((arg == 1, arg % 16 == 0, -(1 << 31) <= arg < 1 << 31))
            passed.append(arg)
        elif arg is None or type(arg) is float:
            key.append(type(arg))
            passed.append(arg)
        else:
            tensor = arg
            address = arg.data_ptr()
            key.append((arg.dtype, address % 16 == 0))
            passed.append(address)
    assert tensor is not None, "a launch needs a tensor, to know its device"
    index = _index(tensor)
    if index != driver.active.get_current_device():
        with torch.cuda.device(index):
            return launch(kernel, grid, config, *args)
    key.append(index)
    resolved = _resolved.get(found := tuple(key))
    try:
        if resolved is None:
            resolved = _resolved[found] = _resolve(kernel, grid, config, args)
        run, function, metadata = resolved
        stream = driver.active.get_current_stream(index)
        run(*grid, stream, function, metadata, None, None, None, *passed, *config.values)
    except Exception as error:
        name = getattr(kernel, "__name__", str(kernel))
        size = " x ".join(map(str, grid))
        what = " ".join(str(error).split()) or type(error).__name__
        raise KernelError(f"{name}: launch of {size} programs on cuda:{index} failed: {what}") from error


# (launcher of the driver, loaded function, packed metadata) of every kind of call so far.
_resolved: dict[tuple[Any, ...], tuple[Callable[..., None], Any, Any]] = {}


def _resolve(
    kernel: Any, grid: tuple[int, int, int], config: Config, args: tuple[Any, ...]
) -> tuple[Callable[..., None], Any, Any]:
    compiled = kernel.warmup(*args, grid=grid, **config.constants, **config.options)
    return compiled.run, compiled.function, compiled.packed_metadata


def _watched() -> bool:
    """Whether a hook wants to see every launch, as Triton's own profiler does."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _index(tensor: torch.Tensor) -> int:
    # A meta tensor, with which kernels are compiled for another machine's GPU, is on the device that is current.
    return tensor.get_device() if tensor.is_cuda else driver.active.get_current_device()


@functools.cache
def _facts(index: int) -> Device:
    major, minor = driver.active.get_device_capability(index)
    properties = driver.active.utils.get_device_properties(index)
    return Device(10 * major + minor, properties["multiprocessor_count"], properties["max_shared_mem"])
