"""``torchlathe::w4a8_linear``: a linear layer with 4-bit weights and 8-bit activations.

Source: own layout and kernel; the idea that unpacking must cost less than an instruction for two
weights is LiquidGEMM's (arXiv 2509.01229).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.ir.errors import OptionError
from torchlathe.kernels.blocks import launching
from torchlathe.kernels.blocks.launching import Packed, linear
from torchlathe.kernels.epilogue import finished, rows_for
from torchlathe.kernels.packing import (
    SPAN,
    half_of,
    pack_hs4,
    pack_scales,
    pack_sm4,
    unpack_hs4,
    unpack_hu4,
    unpack_sm4,
)
from torchlathe.kernels.registering import register
from torchlathe.kernels.tuning.tiles import Tile
from torchlathe.kernels.w8a8.op import library_product

__all__ = [
    "W4Centred",
    "W4Signed",
    "launch",
    "numbers",
    "pack",
    "pack_centred",
    "packed_for_kernel",
    "reference",
    "w4a8_linear",
    "w4a8_low_rank_linear",
]


class W4Signed(NamedTuple):
    """Packed signed 4-bit weights.

    Attributes:
        packed: (rows, columns/2) int8, layout ``hs4``, or ``sm4`` for fp8 activations.
        scales: (groups, rows) fp32.
    """

    packed: Tensor
    scales: Tensor


class W4Centred(NamedTuple):
    """Packed 4-bit weights with zero points.

    Attributes:
        packed: (rows, columns/2) int8, layout ``hs4`` without signs.
        scales: (groups, rows) fp32.
        zeros: (groups, rows) uint8.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor


def pack(
    values: Tensor, scales: Tensor, group: int = 0, activations: torch.dtype = torch.int8
) -> W4Signed:
    """Pack a quantised weight: ``w[n, k] = values[n, k] * scales[k // group, n]``.

    Args:
        values: (out, in) int8, each from -8 to 7, or from -7 to 7 for fp8 activations.
        scales: (groups, out).
        group: Weights that share a scale: 128, or 0 for a whole row.
        activations: int8 or float8_e4m3fn, what the weights will be multiplied with.

    Raises:
        OptionError: The group has no layout, or a shape, type or value does not fit.
    """
    packed = _checked_scales(scales, values.shape[1], group)
    if activations not in {torch.int8, torch.float8_e4m3fn}:
        kind = str(activations).removeprefix("torch.")
        raise OptionError(f"no layout for activations of {kind}", hint="int8 or float8_e4m3fn")
    form = pack_hs4 if activations == torch.int8 else pack_sm4
    return W4Signed(form(values), packed)


def pack_centred(values: Tensor, scales: Tensor, zeros: Tensor, group: int = 0) -> W4Centred:
    """Pack a weight with zero points: ``w[n, k] = (values[n, k] - zeros[..]) * scales[..]``.

    Args:
        values: (out, in) uint8, each below 16.
        scales: (groups, out).
        zeros: (groups, out) uint8, each below 16.
        group: Weights that share a scale: 128, or 0 for a whole row.

    Raises:
        OptionError: The group has no layout, or a shape, type or value does not fit.
    """
    packed = _checked_scales(scales, values.shape[1], group)
    if values.dtype != torch.uint8 or zeros.dtype != torch.uint8:
        raise OptionError("weights with zero points, and those, must be uint8")
    return W4Centred(pack_hs4(values), packed, pack_scales(zeros, values.shape[1], group))


def _checked_scales(scales: Tensor, columns: int, group: int) -> Tensor:
    if group not in {0, SPAN}:
        raise OptionError(f"no layout for groups of {group}", hint=f"known are 0 and {SPAN}")
    return pack_scales(scales.to(torch.float32), columns, group)


def numbers(packed: Tensor, zeros: Tensor | None, activations: torch.dtype = torch.int8) -> Tensor:
    """The weights without their scales, zero points taken away: (rows, columns) int8."""
    if activations != torch.int8:
        return unpack_sm4(packed)
    if zeros is None:
        return unpack_hs4(packed)
    values = unpack_hu4(packed)
    rows, columns = values.shape
    groups = zeros.shape[0]
    parts = values.view(rows, groups, columns // groups)
    return (parts - zeros.t().to(torch.int8)[:, :, None]).view(rows, columns)


def reference(
    x: Tensor,
    x_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_features: int,
    activation: str = "none",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The meaning of the op: everything in float64."""
    values = numbers(packed, zeros, x.dtype).to(torch.float64)
    rows, columns = values.shape
    groups = scales.shape[0]
    weight = values.view(rows, groups, columns // groups) * scales.t().to(torch.float64)[:, :, None]
    weight = weight.view(rows, columns)[: rows_for(out_features, activation), : x.shape[-1]]
    product = F.linear(x.to(torch.float64), weight) * x_scales.to(torch.float64)[..., None]
    return finished(product, bias, residual, activation, out_features).to(dtype)


@register("w4a8_linear")
def w4a8_linear(
    x: Tensor,
    x_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
    activation: str = "none",
    zeros: Tensor | None = None,
) -> Tensor:
    """``activation(x * x_scales @ w.T + bias) + residual`` for packed weights `W4Signed`.

    Shapes: x (..., in) int8, or fp8 for weights packed for that; x_scales (...,) fp32; bias (out,);
    residual and the result (..., out); zeros (groups, rows) of `W4Centred`, for int8.
    """
    return _product(
        x,
        x_scales,
        (packed, scales, zeros),
        out_features=out_features,
        dtype=dtype,
        bias=bias,
        residual=residual,
        activation=activation,
    )


@register("w4a8_low_rank_linear")
def w4a8_low_rank_linear(
    x: Tensor,
    x_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    narrow: Tensor,
    up: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
    activation: str = "none",
    zeros: Tensor | None = None,
) -> Tensor:
    """`w4a8_linear` with ``narrow @ up.T`` added to the product.

    Shapes: as `w4a8_linear`; narrow (..., rank) and up (out padded to 128, rank) as
    `torchlathe.kernels.w8a8.op.w8a8_low_rank_linear` takes them.
    """
    return _product(
        x,
        x_scales,
        (packed, scales, zeros),
        out_features=out_features,
        dtype=dtype,
        bias=bias,
        residual=residual,
        activation=activation,
        low_rank=(narrow, up),
    )


def _product(
    x: Tensor, x_scales: Tensor, weight: tuple[Tensor, Tensor, Tensor | None], **ends: Any
) -> Tensor:
    """What both ops compute; the ends are as `torchlathe.kernels.blocks.launching.linear`'s."""
    library = _library(x_scales, *weight)
    return linear(x, packed_for_kernel(*weight), library, x_scales=x_scales, **ends)


def packed_for_kernel(packed: Tensor, scales: Tensor, zeros: Tensor | None = None) -> Packed:
    """The weights as the one product kernel takes them."""
    columns = 2 * packed.shape[-1]
    group = 0 if scales.shape[-2] == 1 else SPAN
    return Packed("w4a8", packed, scales, zeros, columns, half_of(columns), 2, group)


def _library(
    x_scales: Tensor, packed: Tensor, scales: Tensor, zeros: Tensor | None
) -> Callable[[Tensor, int], Tensor]:
    def product(x: Tensor, rows: int) -> Tensor:
        weight = numbers(packed, zeros, x.dtype)
        if scales.shape[0] == 1:
            # fp8 holds these integers exactly.
            return library_product(x, x_scales.reshape(-1, 1), weight.to(x.dtype), scales[0], rows)
        wide = weight.view(weight.shape[0], scales.shape[0], SPAN).to(torch.float32)
        wide = (wide * scales.t()[:, :, None]).flatten(1)[:rows, : x.shape[1]]
        return F.linear(x.to(torch.float32), wide) * x_scales.reshape(-1, 1)

    return product


def launch(
    x: Tensor,
    x_scales: Tensor,
    weight: W4Signed | W4Centred,
    tile: Tile,
    *,
    dtype: torch.dtype,
    **options: Any,
) -> Tensor:
    """Run the kernel; the options are those of `torchlathe.kernels.blocks.launching.launch`.

    Returns:
        (tokens, out).
    """
    packed = packed_for_kernel(*weight)
    return launching.launch(x, packed, tile, dtype=dtype, x_scales=x_scales, **options)
