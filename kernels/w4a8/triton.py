"""The W4A8 kernel: 4-bit weights become the high halves of int8, sixteenfold and exact."""

# mypy: ignore-errors
# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl

from torchlathe.kernels.blocks.triton import finish

__all__ = ["w4a8"]


@triton.jit
def signed_halves(packed, HIGH: tl.constexpr, FAST: tl.constexpr):
    """Sixteen times the low or high nibble of each byte, a number in two's complement.

    In the high half of a byte the sign needs no extending: the high nibble takes one AND for four
    weights, the low one a shift too. Source: own.
    """
    if FAST:
        if HIGH:
            value = tl.inline_asm_elementwise(
                "and.b32 $0, $1, 0xf0f0f0f0;",
                "=r,r",
                [packed],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
        else:
            value = tl.inline_asm_elementwise(
                "{.reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xf0f0f0f0;}",
                "=r,r",
                [packed],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
    elif HIGH:
        value = packed & -16
    else:
        value = (packed << 4) & -16
    return value


@triton.jit
def w4a8(
    x_ptr,
    x_scales_ptr,
    packed_ptr,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    steps,
    stride_x,
    stride_packed,
    stride_scales,
    BM: tl.constexpr,
    BN: tl.constexpr,
    HALF: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FAST: tl.constexpr,
):
    """Give act(x @ dequantised.T * x_scales + bias) + residual, or fp32 parts of it.

    Shapes: x (M, K) int8, x_scales (M,) fp32, packed (rows, K/2) int8 in halves of HALF, scales
    (groups, rows) fp32; out (M, N), or (SPLIT_K, M, N) fp32. GROUP is 0 or 128,
    HALF 64 or 128. Grid: (rows/BN, M/BM up, SPLIT_K).
    """
    # Halves of a span that share a scale.
    SHARE: tl.constexpr = 2 if GROUP == 0 or GROUP >= 2 * HALF else 1
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    lanes = tl.arange(0, HALF)
    each = tl.cdiv(steps, SPLIT_K)
    first = part * each
    last = tl.minimum(first + each, steps)
    packed_at = packed_ptr + rows[:, None].to(tl.int64) * stride_packed + lanes[None, :]
    packed_at += first * HALF
    x_at = x_ptr + tokens[None, :].to(tl.int64) * stride_x + lanes[:, None]
    x_at += first * 2 * HALF
    known = (tokens < M)[None, :]
    total = tl.zeros((BN, BM), tl.int32)
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(first, last):
        packed = tl.load(packed_at)
        low = tl.load(x_at, mask=known, other=0)
        high = tl.load(x_at + HALF, mask=known, other=0)
        if GROUP != 0:
            total = tl.zeros((BN, BM), tl.int32)
        total = tl.dot(signed_halves(packed, False, FAST), low, total, out_dtype=tl.int32)
        if GROUP != 0 and SHARE == 1:
            scale = tl.load(scales_ptr + 2 * step * stride_scales + rows)
            acc += total.to(tl.float32) * scale[:, None]
            total = tl.zeros((BN, BM), tl.int32)
        total = tl.dot(signed_halves(packed, True, FAST), high, total, out_dtype=tl.int32)
        if GROUP != 0:
            group = step if SHARE == 2 else 2 * step + 1
            scale = tl.load(scales_ptr + group * stride_scales + rows)
            acc += total.to(tl.float32) * scale[:, None]
        packed_at += HALF
        x_at += 2 * HALF
    if GROUP == 0:
        acc = total.to(tl.float32) * tl.load(scales_ptr + rows)[:, None]
    # The weights were sixteenfold.
    x_scale = tl.load(x_scales_ptr + tokens, mask=tokens < M, other=0.0) * 0.0625
    acc *= x_scale[None, :]
    finish(
        acc,
        rows,
        tokens,
        part,
        bias_ptr,
        residual_ptr,
        out_ptr,
        M,
        N,
        SPLIT_K,
        HAS_BIAS,
        HAS_RESIDUAL,
        ACTIVATION,
    )
