"""``torchlathe::w4a16_experts_linear``: each slot of a sorted list by the weights of its expert.

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
    token_blocks,
)
from torchlathe.kernels.registering import register
from torchlathe.kernels.tuning.tiles import Tile
from torchlathe.kernels.w4a16.op import W4, dequantised, pack, packed_for_kernel

__all__ = ["launch", "pack_experts", "reference", "token_blocks", "w4a16_experts_linear"]


def pack_experts(values: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> W4:
    """Pack the weights of experts: those of `torchlathe.kernels.w4a16.op.pack`, with experts first.

    Args:
        values: (experts, out, in) uint8.
        scales: (experts, groups, out).
        zeros: (experts, groups, out) uint8, or None.
        group: Weights that share a scale.
    """
    points = [None] * values.shape[0] if zeros is None else list(zeros)
    return stacked([pack(*one, group) for one in zip(values, scales, points, strict=True)])


def reference(
    x: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    out_features: int,
    group: int,
    activation: str = "none",
    places: Tensor | None = None,
) -> Tensor:
    """The meaning of the op, expert by expert, in fp32, or in float64 for float64 activations."""
    return reference_of_experts(
        x,
        offsets,
        lambda e: dequantised(words[e], scales[e], None if zeros is None else zeros[e], group),
        out_features=out_features,
        dtype=x.dtype,
        order=order,
        places=places,
        weights=weights,
        activation=activation,
    )


@register("w4a16_experts_linear")
def w4a16_experts_linear(
    x: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    weights: Tensor | None,
    out_features: int,
    group: int,
    activation: str = "none",
    places: Tensor | None = None,
) -> Tensor:
    """``activation(x[order] @ w[expert].T) * weights``, one row for each slot.

    Shapes: x (tokens, in) fp16 or bf16; order (slots,) integers, the token of each slot, or None if
    slots are tokens; offsets (experts + 1,) int32, the first of which is 0 and the last the number
    of slots; words, scales and zeros as `pack_experts` gives them; weights (slots,) fp32; places
    (slots,) integers, a permutation: the row of the result that each slot goes to.
    """
    return experts_linear(
        x,
        offsets,
        packed_for_kernel(W4(words, scales, zeros), group),
        lambda dtype: _unpacked(words, scales, zeros, group).to(dtype),
        out_features=out_features,
        dtype=x.dtype,
        order=order,
        places=places,
        weights=weights,
        activation=activation,
    )


def _unpacked(words: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> Tensor:
    """The padded weights of all experts in fp32, (experts, rows, columns)."""
    points = [None] * words.shape[0] if zeros is None else list(zeros.unbind(0))
    parts = zip(words.unbind(0), scales.unbind(0), points, strict=True)
    return torch.stack([dequantised(*part, group) for part in parts])


# Of the inputs: words, scales, zeros, and the group.
differentiate_experts(w4a16_experts_linear, lambda i: _unpacked(i[3], i[4], i[5], i[8]))


def launch(
    x: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    weight: W4,
    tile: Tile,
    *,
    group: int,
    **options: Any,
) -> Tensor:
    """Run the kernel; the options are those of `torchlathe.kernels.blocks.experts.launch_experts`.

    Returns:
        (slots, out).
    """
    return launch_experts(x, order, offsets, packed_for_kernel(weight, group), tile, **options)
