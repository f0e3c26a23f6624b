"""How W4A8 sums: nibbles become int8 or fp8 in registers, exactly, up to a power of two."""

# mypy: ignore-errors
# pyright: basic
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["w4a8_sums"]


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
def centred_halves(packed, zeros, HIGH: tl.constexpr, FAST: tl.constexpr):
    """The low or high nibble of each byte, from 0 to 15, minus a zero point (rows, 1) int8.

    Four bytes are subtracted at once: with 128 added to each, none borrows from the next, and
    taking it away again is flipping the bit that is the sign. Source: own.
    """
    if FAST:
        centre = zeros + tl.zeros_like(packed)
        if HIGH:
            value = tl.inline_asm_elementwise(
                "{.reg .b32 t; shr.u32 t, $1, 4;"
                "lop3.b32 t, t, 0x0f0f0f0f, 0x80808080, 0xea;"
                "sub.u32 t, t, $2; xor.b32 $0, t, 0x80808080;}",
                "=r,r,r",
                [packed, centre],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
        else:
            value = tl.inline_asm_elementwise(
                "{.reg .b32 t; lop3.b32 t, $1, 0x0f0f0f0f, 0x80808080, 0xea;"
                "sub.u32 t, t, $2; xor.b32 $0, t, 0x80808080;}",
                "=r,r,r",
                [packed, centre],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
    elif HIGH:
        value = ((packed >> 4) & 15) - zeros
    else:
        value = (packed & 15) - zeros
    return value


@triton.jit
def float_halves(packed, HIGH: tl.constexpr, FAST: tl.constexpr):
    """The low or high nibble of each byte, a sign and three bits, times 2^-9, as e4m3.

    The three bits are a mantissa without an exponent: a subnormal of e4m3 has exactly the value
    of its mantissa times 2^-9. Source: own.
    """
    if FAST:
        if HIGH:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t; shr.u32 t, $1, 4; and.b32 t, t, 0x07070707;"
                "lop3.b32 $0, $1, 0x80808080, t, 0xea;}",
                "=r,r",
                [packed],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
        else:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t; shl.b32 t, $1, 4; and.b32 t, t, 0x80808080;"
                "lop3.b32 $0, $1, 0x07070707, t, 0xea;}",
                "=r,r",
                [packed],
                dtype=tl.int8,
                is_pure=True,
                pack=4,
            )
    elif HIGH:
        bits = (packed & -128) | ((packed >> 4) & 7)
    else:
        bits = ((packed << 4) & -128) | (packed & 7)
    return bits.to(tl.float8e4nv, bitcast=True)


@triton.jit
def halves(
    packed,
    centre,
    HIGH: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    INTEGER: tl.constexpr,
    FAST: tl.constexpr,
):
    """One half of a span, in whichever form the weights have."""
    if not INTEGER:
        value = float_halves(packed, HIGH, FAST)
    elif HAS_ZEROS:
        value = centred_halves(packed, centre, HIGH, FAST)
    else:
        value = signed_halves(packed, HIGH, FAST)
    return value


@triton.jit
def w4a8_sums(
    x_at,
    weight_at,
    scales_ptr,
    zeros_ptr,
    rows,
    known,
    first,
    last,
    stride_scales,
    BM: tl.constexpr,
    BN: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    INTEGER: tl.constexpr,
    FAST: tl.constexpr,
):
    """Give dequantised @ x, (BN, BM) fp32, over the spans from first to last.

    Shapes: x_at (PIECE, BM) and weight_at (BN, PIECE), pointers of the first span, whose halves are
    PIECE wide, 64 or 128; scales fp32 and zeros uint8 (groups, rows). GROUP is 0 or 128.
    """
    # Halves of a span that share a scale.
    SHARE: tl.constexpr = 2 if GROUP == 0 or GROUP >= 2 * PIECE else 1
    TOTAL: tl.constexpr = tl.int32 if INTEGER else tl.float32
    # What unpacking made larger or smaller.
    FACTOR: tl.constexpr = (1.0 if HAS_ZEROS else 0.0625) if INTEGER else 512.0
    total = tl.zeros((BN, BM), TOTAL)
    acc = tl.zeros((BN, BM), tl.float32)
    centre = tl.zeros((BN, 1), tl.int8)
    if HAS_ZEROS and GROUP == 0:
        centre = tl.load(zeros_ptr + rows).to(tl.int8)[:, None]
    for step in range(first, last):
        packed = tl.load(weight_at)
        low = tl.load(x_at, mask=known, other=0.0)
        high = tl.load(x_at + PIECE, mask=known, other=0.0)
        group = step if SHARE == 2 else 2 * step
        if GROUP != 0:
            total = tl.zeros((BN, BM), TOTAL)
            if HAS_ZEROS:
                at = zeros_ptr + group * stride_scales + rows
                centre = tl.load(at).to(tl.int8)[:, None]
        w = halves(packed, centre, False, HAS_ZEROS, INTEGER, FAST)
        total = tl.dot(w, low, total, out_dtype=TOTAL)
        if GROUP != 0 and SHARE == 1:
            scale = tl.load(scales_ptr + group * stride_scales + rows)
            acc += total.to(tl.float32) * scale[:, None]
            total = tl.zeros((BN, BM), TOTAL)
            group += 1
            if HAS_ZEROS:
                at = zeros_ptr + group * stride_scales + rows
                centre = tl.load(at).to(tl.int8)[:, None]
        w = halves(packed, centre, True, HAS_ZEROS, INTEGER, FAST)
        total = tl.dot(w, high, total, out_dtype=TOTAL)
        if GROUP != 0:
            scale = tl.load(scales_ptr + group * stride_scales + rows)
            acc += total.to(tl.float32) * scale[:, None]
        weight_at += PIECE
        x_at += 2 * PIECE
    if GROUP == 0:
        acc = total.to(tl.float32) * tl.load(scales_ptr + rows)[:, None]
    return acc * FACTOR
