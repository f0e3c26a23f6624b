"""The kernel that adds, normalises and quantises a row while it lies in registers."""

# mypy: ignore-errors
# pyright: basic
# ruff: noqa: SIM108
from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["norm_quantise"]


@triton.jit
def norm_quantise(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    scales_ptr,
    summed_ptr,
    rows,
    width,
    eps,
    BLOCK: tl.constexpr,
    EACH: tl.constexpr,
    WHOLE: tl.constexpr,
    NORM: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INTEGER: tl.constexpr,
):
    """Quantise norm(x + residual) * weight + bias, EACH rows per program.

    Shapes: x, residual and summed (rows, width); out (rows, width) int8 or fp8; scales (rows,)
    fp32. MEAN subtracts the mean, as LayerNorm does; without it this is RMSNorm, and without NORM
    rows are quantised as they are. WHOLE says that width is BLOCK.
    """
    LARGEST: tl.constexpr = 127.0 if INTEGER else 448.0
    columns = tl.arange(0, BLOCK)
    if NORM:
        weight = _row(weight_ptr, columns, width, WHOLE)
    if HAS_BIAS:
        bias = _row(bias_ptr, columns, width, WHOLE)
    for i in tl.static_range(EACH):
        row = tl.program_id(0).to(tl.int64) * EACH + i
        # The last program does its last row again rather than none.
        row = tl.minimum(row, rows - 1)
        x = _row(x_ptr + row * width, columns, width, WHOLE)
        if HAS_RESIDUAL:
            x += _row(residual_ptr + row * width, columns, width, WHOLE)
            kept = x.to(summed_ptr.dtype.element_ty)
            # What follows sees the sum as whoever reads it will: rounded.
            x = kept.to(tl.float32)
            _store(summed_ptr + row * width, kept, columns, width, WHOLE)
        if MEAN:
            x -= tl.sum(x, 0) / width
            if not WHOLE:
                x = tl.where(columns < width, x, 0.0)
        inverse = 1.0
        if NORM:
            inverse = 1.0 / tl.sqrt(tl.sum(x * x, 0) / width + eps)
            x *= weight
        if HAS_BIAS:
            # Without a bias the norm's factor is in the scale alone.
            x = x * inverse + bias
            inverse = 1.0
        # 2^-100 keeps a row of zeros from dividing by zero.
        largest = tl.maximum(tl.max(tl.abs(x), 0), 7.888609052210118e-31)
        tl.store(scales_ptr + row, largest * inverse / LARGEST)
        factor = LARGEST / largest
        if INTEGER:
            # Adding 1.5 * 2^23 rounds to the nearest, ties to even, as torch.round does, and
            # leaves the integer in the lowest bits.
            number = (x * factor + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
        else:
            number = tl.minimum(tl.maximum(x * factor, -448.0), 448.0)
            number = number.to(out_ptr.dtype.element_ty)
        _store(out_ptr + row * width, number, columns, width, WHOLE)


@triton.jit
def _row(at, columns, width, WHOLE: tl.constexpr):
    if WHOLE:
        row = tl.load(at + columns)
    else:
        row = tl.load(at + columns, mask=columns < width, other=0.0)
    return row.to(tl.float32)


@triton.jit
def _store(at, row, columns, width, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(at + columns, row)
    else:
        tl.store(at + columns, row, mask=columns < width)
