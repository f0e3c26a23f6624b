"""``torchlathe::w8a16_experts_linear``: each slot by the 8-bit weights of its expert.

What slots are is said in `torchlathe.kernels.blocks.experts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlathe.kernels.blocks import launching
from torchlathe.kernels.blocks.experts import experts_linear, reference_of_experts, route
from torchlathe.kernels.registering import register
from torchlathe.kernels.tuning.tiles import Tile
from torchlathe.kernels.w8a16.op import W8, dequantised, pack, packed_for_kernel

__all__ = ["launch", "pack_experts", "reference", "w8a16_experts_linear"]


def pack_experts(values: Tensor, scales: Tensor, group: int = 0) -> W8:
    """Pack the weights of experts: those of `torchlathe.kernels.w8a16.op.pack`, experts first.

    Args:
        values: (experts, out, in) int8.
        scales: (experts, groups, out).
        group: Weights that share a scale: 128, or 0 for a whole row.
    """
    packs = [pack(one, of, group) for one, of in zip(values, scales, strict=True)]
    return W8(torch.stack([p.words for p in packs]), torch.stack([p.scales for p in packs]))


def reference(
    x: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    words: Tensor,
    scales: Tensor,
    weights: Tensor | None = None,
    *,
    out_features: int,
    activation: str = "none",
    places: Tensor | None = None,
) -> Tensor:
    """The meaning of the op, expert by expert, in fp32, or in float64 for float64 activations."""
    return reference_of_experts(
        x,
        offsets,
        lambda e: dequantised(words[e], scales[e]),
        out_features=out_features,
        dtype=x.dtype,
        order=order,
        places=places,
        weights=weights,
        activation=activation,
    )


@register("w8a16_experts_linear")
def w8a16_experts_linear(
    x: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    words: Tensor,
    scales: Tensor,
    weights: Tensor | None,
    out_features: int,
    activation: str = "none",
    places: Tensor | None = None,
) -> Tensor:
    """``activation(x[order] @ w[expert].T) * weights``, one row for each slot.

    Shapes: words and scales as `pack_experts` gives them; the others as those of
    `torchlathe.kernels.w4a16_experts.op.w4a16_experts_linear`.
    """

    def unpacked(dtype: torch.dtype) -> Tensor:
        each = [dequantised(words[e], scales[e]) for e in range(words.shape[0])]
        return torch.stack(each).to(dtype)

    return experts_linear(
        x,
        offsets,
        packed_for_kernel(W8(words, scales)),
        unpacked,
        out_features=out_features,
        dtype=x.dtype,
        order=order,
        places=places,
        weights=weights,
        activation=activation,
    )


def launch(
    x: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    weight: W8,
    tile: Tile,
    *,
    weights: Tensor | None = None,
    places: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Run the kernel; the options are those of `torchlathe.kernels.blocks.launching.launch`.

    Returns:
        (slots, out).
    """
    slots = x.shape[0] if order is None else order.shape[0]
    routing = route(offsets, tile.BM, slots, weight.words.shape[0], order, places, weights)
    packed = packed_for_kernel(weight)
    return launching.launch(x, packed, tile, routing=routing, **{"dtype": x.dtype} | options)
