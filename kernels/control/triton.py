"""W4A16 as most kernels do it: x on the left, GPTQ's layout, weights through shared memory.

Source: the layout of GPTQ and the loop of GemLite's and vLLM's Triton kernels, rewritten.
"""

# mypy: ignore-errors
# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["gptq_w4a16"]


@triton.jit
def gptq_w4a16(
    x_ptr,
    words_ptr,
    scales_ptr,
    out_ptr,
    M,
    N,
    K,
    stride_x,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Give x @ dequantised.T, with eight weights along K in each int32 of (K/8, N)."""
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    lanes = tl.arange(0, BK)
    x_at = x_ptr + tokens[:, None] * stride_x + lanes[None, :]
    words_at = words_ptr + (lanes[:, None] // 8) * N + columns[None, :]
    shift = (lanes % 8) * 4
    acc = tl.zeros((BM, BN), tl.float32)
    for step in range(0, K // BK):
        x = tl.load(x_at, mask=(tokens < M)[:, None], other=0.0)
        words = tl.load(words_at)
        scale = tl.load(scales_ptr + step * N + columns)
        w = (((words >> shift[:, None]) & 15) - 8).to(x.dtype) * scale[None, :]
        acc = tl.dot(x, w, acc)
        x_at += BK
        words_at += BK // 8 * N
    at = tokens[:, None] * N + columns[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(tokens < M)[:, None])
