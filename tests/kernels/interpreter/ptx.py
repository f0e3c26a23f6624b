"""A small part of PTX in NumPy, so that the kernels' inline assembly runs in the interpreter."""

import re
from types import SimpleNamespace
from typing import Any

import numpy as np

__all__ = ["run_ptx"]


def run_ptx(text: str, inputs: list[np.ndarray], outputs: int) -> list[np.ndarray]:
    """Run one block of instructions on arrays of 32-bit registers."""
    registers = {f"${outputs + i}": value.astype(np.uint32) for i, value in enumerate(inputs)}
    shape = inputs[0].shape

    def read(name: str) -> np.ndarray:
        if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", name):
            return np.full(shape, int(name, 0) & 0xFFFFFFFF, np.uint32)
        return registers[name]

    for line in text.replace("{", "").replace("}", "").split(";"):
        name, _, rest = line.strip().partition(" ")
        if not name or name.startswith(".reg"):
            continue
        target, *operands = (word.strip() for word in rest.split(","))
        registers[target] = _OPERATIONS[name](*map(read, operands))
    return [registers[f"${i}"] for i in range(outputs)]


def _lop3(a, b, c, table):
    code = int(table.flat[0])
    result = np.zeros_like(a)
    for bit in range(8):
        if code >> bit & 1:
            chosen = [v if bit >> i & 1 else ~v for v, i in ((a, 2), (b, 1), (c, 0))]
            result |= chosen[0] & chosen[1] & chosen[2]
    return result


def _prmt(a, b, selector):
    both = np.stack(
        [a >> s & 0xFF for s in (0, 8, 16, 24)] + [b >> s & 0xFF for s in (0, 8, 16, 24)]
    )
    code = int(selector.flat[0])
    result = np.zeros_like(a)
    for byte in range(4):
        assert not code >> (4 * byte) & 8, "no replication of signs"
        result |= both[code >> (4 * byte) & 7] << np.uint32(8 * byte)
    return result


def _halves(value):
    return value.astype("<u4").view("<f2").reshape(*value.shape, 2)


def _from_halves(value):
    return np.ascontiguousarray(value.astype("<f2")).view("<u4").reshape(value.shape[:-1])


def _bf16(value):
    parts = np.stack([value << np.uint32(16), value & np.uint32(0xFFFF0000)], -1)
    return parts.astype("<u4").view("<f4")


def _from_bf16(value):
    bits = np.ascontiguousarray(value.astype("<f4")).view("<u4").reshape(value.shape)
    assert not np.any(bits & 0xFFFF), "the kernels round nothing here"
    return bits[..., 0] >> np.uint32(16) | bits[..., 1]


def _vsub4(a, b):
    result = np.zeros_like(a)
    for shift in (0, 8, 16, 24):
        result |= ((a >> shift & 0xFF) - (b >> shift & 0xFF) & 0xFF) << np.uint32(shift)
    return result


_OPERATIONS: dict[str, Any] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shr.u32": lambda a, b: a >> b,
    "shl.b32": lambda a, b: a << b,
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "sub.f16x2": lambda a, b: _from_halves(_halves(a) - _halves(b)),
    "fma.rn.f16x2": lambda a, b, c: _from_halves(
        _halves(a).astype("f8") * _halves(b).astype("f8") + _halves(c).astype("f8")
    ),
    "fma.rn.bf16x2": lambda a, b, c: _from_bf16(_bf16(a) * _bf16(b) + _bf16(c)),
    "sub.u32": lambda a, b: a - b,
    "vsub4": _vsub4,
}


def install() -> None:
    """Let the interpreter run inline assembly."""
    from triton.runtime import interpreter

    def create_inline_asm(self, text, constraints, values, types, pure, pack):
        outputs = constraints.count("=")
        arrays = np.broadcast_arrays(*(value.data for value in values))
        packed = [_packed(array, pack) for array in arrays]
        results = run_ptx(text, packed, outputs)
        handles = [
            interpreter.TensorHandle(_unpacked(result, arrays[0].shape, kind), kind.scalar)
            for result, kind in zip(results, types, strict=True)
        ]
        return SimpleNamespace(get_result=lambda i: handles[i])

    interpreter.InterpreterBuilder.create_inline_asm = create_inline_asm


def _packed(array, pack):
    assert array.dtype.itemsize * pack == 4
    return np.ascontiguousarray(array).view("<u4")


def _unpacked(result, shape, kind):
    dtype = {16: "<i2", 8: "|i1", 32: "<i4"}[kind.scalar.primitive_bitwidth]
    return np.ascontiguousarray(result.astype("<u4")).view(dtype).reshape(shape)
