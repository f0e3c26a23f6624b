"""The W4A16 kernels: a product that unpacks weights in registers, and plain unpacking.

The weights are the left operand, so that the tensor cores take them from registers: words come by
16-byte asynchronous copies and ``ldmatrix`` and never go back to shared memory. A word holds
four weights that lie a quarter of a span apart, so that unpacking is elementwise.
"""

# mypy: ignore-errors
# pyright: basic
# ruff: noqa: SIM300
from __future__ import annotations

import triton
import triton.language as tl

from torchlathe.kernels.blocks.triton import activated, finish, nibbles

__all__ = ["unpack_w4", "w4a16", "w4a16_experts"]


@triton.jit
def sums(
    x_at,
    words_at,
    scales_ptr,
    zeros_ptr,
    rows,
    known,
    first,
    last,
    stride_scales,
    BM: tl.constexpr,
    BN: tl.constexpr,
    QUARTER: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    LIKE: tl.constexpr,
    UNPACKED: tl.constexpr,
    FAST: tl.constexpr,
):
    """Give dequantised @ x, (BN, BM) fp32, over the spans from first to last.

    Shapes: x_at (QUARTER, BM) and words_at (BN, QUARTER), pointers of the first span; scales and
    zeros (groups, rows). LIKE is what is multiplied, UNPACKED what words become first.
    """
    SPAN: tl.constexpr = 4 * QUARTER
    # Nibbles of a word that share a scale.
    SHARE: tl.constexpr = 4 if GROUP == 0 or GROUP >= SPAN else GROUP // QUARTER
    # With subnormals the odd nibbles count sixteenfold, and are summed apart.
    APART: tl.constexpr = FAST and UNPACKED == tl.float16
    acc = tl.zeros((BN, BM), tl.float32)
    even = tl.zeros((BN, BM), tl.float32)
    odd = tl.zeros((BN, BM), tl.float32)
    centre = tl.full((BN, 1), 8, tl.int16)
    if HAS_ZEROS and GROUP == 0:
        centre = tl.load(zeros_ptr + rows).to(tl.int16)[:, None]
    for span in range(first, last):
        words = tl.load(words_at)
        for j in tl.static_range(4):
            if GROUP != 0:
                group = (span * SPAN + j * QUARTER) // GROUP
                if j % SHARE == 0:
                    even = tl.zeros((BN, BM), tl.float32)
                    odd = tl.zeros((BN, BM), tl.float32)
                    if HAS_ZEROS:
                        at = zeros_ptr + group * stride_scales + rows
                        centre = tl.load(at).to(tl.int16)[:, None]
            x = tl.load(x_at + j * QUARTER, mask=known, other=0.0)
            w = nibbles(words, centre, j, UNPACKED, FAST).to(LIKE)
            if APART and j % 2 == 1:
                odd = tl.dot(w, x.to(LIKE), odd, input_precision="ieee")
            else:
                even = tl.dot(w, x.to(LIKE), even, input_precision="ieee")
            if GROUP != 0 and j % SHARE == SHARE - 1:
                total = even
                if APART and SHARE == 1 and j % 2 == 1:
                    total = odd * 0.0625
                elif APART and SHARE > 1:
                    total = even + odd * 0.0625
                scale = tl.load(scales_ptr + group * stride_scales + rows).to(tl.float32)
                acc += total * scale[:, None]
        words_at += QUARTER
        x_at += SPAN
    if GROUP == 0:
        scale = tl.load(scales_ptr + rows).to(tl.float32)
        acc = even
        if APART:
            acc = even + odd * 0.0625
        acc = acc * scale[:, None]
    if APART:
        acc = acc * 16777216.0  # 2^24, for the subnormals
    return acc


@triton.jit
def w4a16(
    x_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    residual_ptr,
    narrow_ptr,
    up_ptr,
    out_ptr,
    M,
    N,
    spans,
    stride_x,
    stride_words,
    stride_scales,
    BM: tl.constexpr,
    BN: tl.constexpr,
    QUARTER: tl.constexpr,
    GROUP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    RANK: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    FAST: tl.constexpr,
):
    """Give act(x @ dequantised.T + bias) + residual, or with SPLIT_K > 1 fp32 parts of it.

    Shapes: x (M, K) fp16 or bf16; words (rows, K/4) int16, scales and zeros (groups, rows), rows a
    multiple of BN; narrow (M, RANK) and up (rows, RANK) add up @ narrow where RANK is not 0;
    out (M, N), or (SPLIT_K, M, N) fp32. Grid: (rows/BN, M/BM up, SPLIT_K).
    GROUP is 0 for one scale per row, else a multiple of QUARTER that divides 4 * QUARTER or is a
    multiple of it. WIDE multiplies in fp32 (the interpreter has no bf16 arithmetic).
    """
    LIKE: tl.constexpr = tl.float32 if WIDE else x_ptr.dtype.element_ty
    UNPACKED: tl.constexpr = x_ptr.dtype.element_ty if FAST else LIKE
    SPAN: tl.constexpr = 4 * QUARTER

    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    tokens = tl.program_id(1) * BM + tl.arange(0, BM)
    part = tl.program_id(2)
    lanes = tl.arange(0, QUARTER)
    each = tl.cdiv(spans, SPLIT_K)
    first = part * each
    last = tl.minimum(first + each, spans)

    words_at = words_ptr + rows[:, None].to(tl.int64) * stride_words + lanes[None, :]
    words_at += first * QUARTER
    x_at = x_ptr + tokens[None, :].to(tl.int64) * stride_x + lanes[:, None]
    x_at += first * SPAN
    known = (tokens < M)[None, :]

    acc = sums(
        x_at,
        words_at,
        scales_ptr,
        zeros_ptr,
        rows,
        known,
        first,
        last,
        stride_scales,
        BM,
        BN,
        QUARTER,
        GROUP,
        HAS_ZEROS,
        LIKE,
        UNPACKED,
        FAST,
    )
    if RANK > 0 and part == 0:
        # The low-rank term: up (rows, RANK) times down's product with x, (M, RANK).
        ranks = tl.arange(0, RANK)
        up = tl.load(up_ptr + rows[:, None] * RANK + ranks[None, :])
        narrow = tl.load(
            narrow_ptr + tokens[None, :] * RANK + ranks[:, None], mask=known, other=0.0
        )
        acc = tl.dot(up.to(LIKE), narrow.to(LIKE), acc, input_precision="ieee")
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


@triton.jit
def w4a16_experts(
    x_ptr,
    order_ptr,
    blocks_ptr,
    words_ptr,
    scales_ptr,
    zeros_ptr,
    weights_ptr,
    out_ptr,
    N,
    spans,
    stride_x,
    stride_words,
    stride_scales,
    words_each,
    scales_each,
    BM: tl.constexpr,
    BN: tl.constexpr,
    QUARTER: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    FAST: tl.constexpr,
):
    """Give act(x[order] @ dequantised[expert].T) * weights, each slot by the expert it belongs to.

    Shapes: x (tokens, K); order (slots,) int32, which token each slot is of; blocks (blocks, 3)
    int32: expert, first slot, and one past its last; words (experts, rows, K/4), scales and zeros
    (experts, groups, rows), weights (slots,) fp32; out (slots, N). Grid: (rows/BN, blocks).
    """
    LIKE: tl.constexpr = tl.float32 if WIDE else x_ptr.dtype.element_ty
    UNPACKED: tl.constexpr = x_ptr.dtype.element_ty if FAST else LIKE
    block = tl.program_id(1)
    expert = tl.load(blocks_ptr + 3 * block).to(tl.int64)
    first = tl.load(blocks_ptr + 3 * block + 1)
    end = tl.load(blocks_ptr + 3 * block + 2)
    if first < end:
        rows = tl.program_id(0) * BN + tl.arange(0, BN)
        slots = first + tl.arange(0, BM)
        known = slots < end
        tokens = slots
        if HAS_ORDER:
            tokens = tl.load(order_ptr + slots, mask=known, other=0)
        lanes = tl.arange(0, QUARTER)
        words_at = words_ptr + expert * words_each
        words_at = words_at + rows[:, None].to(tl.int64) * stride_words + lanes[None, :]
        x_at = x_ptr + tokens[None, :].to(tl.int64) * stride_x + lanes[:, None]
        acc = sums(
            x_at,
            words_at,
            scales_ptr + expert * scales_each,
            zeros_ptr + expert * scales_each,
            rows,
            known[None, :],
            0,
            spans,
            stride_scales,
            BM,
            BN,
            QUARTER,
            GROUP,
            HAS_ZEROS,
            LIKE,
            UNPACKED,
            FAST,
        )
        acc = activated(acc, ACTIVATION)
        if HAS_WEIGHTS:
            acc *= tl.load(weights_ptr + slots, mask=known, other=0.0)[None, :]
        at = slots[None, :].to(tl.int64) * N + rows[:, None]
        here = (rows < N)[:, None] & known[None, :]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=here)


@triton.jit
def unpack_w4(
    words_ptr,
    scales_ptr,
    zeros_ptr,
    out_ptr,
    K,
    stride_words,
    stride_scales,
    BN: tl.constexpr,
    QUARTER: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):
    """Give the dequantised weights, (rows, K). Grid: (rows/BN, spans)."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    span = tl.program_id(1)
    lanes = tl.arange(0, QUARTER)
    at = rows[:, None].to(tl.int64) * stride_words + span * QUARTER + lanes[None, :]
    words = tl.load(words_ptr + at)
    out_at = out_ptr + rows[:, None].to(tl.int64) * K + span * 4 * QUARTER + lanes[None, :]
    for j in tl.static_range(4):
        group = 0
        if GROUP != 0:
            group = (span * 4 * QUARTER + j * QUARTER) // GROUP
        scale = tl.load(scales_ptr + group * stride_scales + rows).to(tl.float32)
        centre = tl.full((BN, 1), 8, tl.int16)
        if HAS_ZEROS:
            centre = tl.load(zeros_ptr + group * stride_scales + rows).to(tl.int16)[:, None]
        value = (((words >> (4 * j)) & 15) - centre).to(tl.float32) * scale[:, None]
        tl.store(out_at + j * QUARTER, value.to(out_ptr.dtype.element_ty))
