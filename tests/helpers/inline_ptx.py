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
    """The results of an assembly text for all elements, `pack` of them at a time.

    As on a GPU, elements of less than 32 bits share a register, the first in the lowest bits, and others have one each.
    """

    def __init__(self, text, constraints, values, types, pure, pack):
        kinds = [_get_np_dtype(kind.scalar) for kind in types]
        given = [register for value in values for register in _registers(value.data, pack)]
        made = [max(1, pack * np.dtype(kind).itemsize // 4) for kind in kinds]
        letters = constraints.split(",")
        assert len(letters) == sum(made) + len(given), "one constraint a register"
        assert all(letter.startswith("=") == (i < sum(made)) for i, letter in enumerate(letters))
        statements = _statements(text)
        _check_clobbers(statements, letters)
        registers = {f"${sum(made) + i}": value for i, value in enumerate(given)}
        _run(statements, registers)
        self.results, first = [], 0
        for kind, count, scalar in zip(kinds, made, (kind.scalar for kind in types), strict=True):
            parts = [registers[f"${first + i}"] for i in range(count)]
            self.results.append(TensorHandle(_elements(parts, kind, pack), scalar))
            first += count

    def get_result(self, index):
        return self.results[index]


def _registers(data, pack):
    """The registers of one operand, each for every `pack` elements along the last axis."""
    data = np.ascontiguousarray(data)
    if pack == 1:
        return [data]
    if data.itemsize < 4:
        assert pack * data.itemsize == 4, "registers that are not full are not modelled"
        return [data.view(np.uint32)]
    return [data[..., i::pack] for i in range(pack)]


def _elements(parts, kind, pack):
    """The reverse of `_registers`."""
    if pack == 1:
        return _as(parts[0], kind)
    if np.dtype(kind).itemsize < 4:
        return np.ascontiguousarray(parts[0]).view(kind)
    return np.stack([_as(part, kind) for part in parts], -1).reshape(*parts[0].shape[:-1], -1)


def _check_clobbers(statements, letters):
    """A result that is written while an input is still to be read must be marked: it may share the input's register."""
    outputs = [f"${i}" for i, letter in enumerate(letters) if letter.startswith("=")]
    for number, (_, _, operands) in enumerate(statements):
        written = re.findall(r"\$\d+", operands[0])
        for name in set(written) & set(outputs):
            later = {word for _, _, rest in statements[number + 1 :] for word in re.findall(r"\$\d+", " ".join(rest))}
            late_inputs = later - set(outputs)
            safe = "&" in letters[outputs.index(name)] or not late_inputs
            assert safe, f"{name} is written before {late_inputs} is read"


def _as(bits, dtype):
    """The same bits in a dtype of the same width, or a number of fewer bits."""
    array = np.ascontiguousarray(bits)
    return array.view(dtype) if array.dtype.itemsize == np.dtype(dtype).itemsize else array.astype(dtype)


def _statements(text):
    """(guard, name, operands) of every instruction."""
    text = re.sub(r"//[^\n]*", "", text).replace("\n", " ").strip().removeprefix("{ ").removesuffix("}")
    found = []
    for line in filter(None, map(str.strip, text.split(";"))):
        if not line.startswith(".reg"):
            guard, name, operands = re.fullmatch(r"(?:@(!?\w+) )?([\w.:]+) (.*)", line).groups()
            found.append((guard, name, re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s]+", operands)))
    return found


def _run(statements, registers):
    for guard, name, operands in statements:
        active = None
        if guard is not None:
            active = ~registers[guard[1:]] if guard.startswith("!") else registers[guard]
        _execute(name, operands, registers, active)


def _execute(name, names, registers, guard):
    shape = np.broadcast_shapes(*(value.shape for value in registers.values()))

    def read(operand, dtype=np.uint32):
        if operand == "%laneid":
            return np.broadcast_to(np.arange(WARP, dtype=dtype), shape)
        if operand[0].isdigit():
            return np.full(shape, int(operand, 0), dtype)
        return _as(np.broadcast_to(registers[operand], shape), dtype)

    target, *sources = names
    if name == "and.b32":
        result = read(sources[0]) & read(sources[1])
    elif name == "shl.b32":
        result = read(sources[0]) << read(sources[1])
    elif name == "prmt.b32":
        result = _permute(*(read(source) for source in sources))
    elif name == "fma.rn.f32":
        result = _fma(*(read(source, np.float32) for source in sources))
    elif name in ("setp.ne.u32", "setp.ne.b32"):
        result = read(sources[0]) != read(sources[1])
    elif name in ("mov.b32", "mov.u32", "mov.f32"):
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


def _permute(a, b, selector):
    """Byte i of the result is that of b:a which nibble i of the selector says; with its top bit, its sign 8 times."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        nibble = selector >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint32) & np.uint32(255)
        byte = np.where(nibble >> np.uint32(3) != 0, (byte >> np.uint32(7)) * np.uint32(255), byte)
        result |= byte << np.uint32(8 * i)
    return result


def _fma(a, b, c):
    """Rounded once, but for a second rounding from 53 bits."""
    with np.errstate(invalid="ignore", over="ignore"):
        return (a.astype(np.float64) * b + c).astype(np.float32)
