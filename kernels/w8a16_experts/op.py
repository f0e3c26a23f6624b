"""``torchlathe::w8a16_experts_linear``: each slot by the 8-bit weights of its expert.

What slots are is said in `torchlathe.kernels.blocks.experts`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlathe.kernels.blocks.experts import (
    differentiate_experts,
    experts_linear,
    launch_experts,
    reference_of_experts,
    stacked,
)
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
    return stacked([pack(one, of, group) for one, of in zip(values, scales, strict=True)])


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
    return experts_linear(
        x,
        offsets,
        packed_for_kernel(W8(words, scales)),
        lambda dtype: _unpacked(words, scales).to(dtype),
        out_features=out_features,
        dtype=x.dtype,
        order=order,
        places=places,
        weights=weights,
        activation=activation,
    )


def _unpacked(words: Tensor, scales: Tensor) -> Tensor:
    """The padded weights of all experts in fp32, (experts, rows, columns)."""
    parts = zip(words.unbind(0), scales.unbind(0), strict=True)
    return torch.stack([dequantised(*part) for part in parts])


# Of the inputs: words and scales.
differentiate_experts(w8a16_experts_linear, lambda inputs: _unpacked(inputs[3], inputs[4]))


def launch(
    x: Tensor, order: Tensor | None, offsets: Tensor, weight: W8, tile: Tile, **options: Any
) -> Tensor:
    """Run the kernel; the options are those of `torchlathe.kernels.blocks.experts.launch_experts`.

    Returns:
        (slots, out).
    """
    return launch_experts(x, order, offsets, packed_for_kernel(weight), tile, **options)
