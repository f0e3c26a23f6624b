"""``torchlathe::w4a16_experts_linear``: each slot of a sorted list by the weights of its expert.

A slot is one token that one expert handles; slots are sorted by expert, and ``offsets`` says where
each expert's begin. The same op is a linear layer by type of node, with types for experts.
Source: grouped products over sorted tokens are MegaBlocks' (arXiv 2211.15841); the kernel is own.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.kernels.epilogue import activation_code, finished
from torchlathe.kernels.packing import quarter_of, widened
from torchlathe.kernels.registering import register
from torchlathe.kernels.tuning.tiles import Tile
from torchlathe.kernels.w4a16.op import W4, dequantised, pack

__all__ = ["launch", "pack_experts", "reference", "token_blocks", "w4a16_experts_linear"]


def pack_experts(values: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> W4:
    """Pack the weights of experts: those of `torchlathe.kernels.w4a16.op.pack`, with experts first.

    Args:
        values: (experts, out, in) uint8.
        scales: (experts, groups, out).
        zeros: (experts, groups, out) uint8, or None.
        group: Weights that share a scale.
    """
    count = values.shape[0]
    packs = [
        pack(values[e], scales[e], None if zeros is None else zeros[e], group) for e in range(count)
    ]
    points = [p.zeros for p in packs if p.zeros is not None]
    return W4(
        torch.stack([p.words for p in packs]),
        torch.stack([p.scales for p in packs]),
        torch.stack(points) if points else None,
    )


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
) -> Tensor:
    """The meaning of the op, expert by expert, in fp32, or in float64 for float64 activations."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    slots = x if order is None else x[order.to(torch.int64)]
    out = torch.zeros(slots.shape[0], out_features, dtype=wide, device=x.device)
    bounds = offsets.tolist()
    for e, (first, last) in enumerate(pairwise(bounds)):
        points = None if zeros is None else zeros[e]
        weight = dequantised(words[e], scales[e], points, group)[:out_features, : x.shape[1]]
        product = F.linear(slots[first:last].to(wide), weight.to(wide))
        out[first:last] = finished(product, None, None, activation)
    if weights is not None:
        out = out * weights.to(wide)[:, None]
    return out.to(x.dtype)


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
) -> Tensor:
    """``activation(x[order] @ w[expert].T) * weights``, one row for each slot.

    Shapes: x (tokens, in) fp16 or bf16; order (slots,) integers, the token of each slot, or None if
    slots are tokens; offsets (experts + 1,) int32, the first of which is 0 and the last the number
    of slots; words, scales and zeros as `pack_experts` gives them; weights (slots,) fp32.
    """
    slots = x.shape[0] if order is None else order.shape[0]
    experts = words.shape[0]
    if x.device.type != "cpu" and slots <= 64 * experts:
        # Few tokens for each expert, on average: beyond, dequantised products win.
        return launch(
            x,
            order,
            offsets,
            W4(words, scales, zeros),
            _tile(slots // experts),
            weights=weights,
            out_features=out_features,
            group=group,
            activation=activation,
            wrap=torch.library.wrap_triton,
        )
    unpacked = [
        dequantised(words[e], scales[e], None if zeros is None else zeros[e], group)
        for e in range(experts)
    ]
    weight = torch.stack(unpacked)[:, :out_features, : x.shape[1]].to(x.dtype)
    rows = x if order is None else x.index_select(0, order)
    # Rows and columns in eights, because the library wants 16 bytes.
    more = (0, -x.shape[1] % 8, 0, -out_features % 8)
    rows, weight = F.pad(rows, more[:2]), F.pad(weight, more)
    product = torch._grouped_mm(rows, weight.transpose(1, 2), offs=offsets[1:].to(torch.int32))
    out = finished(product[:, :out_features].to(torch.float32), None, None, activation)
    if weights is not None:
        out = out * weights[:, None]
    return out.to(x.dtype)


def _tile(tokens: int) -> Tile:
    """A tile for so many tokens of an expert: none is split, for experts fill the device."""
    for BM, BN in ((8, 64), (16, 128)):
        if tokens <= BM:
            return Tile(BM, BN)
    return Tile(32, 128)


def token_blocks(offsets: Tensor, BM: int, slots: int, experts: int) -> Tensor:
    """Cut each expert's slots in blocks of BM, on the device, without asking it how many.

    Returns:
        (blocks, 3) int32: expert, first slot, one past the last; there are as many blocks as there
        could be, and those that are not needed are empty.
    """
    most = min(experts, slots) + slots // BM
    starts = offsets.to(torch.int64)
    each = (starts.diff() + (BM - 1)) // BM
    ends = each.cumsum(0)
    block = torch.arange(most, device=offsets.device)
    expert = torch.searchsorted(ends, block, right=True)
    real = expert < experts
    expert = expert.clamp_max(experts - 1)
    first = starts[expert] + (block - (ends - each)[expert]) * BM
    last = torch.minimum(first + BM, starts[expert + 1])
    first, last = torch.where(real, first, 0), torch.where(real, last, 0)
    return torch.stack((expert, first, last), 1).to(torch.int32)


def launch(
    x: Tensor,
    order: Tensor | None,
    offsets: Tensor,
    weight: W4,
    tile: Tile,
    *,
    out_features: int,
    group: int,
    weights: Tensor | None = None,
    activation: str = "none",
    wide: bool = False,
    fast: bool = True,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> Tensor:
    """Run the kernel; the arguments are those of the op and `torchlathe.kernels.w4a16.op.launch`.

    Returns:
        (slots, out).
    """
    from torchlathe.kernels.w4a16.triton import w4a16_experts

    words, scales, zeros = weight
    experts, rows, columns = words.shape[0], words.shape[1], 4 * words.shape[2]
    quarter = quarter_of(columns, group)
    slots = x.shape[0] if order is None else order.shape[0]
    x = widened(x, columns)
    blocks = token_blocks(offsets, tile.BM, slots, experts)
    out = torch.empty((slots, out_features), dtype=x.dtype, device=x.device)
    wrap(w4a16_experts)[(rows // tile.BN, blocks.shape[0])](
        x,
        blocks if order is None else order.to(torch.int32),
        blocks,
        words,
        scales,
        words if zeros is None else zeros,
        scales if weights is None else weights,
        out,
        out_features,
        columns // (4 * quarter),
        x.stride(0),
        words.stride(1),
        scales.stride(1),
        words.stride(0),
        scales.stride(0),
        BM=tile.BM,
        BN=tile.BN,
        QUARTER=quarter,
        GROUP=group,
        HAS_ORDER=order is not None,
        HAS_ZEROS=zeros is not None,
        HAS_WEIGHTS=weights is not None,
        ACTIVATION=activation_code(activation),
        WIDE=wide,
        FAST=fast and torch.version.hip is None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out
