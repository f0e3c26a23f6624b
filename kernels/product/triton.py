"""The one kernel that multiplies by packed weights: of one layer, or of each slot's expert.

A format of weights says how sums come about (``w4a16_sums`` and its like); where they begin, what
is added to them and how they end is the same for all.
"""

# mypy: ignore-errors
# pyright: basic
# ruff: noqa: SIM109
from __future__ import annotations

import triton
import triton.language as tl

from torchlathe.kernels.blocks.triton import finish
from torchlathe.kernels.w4a8.triton import w4a8_sums
from torchlathe.kernels.w4a16.triton import w4a16_sums
from torchlathe.kernels.w8a8.triton import w8a8_sums
from torchlathe.kernels.w8a16.triton import w8a16_sums

__all__ = ["product"]

# In the order of `torchlathe.kernels.blocks.launching.KINDS`.
W4A16 = tl.constexpr(0)
W8A16 = tl.constexpr(1)
W8A8 = tl.constexpr(2)
W4A8 = tl.constexpr(3)


@triton.jit
def product(
    x_ptr,
    x_scales_ptr,
    weight_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    residual_ptr,
    narrow_ptr,
    up_ptr,
    order_ptr,
    places_ptr,
    blocks_ptr,
    weights_ptr,
    out_ptr,
    M,
    N,
    steps,
    stride_x,
    stride_weight,
    stride_scales,
    weight_each,
    scales_each,
    KIND: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    RANK: tl.constexpr,
    EXPERTS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    FAST: tl.constexpr,
):
    """Give act(x @ dequantised.T + bias) * weights + residual, or with SPLIT_K > 1 fp32 parts.

    Shapes: x (tokens, K); x_scales (tokens,) fp32 where x has 8 bits; weight (rows, packed), scales
    and zeros (groups, rows), rows a multiple of BN; narrow (M, RANK) and up (rows, RANK) add
    up @ narrow where RANK is not 0; out (M, N), or (SPLIT_K, M, N) fp32. A step is PIECES pieces of
    PIECE columns. WIDE multiplies in fp32 (the interpreter has no bf16 arithmetic).

    With EXPERTS, weight, scales and zeros have experts first, weight_each and scales_each apart;
    blocks (blocks, 3) int32: expert, first slot, and one past its last; order (M,) int32, which
    token each slot is of; places (M,) int32, which row of the result it goes to; weights (M,) fp32.

    Grid: (rows/BN, M/BM up or blocks, SPLIT_K).
    """
    EIGHT: tl.constexpr = KIND == W8A8 or KIND == W4A8
    INTEGER: tl.constexpr = x_ptr.dtype.element_ty == tl.int8
    LIKE: tl.constexpr = tl.float32 if WIDE else x_ptr.dtype.element_ty
    UNPACKED: tl.constexpr = x_ptr.dtype.element_ty if FAST else LIKE
    start = tl.program_id(0) * BN
    part = tl.program_id(2)
    if EXPERTS:
        at = blocks_ptr + 3 * tl.program_id(1)
        expert = tl.load(at).to(tl.int64)
        begin = tl.load(at + 1)
        end = tl.load(at + 2)
        if begin >= end:
            return
        weight_ptr += expert * weight_each
        scales_ptr += expert * scales_each
        zeros_ptr += expert * scales_each
    else:
        begin = tl.program_id(1) * BM
        end = M
    rows = start + tl.arange(0, BN)
    slots = begin + tl.arange(0, BM)
    known = slots < end
    tokens = slots
    if HAS_ORDER:
        tokens = tl.load(order_ptr + slots, mask=known, other=0)
    lanes = tl.arange(0, PIECE)
    each = tl.cdiv(steps, SPLIT_K)
    first = part * each
    last = tl.minimum(first + each, steps)
    weight_at = weight_ptr + rows[:, None].to(tl.int64) * stride_weight + lanes[None, :]
    weight_at += first * PIECE
    x_at = x_ptr + tokens[None, :].to(tl.int64) * stride_x + lanes[:, None]
    x_at += first * PIECES * PIECE
    there = known[None, :]

    if KIND == W4A16:
        acc = w4a16_sums(
            x_at,
            weight_at,
            scales_ptr,
            zeros_ptr,
            rows,
            there,
            first,
            last,
            stride_scales,
            BM,
            BN,
            PIECE,
            GROUP,
            HAS_ZEROS,
            LIKE,
            UNPACKED,
            FAST,
        )
    elif KIND == W8A16:
        acc = w8a16_sums(
            x_at,
            weight_at,
            scales_ptr,
            rows,
            there,
            first,
            last,
            stride_scales,
            BM,
            BN,
            PIECE,
            GROUP,
            LIKE,
            UNPACKED,
            FAST,
        )
    elif KIND == W8A8:
        acc = w8a8_sums(
            x_at, weight_at, scales_ptr, rows, there, first, last, BM, BN, PIECE, INTEGER
        )
    else:
        acc = w4a8_sums(
            x_at,
            weight_at,
            scales_ptr,
            zeros_ptr,
            rows,
            there,
            first,
            last,
            stride_scales,
            BM,
            BN,
            PIECE,
            GROUP,
            HAS_ZEROS,
            INTEGER,
            FAST,
        )
    if EIGHT:
        acc *= tl.load(x_scales_ptr + tokens, mask=known, other=0.0)[None, :]
    if RANK > 0 and part == 0:
        # The low-rank term: up (rows, RANK) times down's product with x, (M, RANK).
        TERM: tl.constexpr = tl.float32 if WIDE else narrow_ptr.dtype.element_ty
        ranks = tl.arange(0, RANK)
        up = tl.load(up_ptr + rows[:, None] * RANK + ranks[None, :])
        narrow_at = narrow_ptr + tokens[None, :] * RANK + ranks[:, None]
        narrow = tl.load(narrow_at, mask=there, other=0.0)
        acc = tl.dot(up.to(TERM), narrow.to(TERM), acc, input_precision="ieee")
    goes = slots
    if HAS_PLACES:
        goes = tl.load(places_ptr + slots, mask=known, other=0)
    factors = known
    if HAS_WEIGHTS:
        factors = tl.load(weights_ptr + slots, mask=known, other=0.0)
    finish(
        acc,
        start,
        goes,
        known,
        factors,
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
        HAS_WEIGHTS,
        ACTIVATION,
    )
