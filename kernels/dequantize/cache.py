"""Rows of a key or value cache in few bits: ``quantize_cache`` and ``dequantize_cache``.

A row is what one head keeps of one token. It is stored as bytes that stand for themselves: the
numbers of the row, and for each group of its channels the step and, with 4 bits, the least value,
both fp16. So rows are joined, cut and written into one another as those of a floating cache are, by
the very same ops.

    8 bits, symmetric:    x = n s            s = max|x| / 127,               n in -127..127
    4 bits, asymmetric:   x = (n + 1/2) s + m    m = min x, s = (max x - min x) / 16,    n in 0..15

The half step lets 16 numbers cover the range evenly. Keys have few channels that are far larger
than the others: a Hadamard rotation of every row, undone on reading, spreads them over all.

A middle of each channel that is known beforehand may be taken off first, and is added again.

Source: per-token groups of channels are what KIVI (arXiv 2402.02750, section 3) does to values and
QServe (arXiv 2405.04532, section 4) to both; the rotation of keys is QuaRot's (arXiv 2404.00456,
section 4). Keys per channel are KIVI's too: it finds their ranges in a window of tokens in full
precision, which a graph without state does not have, so that they come from calibration data as in
KVQuant (arXiv 2401.18079, section 3.1). Only zero points are by channel here, the step stays that
of the token: steps by channel as well lost more. The half step is own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchlathe.ir.errors import OptionError
from torchlathe.kernels.registering import register

__all__ = ["cached_columns", "dequantize_cache", "hadamard", "quantize_cache", "row_bytes"]

_LEAST = 2.0**-100  # keeps a group of zeros from dividing by zero


def _groups(columns: int, group: int) -> int:
    return 1 if group == 0 else columns // group


def row_bytes(columns: int, bits: int, group: int) -> int:
    """Bytes of one row.

    Args:
        columns: Channels of a head.
        bits: 8 or 4.
        group: Channels that share a step; 0 for all of a head.

    Raises:
        OptionError: The group does not divide the channels, or there are no such numbers.
    """
    if bits not in (4, 8):
        raise OptionError(f"a cache is kept in 8 or 4 bits, not {bits}")
    # Steps lie behind the numbers, and begin at an even byte.
    if columns % 4 or (group and columns % group):
        raise OptionError(
            f"{columns} channels of a head are no multiple of {group or 4}",
            hint="give a group that divides them, or 0 for all of a head",
        )
    scales = _groups(columns, group) * (4 if bits == 4 else 2)
    return columns * bits // 8 + scales


def cached_columns(width: int, bits: int, group: int) -> int:
    """Channels of a head, from the bytes of a row; the inverse of `row_bytes`."""
    each = 4 if bits == 4 else 2
    if group == 0:
        return (width - each) * 8 // bits
    return width * 8 * group // (bits * group + 8 * each)


def hadamard(order: int, like: Tensor) -> Tensor:
    """The orthogonal, symmetric Hadamard matrix of an order that is a power of two."""
    matrix = torch.ones((1, 1), dtype=like.dtype, device=like.device)
    while len(matrix) < order:
        matrix = torch.cat(
            [torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0
        )  # fmt: skip
    return matrix / math.sqrt(order)


def _narrow(x: Tensor) -> Tensor:
    return x.clamp(-65504.0, 65504.0).to(torch.float16)


def _divisor(step: Tensor) -> Tensor:
    return step.to(torch.float32).clamp_min(_LEAST)[..., None]


def _rotated(x: Tensor, rotate: bool) -> Tensor:
    columns = int(x.shape[-1])
    if not rotate or columns & (columns - 1):
        return x
    found: Tensor = x @ hadamard(columns, x)
    return found


@register("quantize_cache")
def quantize_cache(
    x: Tensor, bits: int, group: int, rotate: bool, middles: Tensor | None = None
) -> Tensor:
    """Rows of a cache as bytes.

    Args:
        x: (..., columns), floating.
        bits: 8 or 4.
        group: Channels that share a step; 0 for all of a head.
        rotate: Whether rows are rotated first, where their width is a power of two.
        middles: What is taken off of x first, (..., columns); by default nothing.

    Returns:
        (..., `row_bytes`), uint8.

    Raises:
        OptionError: The group does not divide the channels, or there are no such numbers.
    """
    columns = int(x.shape[-1])
    row_bytes(columns, bits, group)
    wide = x.to(torch.float32)
    if middles is not None:
        wide = wide - middles
    parts = _rotated(wide, rotate).unflatten(-1, (_groups(columns, group), -1))
    if bits == 8:
        step = _narrow(parts.abs().amax(-1) / 127)
        # fp16 may have rounded the step down.
        numbers = (parts / _divisor(step)).round().clamp(-127, 127)
        stored = numbers.to(torch.int8).view(torch.uint8).flatten(-2)
        return torch.cat([stored, step.view(torch.uint8)], -1)
    low, high = parts.amin(-1), parts.amax(-1)
    step, least = _narrow((high - low) / 16), _narrow(low)
    shifted = (parts - least[..., None].to(torch.float32)) / _divisor(step)
    numbers = (shifted - 0.5).round().clamp(0, 15).to(torch.uint8).flatten(-2)
    stored = numbers[..., ::2] | (numbers[..., 1::2] << 4)
    return torch.cat([stored, step.view(torch.uint8), least.view(torch.uint8)], -1)


@register("dequantize_cache")
def dequantize_cache(
    rows: Tensor,
    columns: int,
    bits: int,
    group: int,
    rotate: bool,
    dtype: torch.dtype,
    middles: Tensor | None = None,
) -> Tensor:
    """What the bytes of `quantize_cache` stand for.

    Args:
        rows: (..., `row_bytes`), uint8.
        columns: Channels of a head.
        bits: 8 or 4.
        group: Channels that share a step; 0 for all of a head.
        rotate: Whether rows were rotated.
        dtype: Of the result.
        middles: What was taken off.

    Returns:
        (..., columns).
    """
    width, groups = columns * bits // 8, _groups(columns, group)
    stored = rows[..., :width]
    scales = rows[..., width:].contiguous().view(torch.float16).to(torch.float32)
    if bits == 8:
        numbers = stored.contiguous().view(torch.int8).to(torch.float32)
        parts = numbers.unflatten(-1, (groups, -1)) * scales[..., None]
    else:
        pairs = torch.stack([stored & 15, stored >> 4], -1).flatten(-2).to(torch.float32)
        step, least = scales[..., :groups, None], scales[..., groups:, None]
        parts = (pairs.unflatten(-1, (groups, -1)) + 0.5) * step + least
    # The rotation is its own inverse.
    wide = _rotated(parts.flatten(-2), rotate)
    if middles is not None:
        wide = wide + middles
    return wide.to(dtype)
