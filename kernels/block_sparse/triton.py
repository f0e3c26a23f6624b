"""The block-sparse kernel: stored blocks of the weights are the left operand, one after another."""

# mypy: ignore-errors
# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl

from torchlathe.kernels.blocks.triton import finish

__all__ = ["block_sparse"]


@triton.jit
def block_sparse(
    x_ptr,
    values_ptr,
    columns_ptr,
    offsets_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    M,
    N,
    stride_x,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Give act(x @ weight.T + bias) + residual, or with SPLIT_K > 1 fp32 parts of it.

    Shapes: x (M, K), values (blocks, BN, BN) in the type of x, columns (blocks,) and offsets
    (rows/BN + 1,) int32; out (M, N), or (SPLIT_K, M, N) fp32. Grid: (rows/BN, M/BM up, SPLIT_K).
    WIDE multiplies in fp32 (the interpreter has no bf16 arithmetic).
    """
    LIKE: tl.constexpr = tl.float32 if WIDE else x_ptr.dtype.element_ty
    row = tl.program_id(0)
    slots = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    known = slots < M
    lanes = tl.arange(0, BN)
    begin = tl.load(offsets_ptr + row)
    end = tl.load(offsets_ptr + row + 1)
    each = tl.cdiv(end - begin, SPLIT_K)
    first = begin + part * each
    last = tl.minimum(first + each, end)
    values_at = values_ptr + first.to(tl.int64) * BN * BN + lanes[:, None] * BN + lanes[None, :]
    x_at = x_ptr + slots[None, :].to(tl.int64) * stride_x + lanes[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for block in range(first, last):
        column = tl.load(columns_ptr + block)
        w = tl.load(values_at)
        x = tl.load(x_at + column * BN, mask=known[None, :], other=0.0)
        acc = tl.dot(w.to(LIKE), x.to(LIKE), acc, input_precision="ieee")
        values_at += BN * BN
    finish(
        acc,
        row * BN,
        slots,
        known,
        slots,
        part,
        bias_ptr,
        residual_ptr,
        out_ptr,
        M,
        N,
        BN,
        BM,
        SPLIT_K,
        HAS_BIAS,
        HAS_RESIDUAL,
        False,
        ACTIVATION,
    )
