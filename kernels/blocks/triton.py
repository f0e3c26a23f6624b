"""Functions that kernels call, and the kernel that adds up the parts of a split sum.

``FAST`` chooses inline PTX where there is a plain form with the same meaning beside it: the
plain form is what other vendors' GPUs and Triton's interpreter run.
"""

# mypy: ignore-errors
# pyright: basic
# ruff: noqa: SIM108, SIM300
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activated", "finish", "nibbles", "sum_parts"]


@triton.jit
def nibbles(words, zeros, J: tl.constexpr, LIKE: tl.constexpr, FAST: tl.constexpr):
    """Nibble J of each word, minus a zero point, in the type LIKE.

    In fp16 with FAST the value is scaled: by 2^-24 where J is even, and by 2^-20 where it is odd.
    A 4-bit number in the low bits of an fp16 is a subnormal of exactly that value, tensor cores
    take subnormals as they are, and so one AND per two weights unpacks, and one subtraction
    centres, both exact. In bf16, whose subnormals would leave the range of the sums, the number
    is put behind the exponent of 128, where it is exact too.

    Args:
        words: (rows, quarter) int16.
        zeros: (rows, 1) int16, the zero points.
        J: Which nibble, 0 to 3.
        LIKE: tl.float16, tl.bfloat16 or tl.float32.
        FAST: Whether to use PTX (never for float32).

    Source: own; that tensor cores take subnormals: Fasi et al. 2021, Numerical behavior of NVIDIA
    tensor cores, section 4.2.
    """
    if FAST and LIKE == tl.float16:
        if J % 2 == 0:
            centre = zeros + tl.zeros_like(words)
        else:
            centre = (zeros << 4) + tl.zeros_like(words)
        if J == 0:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t; and.b32 t, $1, 0x000f000f; sub.f16x2 $0, t, $2;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        elif J == 1:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t; and.b32 t, $1, 0x00f000f0; sub.f16x2 $0, t, $2;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        elif J == 2:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t; shr.u32 t, $1, 8; and.b32 t, t, 0x000f000f; sub.f16x2 $0, t, $2;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        else:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t; shr.u32 t, $1, 8; and.b32 t, t, 0x00f000f0; sub.f16x2 $0, t, $2;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        value = bits.to(tl.float16, bitcast=True)
    elif FAST and LIKE == tl.bfloat16:
        # 0x4300 is 128 in bf16, whose last bit counts 1; -1 is 0xbf80.
        centre = (zeros | 0x4300) + tl.zeros_like(words)
        if J == 0:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t, n; mov.b32 n, 0xbf80bf80;"
                "lop3.b32 t, $1, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, $2, n, t;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        elif J == 1:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t, n; mov.b32 n, 0xbf80bf80; shr.u32 t, $1, 4;"
                "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, $2, n, t;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        elif J == 2:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t, n; mov.b32 n, 0xbf80bf80; shr.u32 t, $1, 8;"
                "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, $2, n, t;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        else:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t, n; mov.b32 n, 0xbf80bf80; shr.u32 t, $1, 12;"
                "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, $2, n, t;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        value = bits.to(tl.bfloat16, bitcast=True)
    else:
        value = (((words >> (4 * J)) & 15) - zeros).to(LIKE)
    return value


@triton.jit
def activated(value, ACTIVATION: tl.constexpr):
    """An activation of fp32 values: 0 none, 1 ReLU, 2 SiLU, 3 GELU, 4 GELU by tanh."""
    if ACTIVATION == 1:
        value = tl.maximum(value, 0.0)
    elif ACTIVATION == 2:
        value = value * tl.sigmoid(value)
    elif ACTIVATION == 3:
        value = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == 4:
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)
        value = value * tl.sigmoid(2.0 * inner)
    return value


@triton.jit
def finish(
    acc,
    rows,
    tokens,
    part,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Store a block of sums, (rows, tokens) fp32: finished, or as one part of a split sum.

    Shapes: bias (N,); residual and out (M, N), or out (SPLIT_K, M, N) fp32.
    """
    here = (rows < N)[:, None] & (tokens < M)[None, :]
    at = tokens[None, :].to(tl.int64) * N + rows[:, None]
    if SPLIT_K > 1:
        tl.store(out_ptr + part.to(tl.int64) * M * N + at, acc, mask=here)
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
        acc = activated(acc, ACTIVATION)
        if HAS_RESIDUAL:
            acc += tl.load(residual_ptr + at, mask=here, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def sum_parts(
    parts_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Add the parts of a split sum in their order, so that the result is the same each time.

    Shapes: parts (PARTS, M, N) fp32, bias (N,), residual and out (M, N). Grid: (blocks of N, M).
    """
    row = tl.program_id(1)
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        at = (part * M + row).to(tl.int64) * N
        total += tl.load(parts_ptr + at + columns, mask=inside, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    total = activated(total, ACTIVATION)
    at = row.to(tl.int64) * N
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + at + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at + columns, total.to(out_ptr.dtype.element_ty), mask=inside)
