"""W4A16 by torch's own CPU kernel, with its own packing.

`torch.ops.torchlathe.w4a16_linear` runs on a CPU too, but unpacks the weights at each call. What is
lowered for a CPU should be packed for it. It is faster than a dense layer up to some 8 tokens, and
than unpacking at each call up to some hundreds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.ir.errors import OptionError, UnsupportedError
from torchlathe.kernels.epilogue import finished
from torchlathe.kernels.registering import register

__all__ = [
    "W4OnCpu",
    "capability",
    "group_for",
    "linear_on_cpu",
    "pack_for_cpu",
    "supports",
    "w4a16_cpu_linear",
]

_ROWS = 16  # the kernel takes rows in sixteens
_GROUPS = (32, 64, 128)


class W4OnCpu(NamedTuple):
    """What ``aten::_weight_int4pack_mm_for_cpu`` takes.

    Attributes:
        packed: (rows, columns/2) uint8.
        scales_and_zeros: (groups, rows, 2) in the type of the activations.
    """

    packed: Tensor
    scales_and_zeros: Tensor


def group_for(columns: int, group: int) -> int:
    """The group that torch's kernel takes a layer with: a whole row is cut in equal groups."""
    return group or next((each for each in reversed(_GROUPS) if columns % each == 0), 0)


def supports(columns: int, group: int) -> str | None:
    """Why torch's kernel cannot take a layer, or None."""
    group = group_for(columns, group)
    if group not in _GROUPS:
        return f"groups of {group or columns}: torch's kernel takes 32, 64 and 128"
    if columns % group:
        return f"{columns} columns are no whole groups of {group}"
    return None


def pack_for_cpu(values: Tensor, scales: Tensor, zeros: Tensor | None, group: int) -> W4OnCpu:
    """Pack a quantised weight; the arguments are those of `torchlathe.kernels.w4a16.op.pack`.

    Groups become those that `group_for` says.

    Raises:
        OptionError: Torch's kernel cannot take the layer.
    """
    out, columns = values.shape
    if reason := supports(columns, group):
        raise OptionError(f"no packing for a CPU: {reason}", hint="use w4a16_linear")
    repeats = 1 if group else columns // group_for(columns, group)
    scales = scales.repeat_interleave(repeats, 0)
    zeros = None if zeros is None else zeros.repeat_interleave(repeats, 0)
    rows = -(-out // _ROWS) * _ROWS
    values = F.pad(values, (0, 0, 0, rows - out)).to(torch.int32)
    # The kernel computes (value - 8) * scale + zero.
    shifts = torch.zeros_like(scales) if zeros is None else (8.0 - zeros.to(scales.dtype)) * scales
    both = F.pad(torch.stack((scales, shifts), -1), (0, 0, 0, rows - out))
    return W4OnCpu(torch._convert_weight_to_int4pack_for_cpu(values, 1), both.contiguous())


def linear_on_cpu(x: Tensor, weight: W4OnCpu, group: int, out_features: int) -> Tensor:
    """``x @ w.T`` for x (..., in) in the type of the scales, bf16 for speed: (..., out)."""
    rows = x.reshape(-1, x.shape[-1])
    packed, both = weight
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, packed, group, both)
    return product[:, :out_features].reshape(*x.shape[:-1], out_features)


def capability() -> str:
    """Which vector instructions torch uses here; the order of packed weights depends on it."""
    return torch.backends.cpu.get_cpu_capability()


@register("w4a16_cpu_linear")
def w4a16_cpu_linear(
    x: Tensor,
    packed: Tensor,
    scales_and_zeros: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    group: int,
    packed_for: str,
    activation: str = "none",
) -> Tensor:
    """``activation(x @ w.T + bias) + residual`` for packed weights `W4OnCpu`.

    Shapes: x (..., in), bf16 for speed; bias (out,); residual and the result (..., out).

    Raises:
        UnsupportedError: The weights were packed for another kind of processor.
    """
    if packed_for != capability():
        raise UnsupportedError(
            f"these weights are packed for {packed_for}, and this processor has {capability()}",
            hint="quantise again here, or save the program before fuse-kernels",
        )
    weight = W4OnCpu(packed, scales_and_zeros)
    product = linear_on_cpu(x, weight, group, out_features)
    return finished(product, bias, residual, activation).to(x.dtype)
