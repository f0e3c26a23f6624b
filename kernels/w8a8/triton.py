"""How W8A8 sums: int8 by int8 in int32, or fp8 by fp8 in fp32."""

# mypy: ignore-errors
# pyright: basic
# ruff: noqa: SIM108
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["w8a8_sums"]


@triton.jit
def w8a8_sums(
    x_at,
    weight_at,
    scales_ptr,
    rows,
    known,
    first,
    last,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PIECE: tl.constexpr,
    INTEGER: tl.constexpr,
):
    """Give weight @ x * scales, (BN, BM) fp32, over the steps of PIECE from first to last.

    Shapes: x_at (PIECE, BM) and weight_at (BN, PIECE), pointers of the first step; scales (rows,).
    """
    if INTEGER:
        total = tl.zeros((BN, BM), tl.int32)
    else:
        total = tl.zeros((BN, BM), tl.float32)
    for _ in range(first, last):
        w = tl.load(weight_at)
        if INTEGER:
            x = tl.load(x_at, mask=known, other=0)
            total = tl.dot(w, x, total, out_dtype=tl.int32)
        else:
            x = tl.load(x_at, mask=known, other=0.0)
            total = tl.dot(w, x, total)
        weight_at += PIECE
        x_at += PIECE
    return total.to(tl.float32) * tl.load(scales_ptr + rows)[:, None]
