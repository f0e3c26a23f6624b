"""The two kernels of a low-rank product: narrow in parts, and widen, adding up the parts."""

# mypy: ignore-errors
# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl

from torchlathe.kernels.blocks.triton import finish

__all__ = ["narrowed", "widened_again"]


@triton.jit
def narrowed(
    x_ptr,
    down_ptr,
    parts_ptr,
    M,
    R,
    steps,
    stride_x,
    stride_down,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Give x @ down.T in SPLIT_K fp32 parts, (SPLIT_K, M, R).

    Shapes: x (M, K), down (R, K), R a multiple of BN. Grid: (R/BN, M/BM up, SPLIT_K).
    WIDE multiplies in fp32 (the interpreter has no bf16 arithmetic).
    """
    LIKE: tl.constexpr = tl.float32 if WIDE else x_ptr.dtype.element_ty
    start = tl.program_id(0) * BN
    rows = start + tl.arange(0, BN)
    slots = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    known = slots < M
    lanes = tl.arange(0, BK)
    each = tl.cdiv(steps, SPLIT_K)
    first = part * each
    last = tl.minimum(first + each, steps)
    down_at = down_ptr + rows[:, None].to(tl.int64) * stride_down + lanes[None, :] + first * BK
    x_at = x_ptr + slots[None, :].to(tl.int64) * stride_x + lanes[:, None] + first * BK
    acc = tl.zeros((BN, BM), tl.float32)
    for _ in range(first, last):
        w = tl.load(down_at)
        x = tl.load(x_at, mask=known[None, :], other=0.0)
        acc = tl.dot(w.to(LIKE), x.to(LIKE), acc, input_precision="ieee")
        down_at += BK
        x_at += BK
    at = slots[None, :].to(tl.int64) * R + rows[:, None]
    parts_ptr += part.to(tl.int64) * M * R
    tl.store(parts_ptr + at, acc, mask=known[None, :])


@triton.jit
def widened_again(
    parts_ptr,
    up_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    R,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Give act(sum of parts @ up.T + bias) + residual.

    The sum is rounded to the type of ``up``, as it would be between two products.

    Shapes: parts (PARTS, M, R) fp32, up (rows, R); out (M, N). Grid: (rows/BN, M/BM up).
    """
    KEPT: tl.constexpr = up_ptr.dtype.element_ty
    LIKE: tl.constexpr = tl.float32 if WIDE else KEPT
    start = tl.program_id(0) * BN
    rows = start + tl.arange(0, BN)
    slots = tl.program_id(1) * BM + tl.arange(0, BM)
    known = slots < M
    lanes = tl.arange(0, BK)
    up_at = up_ptr + rows[:, None].to(tl.int64) * R + lanes[None, :]
    parts_at = parts_ptr + slots[None, :].to(tl.int64) * R + lanes[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for _ in range(0, R // BK):
        w = tl.load(up_at)
        narrow = tl.zeros((BK, BM), tl.float32)
        for part in tl.static_range(PARTS):
            at = parts_at + part * M.to(tl.int64) * R
            narrow += tl.load(at, mask=known[None, :], other=0.0)
        acc = tl.dot(w.to(LIKE), narrow.to(KEPT).to(LIKE), acc, input_precision="ieee")
        up_at += BK
        parts_at += BK
    finish(
        acc,
        start,
        slots,
        known,
        slots,
        0,
        bias_ptr,
        residual_ptr,
        out_ptr,
        M,
        N,
        BN,
        BM,
        1,
        HAS_BIAS,
        HAS_RESIDUAL,
        False,
        ACTIVATION,
    )
