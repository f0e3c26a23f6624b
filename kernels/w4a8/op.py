"""``torchlathe::w4a8_linear``: a linear layer with 4-bit weights and int8 activations.

Source: own layout and kernel; the idea that unpacking must cost less than an instruction for two
weights is LiquidGEMM's (arXiv 2509.01229).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.ir.errors import OptionError
from torchlathe.kernels.epilogue import activation_code, add_parts, finished, room_for
from torchlathe.kernels.packing import SPAN, half_of, pack_hs4, pack_scales, unpack_hs4, widened
from torchlathe.kernels.registering import register
from torchlathe.kernels.tuning.table import tile_for
from torchlathe.kernels.tuning.tiles import Problem, Tile
from torchlathe.kernels.w8a8.op import integer_product

__all__ = ["W4Signed", "launch", "pack", "reference", "w4a8_linear"]


class W4Signed(NamedTuple):
    """Packed signed 4-bit weights.

    Attributes:
        packed: (rows, columns/2) int8, layout ``hs4``.
        scales: (groups, rows) fp32.
    """

    packed: Tensor
    scales: Tensor


def pack(values: Tensor, scales: Tensor, group: int = 0) -> W4Signed:
    """Pack a quantised weight: ``w[n, k] = values[n, k] * scales[k // group, n]``.

    Args:
        values: (out, in) int8, each from -8 to 7.
        scales: (groups, out).
        group: Weights that share a scale: 128, or 0 for a whole row.

    Raises:
        OptionError: The group has no layout, or a shape, type or value does not fit.
    """
    if group not in {0, SPAN}:
        raise OptionError(f"no layout for groups of {group}", hint=f"known are 0 and {SPAN}")
    packed = pack_scales(scales.to(torch.float32), values.shape[1], group)
    return W4Signed(pack_hs4(values), packed)


def reference(
    x: Tensor,
    x_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_features: int,
    activation: str = "none",
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """The meaning of the op: everything in float64."""
    values = unpack_hs4(packed).to(torch.float64)
    rows, columns = values.shape
    groups = scales.shape[0]
    weight = values.view(rows, groups, columns // groups) * scales.t().to(torch.float64)[:, :, None]
    weight = weight.view(rows, columns)[:out_features, : x.shape[-1]]
    product = F.linear(x.to(torch.float64), weight) * x_scales.to(torch.float64)[..., None]
    return finished(product, bias, residual, activation).to(dtype)


@register("w4a8_linear")
def w4a8_linear(
    x: Tensor,
    x_scales: Tensor,
    packed: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    dtype: torch.dtype,
    activation: str = "none",
) -> Tensor:
    """``activation(x * x_scales @ w.T + bias) + residual`` for packed weights `W4Signed`.

    Shapes: x (..., in) int8; x_scales (...,) fp32; bias (out,); residual and the result (..., out).
    """
    rows = x.reshape(-1, x.shape[-1])
    tile = None
    if x.device.type != "cpu":
        group = 0 if scales.shape[0] == 1 else SPAN
        problem = Problem("w4a8", "int8", rows.shape[0], out_features, x.shape[-1], group)
        tile = tile_for(problem, x.device)
    if tile is None:
        weight = unpack_hs4(packed)[:out_features, : x.shape[-1]]
        if scales.shape[0] == 1:
            product = integer_product(rows, weight) * scales[0, :out_features]
        else:
            product = _grouped_product(rows, weight, scales[:, :out_features])
        product = (product * x_scales.reshape(-1, 1)).view(*x.shape[:-1], out_features)
        return finished(product, bias, residual, activation).to(dtype)
    out = launch(
        rows,
        x_scales.reshape(-1),
        W4Signed(packed, scales),
        tile,
        out_features=out_features,
        dtype=dtype,
        bias=bias,
        residual=None if residual is None else residual.reshape(-1, out_features),
        activation=activation,
        wrap=torch.library.wrap_triton,
    )
    return out.view(*x.shape[:-1], out_features)


def _grouped_product(x: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    wide = F.pad(weight, (0, SPAN * scales.shape[0] - weight.shape[1])).to(torch.float32)
    wide = wide.view(weight.shape[0], scales.shape[0], SPAN) * scales.t()[:, :, None]
    return F.linear(x.to(torch.float32), wide.flatten(1)[:, : x.shape[1]])


def launch(
    x: Tensor,
    x_scales: Tensor,
    weight: W4Signed,
    tile: Tile,
    *,
    out_features: int,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    fast: bool = True,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> Tensor:
    """Run the kernel; the arguments are those of `torchlathe.kernels.w4a16.op.launch`.

    Returns:
        (tokens, out).
    """
    from torchlathe.kernels.w4a8.triton import w4a8

    rows, columns = weight.packed.shape[0], 2 * weight.packed.shape[1]
    half = half_of(columns)
    x = widened(x, columns)
    tokens = x.shape[0]
    out, parts = room_for(tokens, out_features, tile.split, dtype, x.device)
    single = tile.split == 1
    wrap(w4a8)[(rows // tile.BN, -(-tokens // tile.BM), tile.split)](
        x,
        x_scales,
        weight.packed,
        weight.scales,
        x_scales if bias is None else bias,
        x_scales if residual is None else residual,
        parts,
        tokens,
        out_features,
        columns // (2 * half),
        x.stride(0),
        weight.packed.stride(0),
        weight.scales.stride(0),
        BM=tile.BM,
        BN=tile.BN,
        HALF=half,
        GROUP=0 if weight.scales.shape[0] == 1 else SPAN,
        SPLIT_K=tile.split,
        HAS_BIAS=bias is not None and single,
        HAS_RESIDUAL=residual is not None and single,
        ACTIVATION=activation_code(activation) if single else 0,
        FAST=fast and torch.version.hip is None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if not single:
        add_parts(parts, out, bias, residual, activation, wrap)
    return out
