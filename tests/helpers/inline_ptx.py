"""The few instructions of PTX that kernels have inline, for the interpreter, which knows none: lanes are the last axis.

Semantics and the operand layout of mma.m16n8k16 are those of NVIDIA's PTX ISA, sections 9.7.14 (mma) and 9.7.
"""

import re
from contextlib import contextmanager

import numpy as np
from triton._C.libtriton import interpreter as memory
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, _get_np_dtype

WARP = 32


@contextmanager
def understood():
    """Within it the interpreter runs inline assembly."""
    before = InterpreterBuilder.create_inline_asm
    InterpreterBuilder.create_inline_asm = lambda self, *args: _Results(*args)
    try:
        yield
    finally:
        InterpreterBuilder.create_inline_asm = before


class _Results:
    def __init__(self, text, constraints, values, types, pure, pack):
        assert pack == 1
        registers = {f"${len(types) + i}": value.data for i, value in enumerate(values)}
        _run(text, registers)
        self.results = [
            TensorHandle(_as(registers[f"${i}"], _get_np_dtype(kind.scalar)), kind.scalar)
            for i, kind in enumerate(types)
        ]

    def get_result(self, index):
        return self.results[index]


def _as(bits, dtype):
    """The same bits in a dtype of the same width, or a number of fewer bits."""
    array = np.ascontiguousarray(bits)
    return array.view(dtype) if array.dtype.itemsize == np.dtype(dtype).itemsize else array.astype(dtype)


def _run(text, registers):
    text = re.sub(r"//[^\n]*", "", text).replace("\n", " ").strip().removeprefix("{ ").removesuffix("}")
    for line in filter(None, map(str.strip, text.split(";"))):
        if line.startswith(".reg"):
            continue
        guard, name, operands = re.fullmatch(r"(?:@(\w+) )?([\w.:]+) (.*)", line).groups()
        names = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", operands)
        _execute(name, names, registers, None if guard is None else registers[guard])


def _execute(name, names, registers, guard):
    shape = np.broadcast_shapes(*(value.shape for value in registers.values()))

    def read(operand, dtype=np.uint32):
        if operand == "%laneid":
            return np.broadcast_to(np.arange(WARP, dtype=dtype), shape)
        if operand.isdigit():
            return np.full(shape, int(operand), dtype)
        return _as(np.broadcast_to(registers[operand], shape), dtype)

    target, *sources = names
    if name == "and.b32":
        result = read(sources[0]) & read(sources[1])
    elif name == "setp.ne.u32":
        result = read(sources[0]) != read(sources[1])
    elif name in ("mov.b32", "mov.u32"):
        result = read(sources[0])
    elif name == "mov.b64":
        low, high = re.findall(r"[^\s,{}]+", sources[0])
        result = read(low).astype(np.uint64) | read(high).astype(np.uint64) << np.uint64(32)
    elif name == "popc.b32":
        result = sum((read(sources[0]) >> np.uint32(bit)) & 1 for bit in range(32)).astype(np.uint32)
    elif name == "add.u32":
        result = read(sources[0]) + read(sources[1])
    elif name == "mad.lo.u32":
        result = read(sources[0]) * read(sources[1]) + read(sources[2])
    elif name == "ld.global.nc.L2::256B.u16":
        address = read(sources[0][1:-1], np.uint64)
        active = np.ones(shape, bool) if guard is None else guard
        result = memory.load(address, active, np.zeros(shape, np.uint16), np.dtype(np.uint16)).astype(np.uint32)
    elif name.startswith("mma.sync.aligned.m16n8k16.row.col.f32."):
        _multiply("bf16" in name, names, registers, read)
        return
    else:
        raise NotImplementedError(name)
    registers[target] = result if guard is None else np.where(guard, result, read(target, result.dtype.type))


def _multiply(bfloat, names, registers, read):
    first, second, added = (re.findall(r"[^\s,{}]+", group) for group in names[1:])
    a, b = [read(name) for name in first], [read(name) for name in second]
    c = [read(name, np.float32) for name in added]
    shape = a[0].shape

    def halves(words):
        """[..., 32, 2]: both numbers of every word."""
        pair = np.stack([words & np.uint32(0xFFFF), words >> np.uint32(16)], -1)
        if bfloat:
            return (pair << np.uint32(16)).view(np.float32)
        return pair.astype(np.uint16).view(np.float16).astype(np.float32)

    def place(words):
        """[..., 8 groups, 8 columns]: lane 4 g + q has columns 2 q and 2 q + 1 of row g."""
        return halves(words).reshape(*shape[:-1], 8, 8)

    upper = np.concatenate([place(a[0]), place(a[2])], -1)
    lower = np.concatenate([place(a[1]), place(a[3])], -1)
    rows = np.concatenate([upper, lower], -2)  # [..., m, k]
    columns = np.concatenate([place(b[0]), place(b[1])], -1)  # [..., n, k]
    product = rows @ np.swapaxes(columns, -1, -2)  # [..., 16, 8]
    split = product.reshape(*shape[:-1], 2, 8, 4, 2)
    for index, name in enumerate(re.findall(r"[^\s,{}]+", names[0])):
        registers[name] = c[index] + split[..., index // 2, :, :, index % 2].reshape(shape)
