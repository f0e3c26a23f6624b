"""``torchlathe::w4a16_linear``: a linear layer whose weights are 4-bit numbers in groups.

Source: the arithmetic is that of GPTQ's and AWQ's layers; layout and kernel are own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.ir.errors import OptionError
from torchlathe.kernels.epilogue import activation_code, add_parts, finished, room_for
from torchlathe.kernels.packing import (
    ROWS,
    pack_qs4,
    pack_scales,
    padded,
    quarter_of,
    unpack_qs4,
    widened,
)
from torchlathe.kernels.registering import differentiate, register
from torchlathe.kernels.tuning.table import tile_for
from torchlathe.kernels.tuning.tiles import Problem, Tile

__all__ = [
    "W4",
    "dequantised",
    "launch",
    "pack",
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
    weight = dequantised(words, scales, zeros, group)[:out_features, : x.shape[-1]]
    product = F.linear(x.to(wide), weight.to(wide))
    return finished(product, bias, residual, activation).to(x.dtype)


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
    if x.device.type == "cpu":
        weight = dequantised(words, scales, zeros, group)[:out_features, : x.shape[-1]]
        product = F.linear(x, weight.to(x.dtype)).to(torch.float32)
        return finished(product, bias, residual, activation).to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    tile = _tile(rows, out_features, group)
    if tile is None:
        weight = unpacked(W4(words, scales, zeros), group, x.dtype)
        weight = weight[:out_features, : x.shape[-1]]
        product = F.linear(x, weight)
        if bias is None and residual is None and activation == "none":
            return product
        return finished(product.to(torch.float32), bias, residual, activation).to(x.dtype)
    flat = None if residual is None else residual.reshape(-1, out_features)
    out = launch(
        rows,
        W4(words, scales, zeros),
        tile,
        out_features=out_features,
        group=group,
        bias=bias,
        residual=flat,
        activation=activation,
        wrap=torch.library.wrap_triton,
    )
    return out.view(*x.shape[:-1], out_features)


def _weight_of(inputs: tuple[Any, ...]) -> Tensor:
    words, scales, zeros, out_features, group = (*inputs[1:4], *inputs[6:8])
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
    narrow = F.linear(x, down)
    if x.device.type != "cpu":
        rows = x.reshape(-1, x.shape[-1])
        tile = _tile(rows, out_features, group)
        if tile is not None:
            flat = None if residual is None else residual.reshape(-1, out_features)
            out = launch(
                rows,
                W4(words, scales, zeros),
                tile,
                out_features=out_features,
                group=group,
                bias=bias,
                residual=flat,
                activation=activation,
                low_rank=(narrow.reshape(-1, down.shape[0]), up),
                wrap=torch.library.wrap_triton,
            )
            return out.view(*x.shape[:-1], out_features)
        weight = unpacked(W4(words, scales, zeros), group, x.dtype)
    else:
        weight = dequantised(words, scales, zeros, group).to(x.dtype)
    product = F.linear(x, weight[:out_features, : x.shape[-1]]).to(torch.float32)
    product = product + F.linear(narrow, up[:out_features]).to(torch.float32)
    return finished(product, bias, residual, activation).to(x.dtype)


def pad_rank(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Pad factors, (rank, in) and (out, rank), to the rank and the rows that the kernel wants.

    Raises:
        OptionError: The rank is over 128.
    """
    rank = down.shape[0]
    wanted = max(16, 1 << max(rank - 1, 1).bit_length())
    if wanted > 128:
        raise OptionError(f"a rank of {rank} cannot be fused", hint="use two linear layers")
    more = wanted - rank
    rows = padded(up.shape[0], ROWS) - up.shape[0]
    return F.pad(down, (0, 0, 0, more)), F.pad(up, (0, more, 0, rows))


def _tile(rows: Tensor, out_features: int, group: int) -> Tile | None:
    dtype = str(rows.dtype).removeprefix("torch.")
    problem = Problem("w4a16", dtype, rows.shape[0], out_features, rows.shape[1], group)
    return tile_for(problem, rows.device)


def launch(
    x: Tensor,
    weight: W4,
    tile: Tile,
    *,
    out_features: int,
    group: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    low_rank: tuple[Tensor, Tensor] | None = None,
    wide: bool = False,
    fast: bool = True,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> Tensor:
    """Run the kernel.

    Args:
        x: (tokens, in).
        weight: The packed weights.
        tile: How the product is cut up.
        out_features: Rows of the weights without padding.
        group: Weights that share a scale.
        bias: (out,).
        residual: (tokens, out).
        activation: One of `torchlathe.kernels.epilogue.ACTIVATIONS`.
        low_rank: (tokens, rank) and (rows, rank), whose product is added to the sums.
        wide: Multiply in fp32, for the interpreter, which has no bf16.
        fast: Use PTX; other vendors and the interpreter have the plain form.
        wrap: What makes a kernel traceable.

    Returns:
        (tokens, out).
    """
    from torchlathe.kernels.w4a16.triton import w4a16

    rows, columns = weight.words.shape[0], 4 * weight.words.shape[1]
    quarter = quarter_of(columns, group)
    x = widened(x, columns)
    tokens = x.shape[0]
    out, parts = room_for(tokens, out_features, tile.split, x.dtype, x.device)
    split = tile.split > 1
    grid = (rows // tile.BN, -(-tokens // tile.BM), tile.split)
    wrap(w4a16)[grid](
        x,
        weight.words,
        weight.scales,
        weight.words if weight.zeros is None else weight.zeros,
        x if bias is None else bias,
        x if residual is None else residual,
        x if low_rank is None else low_rank[0],
        x if low_rank is None else low_rank[1],
        parts,
        tokens,
        out_features,
        columns // (4 * quarter),
        x.stride(0),
        weight.words.stride(0),
        weight.scales.stride(0),
        BM=tile.BM,
        BN=tile.BN,
        QUARTER=quarter,
        GROUP=group,
        SPLIT_K=tile.split,
        RANK=0 if low_rank is None else low_rank[0].shape[1],
        HAS_ZEROS=weight.zeros is not None,
        HAS_BIAS=bias is not None and not split,
        HAS_RESIDUAL=residual is not None and not split,
        ACTIVATION=0 if split else activation_code(activation),
        WIDE=wide,
        FAST=fast and torch.version.hip is None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if split:
        add_parts(parts, out, bias, residual, activation, wrap)
    return out


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
