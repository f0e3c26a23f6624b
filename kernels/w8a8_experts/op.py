"""``torchlathe::w8a8_experts_linear``: each slot, in 8 bits, by the 8-bit weights of its expert.

What slots are is said in `torchlathe.kernels.blocks.experts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlathe.kernels.blocks.experts import (
    experts_linear,
    launch_experts,
    reference_of_experts,
    stacked,
)
from torchlathe.kernels.registering import register
from torchlathe.kernels.tuning.tiles import Tile
from torchlathe.kernels.w8a8.op import W8Rows, pack, packed_for_kernel

__all__ = ["launch", "pack_experts", "reference", "w8a8_experts_linear"]


def pack_experts(values: Tensor, scales: Tensor) -> W8Rows:
    """Pad the weights of experts: those of `torchlathe.kernels.w8a8.op.pack`, experts first.

    Args:
        values: (experts, out, in) int8 or float8_e4m3fn.
        scales: (experts, out).
    """
    return stacked([pack(one, of) for one, of in zip(values, scales, strict=True)])


def reference(
    x: Tensor,
    x_scales: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    weight: Tensor,
    scales: Tensor,
    weights: Tensor | None = None,
    *,
    out_features: int,
    activation: str = "none",
    dtype: torch.dtype = torch.float64,
    places: Tensor | None = None,
) -> Tensor:
    """The meaning of the op, expert by expert, in float64 where that is the type."""
    return reference_of_experts(
        x,
        offsets,
        lambda e: weight[e].to(torch.float64) * scales[e].to(torch.float64)[:, None],
        out_features=out_features,
        dtype=dtype,
        x_scales=x_scales,
        order=order,
        places=places,
        weights=weights,
        activation=activation,
    )


@register("w8a8_experts_linear")
def w8a8_experts_linear(
    x: Tensor,
    x_scales: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    weight: Tensor,
    scales: Tensor,
    weights: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
    activation: str = "none",
    places: Tensor | None = None,
) -> Tensor:
    """``activation((x * x_scales)[order] @ (w * scales)[expert].T) * weights``, by slots.

    Shapes: x (tokens, in) in the type of the weights; x_scales (tokens,) fp32; weight (experts,
    rows, columns) int8 or fp8 and scales (experts, rows) as `pack_experts` gives them; the others
    as those of `torchlathe.kernels.w4a16_experts.op.w4a16_experts_linear`.
    """
    return experts_linear(
        x,
        offsets,
        packed_for_kernel(W8Rows(weight, scales)),
        lambda wide: (weight.to(torch.float32) * scales[:, :, None]).to(wide),
        out_features=out_features,
        dtype=dtype,
        x_scales=x_scales,
        order=order,
        places=places,
        weights=weights,
        activation=activation,
    )


def launch(
    x: Tensor,
    x_scales: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    weight: W8Rows,
    tile: Tile,
    **options: Any,
) -> Tensor:
    """Run the kernel; the options are those of `torchlathe.kernels.blocks.experts.launch_experts`.

    Returns:
        (slots, out).
    """
    packed = packed_for_kernel(weight)
    return launch_experts(x, order, offsets, packed, tile, x_scales=x_scales, **options)
