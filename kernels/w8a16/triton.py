"""How W8A16 sums and unpacks: bytes become fp16 or bf16 in registers, exactly."""

# mypy: ignore-errors
# pyright: basic
# ruff: noqa: SIM300
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["unpack_w8", "w8a16_sums"]


@triton.jit
def bytes_of(words, HIGH: tl.constexpr, LIKE: tl.constexpr, FAST: tl.constexpr):
    """The low or high byte of each word minus 128, in the type LIKE.

    fp16 holds 1024 + u for a byte u exactly, in the byte's own bits. bf16 holds 128 + v for seven
    bits v, and of that 128, or 256 where the eighth bit is unset, is taken away. Source: own; the
    first is FasterTransformer's.
    """
    if FAST and LIKE == tl.float16:
        if HIGH:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t, k; mov.b32 k, 0x64646464; prmt.b32 t, $1, k, 0x4341;"
                "mov.b32 k, 0x64806480; sub.f16x2 $0, t, k;}",
                "=r,r",
                [words],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        else:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t, k; mov.b32 k, 0x64646464; prmt.b32 t, $1, k, 0x4240;"
                "mov.b32 k, 0x64806480; sub.f16x2 $0, t, k;}",
                "=r,r",
                [words],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        value = bits.to(tl.float16, bitcast=True)
    elif FAST and LIKE == tl.bfloat16:
        if HIGH:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t, a, b, n; mov.b32 n, 0xbf80bf80; shr.u32 t, $1, 8;"
                "lop3.b32 a, t, 0x007f007f, 0x43004300, 0xea;"
                "lop3.b32 b, t, 0x00800080, 0x43004300, 0xae; fma.rn.bf16x2 $0, b, n, a;}",
                "=r,r",
                [words],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        else:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 a, b, n; mov.b32 n, 0xbf80bf80;"
                "lop3.b32 a, $1, 0x007f007f, 0x43004300, 0xea;"
                "lop3.b32 b, $1, 0x00800080, 0x43004300, 0xae; fma.rn.bf16x2 $0, b, n, a;}",
                "=r,r",
                [words],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        value = bits.to(tl.bfloat16, bitcast=True)
    elif HIGH:
        value = (((words >> 8) & 255) - 128).to(LIKE)
    else:
        value = ((words & 255) - 128).to(LIKE)
    return value


@triton.jit
def w8a16_sums(
    x_at,
    weight_at,
    scales_ptr,
    rows,
    known,
    first,
    last,
    stride_scales,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    LIKE: tl.constexpr,
    UNPACKED: tl.constexpr,
    FAST: tl.constexpr,
):
    """Give dequantised @ x, (BN, BM) fp32, over the spans from first to last.

    Shapes: x_at (PIECE, BM) and weight_at (BN, PIECE), pointers of the first span, whose halves are
    PIECE wide; scales (groups, rows). GROUP is 0 for one scale per row, or a span.
    """
    total = tl.zeros((BN, BM), tl.float32)
    acc = tl.zeros((BN, BM), tl.float32)
    for step in range(first, last):
        words = tl.load(weight_at)
        low = tl.load(x_at, mask=known, other=0.0)
        high = tl.load(x_at + PIECE, mask=known, other=0.0)
        if GROUP != 0:
            total = tl.zeros((BN, BM), tl.float32)
        w = bytes_of(words, False, UNPACKED, FAST).to(LIKE)
        total = tl.dot(w, low.to(LIKE), total, input_precision="ieee")
        w = bytes_of(words, True, UNPACKED, FAST).to(LIKE)
        total = tl.dot(w, high.to(LIKE), total, input_precision="ieee")
        if GROUP != 0:
            scale = tl.load(scales_ptr + step * stride_scales + rows).to(tl.float32)
            acc += total * scale[:, None]
        weight_at += PIECE
        x_at += 2 * PIECE
    if GROUP == 0:
        acc = total * tl.load(scales_ptr + rows).to(tl.float32)[:, None]
    return acc


@triton.jit
def unpack_w8(
    words_ptr,
    scales_ptr,
    out_ptr,
    K,
    stride_words,
    stride_scales,
    BN: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Give the dequantised weights, (rows, K). Grid: (rows/BN, spans)."""
    HALF: tl.constexpr = 64
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    span = tl.program_id(1)
    lanes = tl.arange(0, HALF)
    at = rows[:, None].to(tl.int64) * stride_words + span * HALF + lanes[None, :]
    words = tl.load(words_ptr + at)
    group = 0 if GROUP == 0 else span
    scale = tl.load(scales_ptr + group * stride_scales + rows).to(tl.float32)[:, None]
    out_at = out_ptr + rows[:, None].to(tl.int64) * K + span * 2 * HALF + lanes[None, :]
    low = bytes_of(words, False, tl.float32, False) * scale
    tl.store(out_at, low.to(out_ptr.dtype.element_ty))
    high = bytes_of(words, True, tl.float32, False) * scale
    tl.store(out_at + HALF, high.to(out_ptr.dtype.element_ty))
