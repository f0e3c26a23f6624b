"""The W8A8 kernel: int8 or fp8 products of few tokens, scaled by token and by output feature."""

# mypy: ignore-errors
# pyright: basic
# ruff: noqa: SIM108
from __future__ import annotations

import triton
import triton.language as tl

from torchlathe.kernels.blocks.triton import finish

__all__ = ["w8a8"]


@triton.jit
def w8a8(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    scales_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    steps,
    stride_x,
    stride_weight,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    INTEGER: tl.constexpr,
):
    """Give act(x @ weight.T * x_scales * scales + bias) + residual, or fp32 parts of it.

    Shapes: x (M, K) and weight (rows, K) int8 or fp8; x_scales (M,) and scales (rows,) fp32; out
    (M, N), or (SPLIT_K, M, N) fp32. Grid: (rows/BN, M/BM up, SPLIT_K).
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    lanes = tl.arange(0, BK)
    each = tl.cdiv(steps, SPLIT_K)
    first = part * each
    last = tl.minimum(first + each, steps)
    weight_at = weight_ptr + rows[:, None].to(tl.int64) * stride_weight + lanes[None, :]
    weight_at += first * BK
    x_at = x_ptr + tokens[None, :].to(tl.int64) * stride_x + lanes[:, None]
    x_at += first * BK
    known = (tokens < M)[None, :]
    if INTEGER:
        total = tl.zeros((BN, BM), tl.int32)
    else:
        total = tl.zeros((BN, BM), tl.float32)
    for _ in range(first, last):
        w = tl.load(weight_at)
        if INTEGER:
            x = tl.load(x_at, mask=known, other=0)
        else:
            x = tl.load(x_at, mask=known, other=0.0)
        if INTEGER:
            total = tl.dot(w, x, total, out_dtype=tl.int32)
        else:
            total = tl.dot(w, x, total)
        weight_at += BK
        x_at += BK
    acc = total.to(tl.float32) * tl.load(scales_ptr + rows)[:, None]
    acc *= tl.load(x_scales_ptr + tokens, mask=tokens < M, other=0.0)[None, :]
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
