"""``torchlathe::w8a8_linear``: a linear layer with 8-bit weights and activations.

Both are int8, or both fp8 (e4m3); activations have a scale for each token, weights one for each
output feature. Source: the arithmetic is that of `torch._scaled_mm` by rows; the kernel is own.
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
from torchlathe.kernels.packing import ROWS, SPAN, padded, widened
from torchlathe.kernels.registering import register
from torchlathe.kernels.tuning.tiles import Tile

__all__ = [
    "W8Rows",
    "integer_product",
    "launch",
    "library_product",
    "pack",
    "packed_for_kernel",
    "product_of",
    "reference",
    "w8a8_linear",
    "w8a8_low_rank_linear",
]

_TYPES = (torch.int8, torch.float8_e4m3fn)


class W8Rows(NamedTuple):
    """Padded 8-bit weights with a scale for each row.

    Attributes:
        weight: (rows, columns) int8 or float8_e4m3fn.
        scales: (rows,) fp32.
    """

    weight: Tensor
    scales: Tensor


def pack(values: Tensor, scales: Tensor) -> W8Rows:
    """Pad a quantised weight: ``w[n, k] = values[n, k] * scales[n]``.

    Args:
        values: (out, in) int8 or float8_e4m3fn.
        scales: (out,).

    Raises:
        OptionError: A shape or type does not fit.
    """
    if values.dtype not in _TYPES or values.dim() != 2:
        kind = str(values.dtype).removeprefix("torch.")
        raise OptionError(f"weights must be int8 or float8_e4m3fn of two axes, not {kind}")
    if scales.shape != values.shape[:1]:
        raise OptionError(f"{values.shape[0]} rows need as many scales, not {tuple(scales.shape)}")
    rows, columns = values.shape
    more = (0, padded(columns, SPAN) - columns, 0, padded(rows, ROWS) - rows)
    # Zero has the same bits in both types, and not every type can be padded.
    weight = F.pad(values.view(torch.int8), more).view(values.dtype)
    return W8Rows(weight, F.pad(scales.to(torch.float32), (0, more[3])))


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """The product of int8 operands, exact in int32, then as fp32: the fastest on a CPU."""
    if x.device.type != "cpu" and (x.shape[0] <= 16 or weight.shape[0] % 8 or x.shape[1] % 8):
        # What cuBLASLt does not take is small.
        return F.linear(x.to(torch.float32), weight.to(torch.float32))
    return torch._int_mm(x.contiguous(), weight.t()).to(torch.float32)


def reference(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_features: int,
    activation: str = "none",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The meaning of the op: everything in float64."""
    rows = rows_for(out_features, activation)
    wide = weight[:rows, : x.shape[-1]].to(torch.float64)
    product = F.linear(x.to(torch.float64), wide) * scales[:rows].to(torch.float64)
    product = product * x_scales.to(torch.float64)[..., None]
    return finished(product, bias, residual, activation, out_features).to(dtype)


@register("w8a8_linear")
def w8a8_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
    activation: str = "none",
) -> Tensor:
    """``activation(x * x_scales @ (w * scales).T + bias) + residual`` for weights `W8Rows`.

    Shapes: x (..., in) in the type of the weights; x_scales (...,) fp32; bias (out,); residual and
    the result (..., out).
    """
    return product_of(
        x,
        x_scales,
        W8Rows(weight, scales),
        out_features=out_features,
        dtype=dtype,
        bias=bias,
        residual=residual,
        activation=activation,
    )


@register("w8a8_low_rank_linear")
def w8a8_low_rank_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    scales: Tensor,
    narrow: Tensor,
    up: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
    activation: str = "none",
) -> Tensor:
    """`w8a8_linear` with ``narrow @ up.T`` added to the product.

    Shapes: as `w8a8_linear`; narrow (..., rank) fp16 or bf16, the product of ``down`` with the
    activations before they were quantised, so that the term keeps what quantising loses; up
    (out padded to 128, rank), as `torchlathe.kernels.blocks.launching.pad_rank` gives it.
    Source: the branch in 16 bits beside quantised activations is SVDQuant's (arXiv 2411.05007).
    """
    return product_of(
        x,
        x_scales,
        W8Rows(weight, scales),
        out_features=out_features,
        dtype=dtype,
        bias=bias,
        residual=residual,
        activation=activation,
        low_rank=(narrow, up),
    )


def product_of(x: Tensor, x_scales: Tensor, weight: W8Rows, **ends: Any) -> Tensor:
    """What all ops on such weights compute.

    Args:
        x: (..., in) in the type of the weights.
        x_scales: (...,) fp32.
        weight: The weights.
        **ends: As `torchlathe.kernels.blocks.launching.linear` takes them.

    Returns:
        (..., out).
    """
    library = _library(x_scales, weight.weight, weight.scales)
    return linear(x, packed_for_kernel(weight), library, x_scales=x_scales, **ends)


def packed_for_kernel(weight: W8Rows) -> Packed:
    """The weights as the one product kernel takes them."""
    return Packed("w8a8", weight.weight, weight.scales, None, weight.weight.shape[-1], SPAN, 1, 0)


def _library(x_scales: Tensor, weight: Tensor, scales: Tensor) -> Callable[[Tensor, int], Tensor]:
    return lambda x, rows: library_product(x, x_scales.reshape(-1, 1), weight, scales, rows)


def library_product(
    x: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, out_features: int
) -> Tensor:
    """The library's product with both scales, fp32: what more tokens than a tile's go through.

    Shapes: x (tokens, in), x_scales (tokens, 1), weight (rows, columns), scales (rows,).
    """
    if x.dtype == torch.int8:
        product = integer_product(x, weight[:out_features, : x.shape[1]])
        return product.mul_(scales[:out_features]).mul_(x_scales)
    if x.device.type == "cpu":
        # The library's fp8 product is slower than this on every CPU that was measured.
        wide = weight[:out_features, : x.shape[1]].to(torch.float32)
        return F.linear(x.to(torch.float32), wide) * scales[:out_features] * x_scales
    product = torch._scaled_mm(
        widened(x, weight.shape[1]),
        weight.t(),
        scale_a=x_scales,
        scale_b=scales[None, :],
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product[:, :out_features].to(torch.float32)


def launch(
    x: Tensor, x_scales: Tensor, weight: W8Rows, tile: Tile, *, dtype: torch.dtype, **options: Any
) -> Tensor:
    """Run the kernel; the options are those of `torchlathe.kernels.blocks.launching.launch`.

    Returns:
        (tokens, out).
    """
    packed = packed_for_kernel(weight)
    return launching.launch(x, packed, tile, dtype=dtype, x_scales=x_scales, **options)
