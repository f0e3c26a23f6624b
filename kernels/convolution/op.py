"""``torchlathe::w8a8_conv2d``: a convolution with 8-bit weights and activations.

What each window sees is laid side by side, in 8 bits, and multiplied by the kernel of
`torchlathe.kernels.w8a8`. Source: im2col is textbook; that it pays where the numbers are a quarter
of the size is measured by `fuse-kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.ir.errors import OptionError
from torchlathe.kernels.epilogue import finished
from torchlathe.kernels.registering import register
from torchlathe.kernels.w8a8.op import W8Rows, pack, product_of

__all__ = ["pack_conv", "reference", "w8a8_conv2d", "windows"]


def pack_conv(values: Tensor, scales: Tensor) -> W8Rows:
    """Rows as windows have them: ``w[n, (i, j, c)] = values[n, c, i, j]``.

    Args:
        values: (out, in, height, width) int8 or float8_e4m3fn.
        scales: (out,).

    Raises:
        OptionError: A shape or type does not fit.
    """
    if values.dim() != 4:
        raise OptionError(f"weights of a convolution have four axes, not {values.dim()}")
    return pack(values.permute(0, 2, 3, 1).flatten(1), scales)


def windows(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """What each window of a convolution sees.

    Args:
        x: (samples, channels, height, width).
        kernel: Height and width of a window.
        stride: Steps between windows.
        padding: Zeros around a sample.
        dilation: Steps between what a window sees.

    Returns:
        (samples, height of the result, width of the result, kernel height * kernel width *
        channels).
    """
    rows = x.permute(0, 2, 3, 1)
    if any(padding):
        rows = F.pad(rows, (0, 0, padding[1], padding[1], padding[0], padding[0]))
    high, wide = (
        (rows.shape[axis + 1] - dilation[axis] * (kernel[axis] - 1) - 1) // stride[axis] + 1
        for axis in (0, 1)
    )

    def along(value: Tensor, axis: int, first: int, count: int) -> Tensor:
        start = first * dilation[axis]
        end = start + (count - 1) * stride[axis] + 1
        # Not by indexing, which a torch without CUDA cannot trace for it.
        part: Tensor = torch.ops.aten.slice.Tensor(value, axis + 1, start, end, stride[axis])
        return part

    lines = [along(rows, 0, i, high) for i in range(kernel[0])]
    seen = [along(line, 1, j, wide) for line in lines for j in range(kernel[1])]
    return seen[0] if len(seen) == 1 else torch.cat(seen, -1)


def reference(
    x: Tensor,
    x_scales: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    dtype: torch.dtype = torch.float64,
    **geometry: Any,
) -> Tensor:
    """The meaning of the op, of values that are not packed: everything in float64."""
    real = x.to(torch.float64) * x_scales.to(torch.float64)[:, None, None, None]
    weight = values.to(torch.float64) * scales.to(torch.float64)[:, None, None, None]
    wide = None if bias is None else bias.to(torch.float64)
    return finished(F.conv2d(real, weight, wide, **geometry), None, None, activation).to(dtype)


@register("w8a8_conv2d")
def w8a8_conv2d(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out_channels: int,
    dtype: torch.dtype,
    activation: str = "none",
) -> Tensor:
    """``activation(conv2d(x * x_scales, w * scales) + bias)`` for weights of `pack_conv`.

    Shapes: x (samples, channels, height, width) in the type of the weights; x_scales (samples,)
    fp32; bias (out,); kernel, stride, padding and dilation are two numbers each; the result is
    (samples, out, height, width), contiguous.
    """
    seen = windows(x, kernel, stride, padding, dilation)
    each = x_scales.view(-1, 1, 1).expand(seen.shape[:-1])
    found = product_of(
        seen,
        each,
        W8Rows(weight, scales),
        out_features=out_channels,
        dtype=dtype,
        bias=bias,
        activation=activation,
    )
    return found.permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)
