"""Ops that exist between a program and its ONNX form only; each says what it means in torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["integer_linear", "nbits_linear", "quantize_rows"]

_LEAST = 2.0**-100  # as in torchlathe.kernels.dequantize: keeps a row of zeros from dividing by it
CENTRE = 128  # of unsigned numbers: x86 multiplies unsigned activations by signed weights


@torch.library.custom_op("torchlathe_onnx::quantize_rows", mutates_args=())
def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of activations as unsigned integers around 128, and a scale a row.

    Args:
        x: (..., columns), float32.

    Returns:
        (rows, columns) uint8 and (rows, 1) float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    scales = rows.abs().amax(-1, keepdim=True).clamp_min(_LEAST) / 127
    return ((rows / scales).round() + CENTRE).to(torch.uint8), scales


@quantize_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    rows = x.reshape(-1, x.shape[-1])
    return rows.new_empty(rows.shape, dtype=torch.uint8), rows.new_empty(rows.shape[0], 1)


@torch.library.custom_op("torchlathe_onnx::integer_linear", mutates_args=())
def integer_linear(
    like: Tensor,
    numbers: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """A linear layer of integers, exact until the scales.

    Args:
        like: (..., columns): has the leading extents of the result.
        numbers: (rows, columns) uint8, around 128.
        row_scales: (rows, 1).
        weight: (columns, outs) int8.
        scales: (outs,).
        bias: (outs,).

    Returns:
        (..., outs) float32.
    """
    product = (numbers.double() - CENTRE) @ weight.double()
    result = product.float() * scales * row_scales
    result = result if bias is None else result + bias
    return result.reshape(*like.shape[:-1], weight.shape[1])


@integer_linear.register_fake
def _(
    like: Tensor,
    numbers: Tensor,
    row_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
) -> Tensor:
    return like.new_empty(*like.shape[:-1], weight.shape[1])


@torch.library.custom_op("torchlathe_onnx::nbits_linear", mutates_args=())
def nbits_linear(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    level: int,
    bias: Tensor | None,
) -> Tensor:
    """A linear layer whose weight has a few bits, in the layout of ``MatMulNBits``.

    Args:
        x: (..., columns), float32.
        values: (outs, groups, group * bits / 8) uint8, the first number in the lowest bits.
        scales: (outs, groups).
        zeros: (outs, groups * bits / 8 rounded up) uint8 zero points, packed as the values; None:
            half of the range.
        bits: 4 or 8.
        group: Columns that share a scale.
        level: ``accuracy_level`` of ``MatMulNBits``.
        bias: (outs,).

    Returns:
        (..., outs) float32.
    """
    places = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes = ((values[..., None] >> places) & (2**bits - 1)).flatten(-2).float()
    points = torch.full_like(scales, float(1 << (bits - 1)))
    if zeros is not None:
        unpacked = ((zeros[..., None] >> places) & (2**bits - 1)).flatten(-2)
        points = unpacked[:, : scales.shape[1]].float()
    weight = ((codes - points[..., None]) * scales[..., None]).flatten(1)
    return F.linear(x, weight, bias)


@nbits_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    level: int,
    bias: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])
