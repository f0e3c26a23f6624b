"""``torchlathe::w4a16_linear``: a linear layer whose weights are 4-bit numbers in groups.

Source: the arithmetic is that of GPTQ's and AWQ's layers; layout and kernel are own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.kernels.blocks import launching
from torchlathe.kernels.blocks.launching import Packed, linear, pad_rank
from torchlathe.kernels.epilogue import finished, rows_for
from torchlathe.kernels.packing import pack_qs4, pack_scales, quarter_of, unpack_qs4
from torchlathe.kernels.registering import differentiate, register
from torchlathe.kernels.tuning.tiles import Tile

__all__ = [
    "W4",
    "dequantised",
    "launch",
    "pack",
    "packed_for_kernel",
    "pad_rank",
    "reference",
    "unpacked",
    "w4a16_linear",
    "w4a16_low_rank_linear",
]


class W4(NamedTuple):
    """Packed 4-bit weights.

    Attributes:
        words: (rows, columns/4) int16, layout ``qs4``.
        scales: (groups, rows) fp16 or bf16.
        zeros: (groups, rows) uint8, or None for 8 throughout.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None


def pack(values: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> W4:
    """Pack a quantised weight: ``w[n, k] = (values[n, k] - zeros[k // group, n]) * scales[..]``.

    Args:
        values: (out, in) uint8, each below 16.
        scales: (groups, out) in the type of the activations.
        zeros: (groups, out) uint8, each below 16; None for 8 throughout.
        group: Weights that share a scale: 32, 64, 128, or 0 for a whole row.

    Raises:
        OptionError: The group has no layout, or a shape or type does not fit.
    """
    columns = values.shape[1]
    packed_zeros = None if zeros is None else pack_scales(zeros, columns, group)
    return W4(pack_qs4(values, group), pack_scales(scales, columns, group), packed_zeros)


def dequantised(words: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> Tensor:
    """The padded weights in fp32, (rows, columns)."""
    values = unpack_qs4(words, group)
    rows, columns = values.shape
    groups = scales.shape[0]
    parts = values.view(rows, groups, columns // groups)
    centre = 8 if zeros is None else zeros.t().to(torch.int16)[:, :, None]
    weight = (parts - centre).to(torch.float32) * scales.t().to(torch.float32)[:, :, None]
    return weight.view(rows, columns)


def reference(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_features: int,
    group: int,
    activation: str = "none",
) -> Tensor:
    """The meaning of the op: everything in fp32, or in float64 for float64 activations."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = rows_for(out_features, activation)
    weight = dequantised(words, scales, zeros, group)[:rows, : x.shape[-1]]
    product = F.linear(x.to(wide), weight.to(wide))
    return finished(product, bias, residual, activation, out_features).to(x.dtype)


@register("w4a16_linear")
def w4a16_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    group: int,
    activation: str = "none",
) -> Tensor:
    """``activation(x @ w.T + bias) + residual`` for packed 4-bit weights `W4`.

    Shapes: x (..., in) fp16 or bf16; bias (out,); residual and the result (..., out).
    """
    return linear(
        x,
        packed_for_kernel(W4(words, scales, zeros), group),
        _unpacked_product(W4(words, scales, zeros), group),
        out_features=out_features,
        dtype=x.dtype,
        bias=bias,
        residual=residual,
        activation=activation,
    )


def _weight_of(inputs: tuple[Any, ...]) -> Tensor:
    words, scales, zeros = inputs[1:4]
    out_features, group = inputs[-3:-1]
    return dequantised(words, scales, zeros, group)[:out_features]


differentiate(w4a16_linear, _weight_of)


@register("w4a16_low_rank_linear")
def w4a16_low_rank_linear(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    group: int,
    activation: str = "none",
) -> Tensor:
    """``activation(x @ w.T + x @ down.T @ up.T + bias) + residual``.

    Shapes: as `w4a16_linear`; down (rank, in), up (out padded to 128, rank), in the type of x. The
    kernel wants a rank of 16, 32, 64 or 128, to which `pad_rank` pads.
    """
    return linear(
        x,
        packed_for_kernel(W4(words, scales, zeros), group),
        _unpacked_product(W4(words, scales, zeros), group),
        out_features=out_features,
        dtype=x.dtype,
        bias=bias,
        residual=residual,
        activation=activation,
        low_rank=(F.linear(x, down), up),
    )


differentiate(w4a16_low_rank_linear, _weight_of)


def packed_for_kernel(weight: W4, group: int) -> Packed:
    """The weights as the one product kernel takes them."""
    columns = 4 * weight.words.shape[-1]
    return Packed("w4a16", *weight, columns, quarter_of(columns, group), 4, group)


def _unpacked_product(weight: W4, group: int) -> Callable[[Tensor, int], Tensor]:
    def product(x: Tensor, rows: int) -> Tensor:
        if x.device.type == "cpu":
            wide = dequantised(*weight, group).to(x.dtype)
        else:
            wide = unpacked(weight, group, x.dtype)
        return F.linear(x, wide[:rows, : x.shape[1]])

    return product


def launch(x: Tensor, weight: W4, tile: Tile, *, group: int, **options: Any) -> Tensor:
    """Run the kernel; the options are those of `torchlathe.kernels.blocks.launching.launch`.

    Returns:
        (tokens, out).
    """
    return launching.launch(
        x, packed_for_kernel(weight, group), tile, **{"dtype": x.dtype} | options
    )


def unpacked(
    weight: W4,
    group: int,
    dtype: torch.dtype,
    wrap: Callable[[Any], Any] = torch.library.wrap_triton,
) -> Tensor:
    """The padded weights in a type of the activations, (rows, columns), by a kernel."""
    from torchlathe.kernels.w4a16.triton import unpack_w4

    words, scales, zeros = weight
    rows, columns = words.shape[0], 4 * words.shape[1]
    quarter = quarter_of(columns, group)
    out = torch.empty((rows, columns), dtype=dtype, device=words.device)
    block = 32
    wrap(unpack_w4)[(rows // block, columns // (4 * quarter))](
        words,
        scales,
        words if zeros is None else zeros,
        out,
        columns,
        words.stride(0),
        scales.stride(0),
        BN=block,
        QUARTER=quarter,
        GROUP=group,
        HAS_ZEROS=zeros is not None,
        num_warps=4,
    )
    return out
