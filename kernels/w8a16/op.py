"""``torchlathe::w8a16_linear``: a linear layer with 8-bit weights and 16-bit activations.

Source: own layout and kernel.
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
from torchlathe.kernels.packing import SPAN, pack_hs8, pack_scales, unpack_hs8
from torchlathe.kernels.registering import differentiate, register
from torchlathe.kernels.tuning.tiles import Tile

__all__ = [
    "W8",
    "dequantised",
    "launch",
    "pack",
    "packed_for_kernel",
    "reference",
    "unpacked",
    "w8a16_linear",
    "w8a16_low_rank_linear",
]


class W8(NamedTuple):
    """Packed 8-bit weights.

    Attributes:
        words: (rows, columns/2) int16, layout ``hs8``.
        scales: (groups, rows) in the type of the activations.
    """

    words: Tensor
    scales: Tensor


def pack(values: Tensor, scales: Tensor, group: int = 0) -> W8:
    """Pack a quantised weight: ``w[n, k] = values[n, k] * scales[k // group, n]``.

    Args:
        values: (out, in) int8.
        scales: (groups, out) in the type of the activations.
        group: Weights that share a scale: 128, or 0 for a whole row.

    Raises:
        OptionError: The group has no layout, or a shape or type does not fit.
    """
    if group not in {0, SPAN}:
        raise OptionError(f"no 8-bit layout for groups of {group}", hint=f"known are 0 and {SPAN}")
    return W8(pack_hs8(values), pack_scales(scales, values.shape[1], group))


def dequantised(words: Tensor, scales: Tensor) -> Tensor:
    """The padded weights in fp32, (rows, columns)."""
    values = unpack_hs8(words)
    rows, columns = values.shape
    groups = scales.shape[0]
    weight = values.view(rows, groups, columns // groups).to(torch.float32)
    return (weight * scales.t().to(torch.float32)[:, :, None]).view(rows, columns)


def reference(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """The meaning of the op: everything in fp32, or in float64 for float64 activations."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = rows_for(out_features, activation)
    weight = dequantised(words, scales)[:rows, : x.shape[-1]]
    product = F.linear(x.to(wide), weight.to(wide))
    return finished(product, bias, residual, activation, out_features).to(x.dtype)


@register("w8a16_linear")
def w8a16_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """``activation(x @ w.T + bias) + residual`` for packed 8-bit weights `W8`.

    Shapes: x (..., in) fp16 or bf16; bias (out,); residual and the result (..., out).
    """
    return linear(
        x,
        packed_for_kernel(W8(words, scales)),
        _unpacked_product(W8(words, scales)),
        out_features=out_features,
        dtype=x.dtype,
        bias=bias,
        residual=residual,
        activation=activation,
    )


def _weight_of(inputs: tuple[Any, ...]) -> Tensor:
    words, scales, out_features = (*inputs[1:3], inputs[-2])
    return dequantised(words, scales)[:out_features]


differentiate(w8a16_linear, _weight_of)


@register("w8a16_low_rank_linear")
def w8a16_low_rank_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """``activation(x @ w.T + x @ down.T @ up.T + bias) + residual``.

    Shapes: as `w8a16_linear`; down (rank, in) and up (out padded to 128, rank) as
    `torchlathe.kernels.blocks.launching.pad_rank` gives them, in the type of x.
    """
    return linear(
        x,
        packed_for_kernel(W8(words, scales)),
        _unpacked_product(W8(words, scales)),
        out_features=out_features,
        dtype=x.dtype,
        bias=bias,
        residual=residual,
        activation=activation,
        low_rank=(F.linear(x, down), up),
    )


differentiate(w8a16_low_rank_linear, _weight_of)


def packed_for_kernel(weight: W8) -> Packed:
    """The weights as the one product kernel takes them."""
    group = 0 if weight.scales.shape[-2] == 1 else SPAN
    return Packed(
        "w8a16", weight.words, weight.scales, None, 2 * weight.words.shape[-1], SPAN // 2, 2, group
    )


def _unpacked_product(weight: W8) -> Callable[[Tensor, int], Tensor]:
    def product(x: Tensor, rows: int) -> Tensor:
        if x.device.type == "cpu":
            wide = dequantised(*weight).to(x.dtype)
        else:
            wide = unpacked(weight, x.dtype)
        return F.linear(x, wide[:rows, : x.shape[1]])

    return product


def launch(x: Tensor, weight: W8, tile: Tile, **options: Any) -> Tensor:
    """Run the kernel; the options are those of `torchlathe.kernels.blocks.launching.launch`.

    Returns:
        (tokens, out).
    """
    return launching.launch(x, packed_for_kernel(weight), tile, **{"dtype": x.dtype} | options)


def unpacked(
    weight: W8, dtype: torch.dtype, wrap: Callable[[Any], Any] = torch.library.wrap_triton
) -> Tensor:
    """The padded weights in a type of the activations, (rows, columns), by a kernel."""
    from torchlathe.kernels.w8a16.triton import unpack_w8

    words, scales = weight
    rows, columns = words.shape[0], 2 * words.shape[1]
    out = torch.empty((rows, columns), dtype=dtype, device=words.device)
    block = 32
    wrap(unpack_w8)[(rows // block, columns // SPAN)](
        words,
        scales,
        out,
        columns,
        words.stride(0),
        scales.stride(0),
        BN=block,
        GROUP=0 if scales.shape[0] == 1 else SPAN,
        num_warps=4,
    )
    return out
