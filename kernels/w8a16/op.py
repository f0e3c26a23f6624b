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
from torchlathe.kernels.epilogue import activation_code, add_parts, finished, room_for
from torchlathe.kernels.packing import SPAN, pack_hs8, pack_scales, unpack_hs8, widened
from torchlathe.kernels.registering import differentiate, register
from torchlathe.kernels.tuning.table import tile_for
from torchlathe.kernels.tuning.tiles import Problem, Tile

__all__ = ["W8", "dequantised", "launch", "pack", "reference", "unpacked", "w8a16_linear"]


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
    weight = dequantised(words, scales)[:out_features, : x.shape[-1]]
    product = F.linear(x.to(wide), weight.to(wide))
    return finished(product, bias, residual, activation).to(x.dtype)


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
    rows = x.reshape(-1, x.shape[-1])
    tile = None
    if x.device.type != "cpu":
        dtype = str(x.dtype).removeprefix("torch.")
        group = 0 if scales.shape[0] == 1 else SPAN
        problem = Problem("w8a16", dtype, rows.shape[0], out_features, x.shape[-1], group)
        tile = tile_for(problem, x.device)
    if tile is None:
        if x.device.type == "cpu":
            weight = dequantised(words, scales).to(x.dtype)
        else:
            weight = unpacked(W8(words, scales), x.dtype)
        product = F.linear(x, weight[:out_features, : x.shape[-1]]).to(torch.float32)
        return finished(product, bias, residual, activation).to(x.dtype)
    out = launch(
        rows,
        W8(words, scales),
        tile,
        out_features=out_features,
        bias=bias,
        residual=None if residual is None else residual.reshape(-1, out_features),
        activation=activation,
        wrap=torch.library.wrap_triton,
    )
    return out.view(*x.shape[:-1], out_features)


def _weight_of(inputs: tuple[Any, ...]) -> Tensor:
    words, scales, out_features = (*inputs[1:3], inputs[5])
    return dequantised(words, scales)[:out_features]


differentiate(w8a16_linear, _weight_of)


def launch(
    x: Tensor,
    weight: W8,
    tile: Tile,
    *,
    out_features: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    wide: bool = False,
    fast: bool = True,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> Tensor:
    """Run the kernel; the arguments are those of `torchlathe.kernels.w4a16.op.launch`.

    Returns:
        (tokens, out).
    """
    from torchlathe.kernels.w8a16.triton import w8a16

    rows, columns = weight.words.shape[0], 2 * weight.words.shape[1]
    x = widened(x, columns)
    tokens = x.shape[0]
    out, parts = room_for(tokens, out_features, tile.split, x.dtype, x.device)
    single = tile.split == 1
    wrap(w8a16)[(rows // tile.BN, -(-tokens // tile.BM), tile.split)](
        x,
        weight.words,
        weight.scales,
        x if bias is None else bias,
        x if residual is None else residual,
        parts,
        tokens,
        out_features,
        columns // SPAN,
        x.stride(0),
        weight.words.stride(0),
        weight.scales.stride(0),
        BM=tile.BM,
        BN=tile.BN,
        GROUP=0 if weight.scales.shape[0] == 1 else SPAN,
        SPLIT_K=tile.split,
        HAS_BIAS=bias is not None and single,
        HAS_RESIDUAL=residual is not None and single,
        ACTIVATION=activation_code(activation) if single else 0,
        WIDE=wide,
        FAST=fast and torch.version.hip is None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if not single:
        add_parts(parts, out, bias, residual, activation, wrap)
    return out


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
