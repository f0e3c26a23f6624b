"""What follows a sum: the one end of every kernel, and the kernel that adds up a split sum."""

# mypy: ignore-errors
# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["activated", "finish", "sum_parts"]


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
    start,
    slots,
    known,
    factors,
    part,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    BN: tl.constexpr,
    BM: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_FACTORS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Store a block of sums, (BN, BM) fp32: finished, or as one part of a split sum.

    The rows of the block begin at ``start``; ``slots`` (BM,) says which row of the result each
    column goes to, and ``known`` which of them there are. From 16 on an activation is gated: the
    rows are of a gate and of what it gates, in turns of eight (which one thread of the tensor
    cores holds together), and the result has half as many.

    Shapes: factors (BM,), what columns are multiplied by; bias (rows,), residual and out (M, N), or
    out (SPLIT_K, M, N) fp32.
    """
    GATED: tl.constexpr = ACTIVATION >= 16
    rows = start + tl.arange(0, BN)
    if HAS_BIAS:
        most = N
        if GATED:
            most = tl.cdiv(N, 8) * 16
        acc += tl.load(bias_ptr + rows, mask=rows < most, other=0.0).to(tl.float32)[:, None]
    if GATED:
        pairs = acc.reshape((BN // 16, 2, 8, BM)).permute((0, 2, 3, 1))
        gate, gated = tl.split(pairs)
        value = activated(gate, ACTIVATION - 16) * gated
        value = value.reshape((BN // 2, BM))
        rows = start // 2 + tl.arange(0, BN // 2)
    else:
        value = activated(acc, ACTIVATION)
    here = (rows < N)[:, None] & known[None, :]
    at = slots[None, :].to(tl.int64) * N + rows[:, None]
    if SPLIT_K > 1:
        out_ptr += part.to(tl.int64) * M * N
    if HAS_FACTORS:
        value *= factors[None, :]
    if HAS_RESIDUAL:
        value += tl.load(residual_ptr + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def sum_parts(
    parts_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    R,
    N,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """Add the parts of a split sum in their order, so that the result is the same each time.

    Shapes: parts (PARTS, M, R) fp32; what follows is `finish`'s. Grid: (blocks of R, M).
    """
    start = tl.program_id(0) * BLOCK
    slots = tl.program_id(1) + tl.arange(0, 1)
    rows = start + tl.arange(0, BLOCK)
    at = slots[None, :].to(tl.int64) * R + rows[:, None]
    inside = (rows < R)[:, None]
    total = tl.zeros((BLOCK, 1), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + part * M.to(tl.int64) * R + at, mask=inside, other=0.0)
    finish(
        total,
        start,
        slots,
        slots < M,
        slots,
        0,
        bias_ptr,
        residual_ptr,
        out_ptr,
        M,
        N,
        BLOCK,
        1,
        1,
        HAS_BIAS,
        HAS_RESIDUAL,
        False,
        ACTIVATION,
    )
