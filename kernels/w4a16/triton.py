"""How W4A16 sums and unpacks: words of four weights become numbers in registers.

The weights are the left operand, so that the tensor cores take them from registers: words come by
16-byte asynchronous copies and ``ldmatrix`` and never go back to shared memory. A word holds
four weights that lie a quarter of a span apart, so that unpacking is elementwise.

``FAST`` chooses inline PTX where there is a plain form with the same meaning beside it: the
plain form is what other vendors' GPUs and Triton's interpreter run.
"""

# mypy: ignore-errors
# pyright: basic
# ruff: noqa: SIM108, SIM300
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["unpack_w4", "w4a16_sums"]


@triton.jit
def nibbles(words, zeros, J: tl.constexpr, LIKE: tl.constexpr, FAST: tl.constexpr):
    """Nibble J of each word, minus a zero point, in the type LIKE.

    In fp16 with FAST the value is scaled: by 2^-24 where J is even, and by 2^-20 where it is odd.
    A 4-bit number in the low bits of an fp16 is a subnormal of exactly that value, tensor cores
    take subnormals as they are, and so one AND per two weights unpacks, and one subtraction
    centres, both exact. In bf16, whose subnormals would leave the range of the sums, the number
    is put behind the exponent of 128, where it is exact too.

    Args:
        words: (rows, quarter) int16.
        zeros: (rows, 1) int16, the zero points.
        J: Which nibble, 0 to 3.
        LIKE: tl.float16, tl.bfloat16 or tl.float32.
        FAST: Whether to use PTX (never for float32).

    Source: own; that tensor cores take subnormals: Fasi et al. 2021, Numerical behavior of NVIDIA
    tensor cores, section 4.2.
    """
    if FAST and LIKE == tl.float16:
        if J % 2 == 0:
            centre = zeros + tl.zeros_like(words)
        else:
            centre = (zeros << 4) + tl.zeros_like(words)
        if J == 0:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t; and.b32 t, $1, 0x000f000f; sub.f16x2 $0, t, $2;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        elif J == 1:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t; and.b32 t, $1, 0x00f000f0; sub.f16x2 $0, t, $2;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        elif J == 2:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t; shr.u32 t, $1, 8; and.b32 t, t, 0x000f000f; sub.f16x2 $0, t, $2;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        else:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t; shr.u32 t, $1, 8; and.b32 t, t, 0x00f000f0; sub.f16x2 $0, t, $2;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        value = bits.to(tl.float16, bitcast=True)
    elif FAST and LIKE == tl.bfloat16:
        # 0x4300 is 128 in bf16, whose last bit counts 1; -1 is 0xbf80.
        centre = (zeros | 0x4300) + tl.zeros_like(words)
        if J == 0:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t, n; mov.b32 n, 0xbf80bf80;"
                "lop3.b32 t, $1, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, $2, n, t;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        elif J == 1:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t, n; mov.b32 n, 0xbf80bf80; shr.u32 t, $1, 4;"
                "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, $2, n, t;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        elif J == 2:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t, n; mov.b32 n, 0xbf80bf80; shr.u32 t, $1, 8;"
                "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, $2, n, t;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        else:
            bits = tl.inline_asm_elementwise(
                "{.reg .b32 t, n; mov.b32 n, 0xbf80bf80; shr.u32 t, $1, 12;"
                "lop3.b32 t, t, 0x000f000f, 0x43004300, 0xea; fma.rn.bf16x2 $0, $2, n, t;}",
                "=r,r,r",
                [words, centre],
                dtype=tl.int16,
                is_pure=True,
                pack=2,
            )
        value = bits.to(tl.bfloat16, bitcast=True)
    else:
        value = (((words >> (4 * J)) & 15) - zeros).to(LIKE)
    return value


@triton.jit
def w4a16_sums(
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
    LIKE: tl.constexpr,
    UNPACKED: tl.constexpr,
    FAST: tl.constexpr,
):
    """Give dequantised @ x, (BN, BM) fp32, over the spans from first to last.

    Shapes: x_at (PIECE, BM) and weight_at (BN, PIECE), pointers of the first span, whose quarters
    are PIECE wide; scales and zeros (groups, rows). GROUP is 0 for one scale per row, else a
    multiple of PIECE that divides 4 * PIECE or is a multiple of it. LIKE is what is multiplied,
    UNPACKED what words become first.
    """
    SPAN: tl.constexpr = 4 * PIECE
    # Nibbles of a word that share a scale.
    SHARE: tl.constexpr = 4 if GROUP == 0 or GROUP >= SPAN else GROUP // PIECE
    # With subnormals the odd nibbles count sixteenfold, and are summed apart.
    APART: tl.constexpr = FAST and UNPACKED == tl.float16
    acc = tl.zeros((BN, BM), tl.float32)
    even = tl.zeros((BN, BM), tl.float32)
    odd = tl.zeros((BN, BM), tl.float32)
    centre = tl.full((BN, 1), 8, tl.int16)
    if HAS_ZEROS and GROUP == 0:
        centre = tl.load(zeros_ptr + rows).to(tl.int16)[:, None]
    for span in range(first, last):
        words = tl.load(weight_at)
        for j in tl.static_range(4):
            if GROUP != 0:
                group = (span * SPAN + j * PIECE) // GROUP
                if j % SHARE == 0:
                    even = tl.zeros((BN, BM), tl.float32)
                    odd = tl.zeros((BN, BM), tl.float32)
                    if HAS_ZEROS:
                        at = zeros_ptr + group * stride_scales + rows
                        centre = tl.load(at).to(tl.int16)[:, None]
            x = tl.load(x_at + j * PIECE, mask=known, other=0.0)
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
        weight_at += PIECE
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
