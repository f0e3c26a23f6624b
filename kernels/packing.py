"""How quantised weights lie in memory, and the way there and back.

The logical form is one integer per weight, (out, in), with scales (groups, out) and, where it is
asymmetric, zero points of the same shape. The packed forms pad and permute; each has an exact
inverse. Layouts:

- ``qs4`` (4 bits): int16 (rows, columns/4). A row is cut into spans of four quarters; word ``r``
  of a span holds the columns ``r``, ``r + q``, ``r + 2q`` and ``r + 3q`` from the lowest bits up,
  for a quarter ``q`` of 64 or 32 (`quarter_of`). All of a quarter lies in one group.
- ``hs8`` (8 bits): int16 (rows, columns/2), halves of 64 in spans of 128: the low byte holds
  column ``r``, the high byte column ``r + 64``, both plus 128.
- ``hs4`` (4 bits, for 8-bit activations): int8 (rows, columns/2), halves of ``h`` columns, 128 or
  64 (`half_of`): the low nibble holds column ``r``, the high nibble column ``r + h``, both in two's
  complement; or without a sign, where there are zero points.
- ``sm4`` (4 bits, for fp8 activations): the same with a sign and three bits, which are the bits of
  an e4m3.

Rows are padded to 128 and columns to 128, with zeros that have no effect.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.ir.errors import OptionError

__all__ = [
    "GROUPS",
    "ROWS",
    "SPAN",
    "half_of",
    "pack_hs4",
    "pack_hs8",
    "pack_qs4",
    "pack_scales",
    "pack_sm4",
    "padded",
    "quarter_of",
    "unpack_hs4",
    "unpack_hs8",
    "unpack_hu4",
    "unpack_qs4",
    "unpack_sm4",
    "widened",
]

ROWS = 128
SPAN = 128
# Weights that share a scale; 0 is a whole row.
GROUPS = (0, 32, 64, 128)

_HALF = 64


def padded(extent: int, multiple: int) -> int:
    """The next multiple of ``multiple``."""
    return -(-extent // multiple) * multiple


def quarter_of(columns: int, group: int) -> int:
    """Quarter of the ``qs4`` layout.

    Args:
        columns: Padded columns, a multiple of 128.
        group: Weights that share a scale, one of `GROUPS`.

    Returns:
        64 where that divides group and row, which makes lines of 128 bytes, else 32.
    """
    return 64 if group % 64 == 0 and columns % 256 == 0 else 32


def pack_qs4(values: Tensor, group: int) -> Tensor:
    """Pack 4-bit weights for 16-bit activations.

    Args:
        values: (out, in) uint8, each below 16.
        group: Weights that share a scale, one of `GROUPS`.

    Returns:
        (rows, columns/4) int16.

    Raises:
        OptionError: The group has no layout, or the values are not 4-bit numbers.
    """
    _check(values, group)
    values = _pad(values)
    rows, columns = values.shape
    quarter = quarter_of(columns, group)
    parts = values.view(rows, columns // (4 * quarter), 4, quarter).to(torch.int32)
    shifts = torch.tensor([0, 4, 8, 12], dtype=torch.int32, device=values.device)
    words = (parts << shifts[:, None]).sum(2, dtype=torch.int32)
    return _signed(words, 16).to(torch.int16).reshape(rows, columns // 4)


def unpack_qs4(words: Tensor, group: int) -> Tensor:
    """The inverse of `pack_qs4`, with the padding: (rows, columns) int16."""
    rows, columns = words.shape[0], words.shape[1] * 4
    quarter = quarter_of(columns, group)
    spans = words.view(rows, columns // (4 * quarter), 1, quarter)
    return ((spans >> _shifts(4, words)) & 15).reshape(rows, columns)


def pack_hs8(values: Tensor) -> Tensor:
    """Pack 8-bit weights for 16-bit activations.

    Args:
        values: (out, in) int8.

    Returns:
        (rows, columns/2) int16.

    Raises:
        OptionError: The values are not int8.
    """
    if values.dtype != torch.int8 or values.dim() != 2:
        raise OptionError(f"weights must be int8 of two axes, not {_described(values)}")
    values = _pad(values)
    rows, columns = values.shape
    parts = values.view(rows, columns // SPAN, 2, _HALF).to(torch.int32) + 128
    words = parts[:, :, 0] | (parts[:, :, 1] << 8)
    return _signed(words, 16).to(torch.int16).reshape(rows, columns // 2)


def unpack_hs8(words: Tensor) -> Tensor:
    """The inverse of `pack_hs8`, with the padding: (rows, columns) int16."""
    rows, columns = words.shape[0], words.shape[1] * 2
    spans = words.view(rows, columns // SPAN, 1, _HALF)
    return ((spans >> _shifts(8, words)) & 255).reshape(rows, columns) - 128


def half_of(columns: int) -> int:
    """Half of a span of the ``hs4`` layout: 128 where the padded columns allow it, else 64."""
    return 128 if columns % 256 == 0 else 64


def pack_hs4(values: Tensor) -> Tensor:
    """Pack 4-bit weights for int8 activations.

    Args:
        values: (out, in) int8, each from -8 to 7; or uint8, each below 16, for zero points.

    Returns:
        (rows, columns/2) int8.

    Raises:
        OptionError: The values are not 4-bit numbers.
    """
    if values.dtype == torch.uint8 and values.dim() == 2:
        if values.numel() and int(values.max()) > 15:
            raise OptionError(f"weights must be below 16, the largest is {int(values.max())}")
    elif values.dtype != torch.int8 or values.dim() != 2:
        raise OptionError(f"weights must be int8 of two axes, not {_described(values)}")
    elif values.numel() and not -8 <= int(values.min()) <= int(values.max()) <= 7:
        raise OptionError("weights must be from -8 to 7")
    return _pack_halves(values.to(torch.int32) & 15)


def unpack_hs4(packed: Tensor) -> Tensor:
    """The inverse of `pack_hs4` for int8, with the padding: (rows, columns) int8."""
    # Shifting right keeps the sign, so that the low nibble goes to the top first.
    return _unpacked_halves(packed, lambda low: (low << 4) >> 4, lambda high: high >> 4)


def unpack_hu4(packed: Tensor) -> Tensor:
    """The inverse of `pack_hs4` for uint8, with the padding: (rows, columns) int8 below 16."""
    return _unpacked_halves(packed, lambda low: low & 15, lambda high: (high >> 4) & 15)


def pack_sm4(values: Tensor) -> Tensor:
    """Pack 4-bit weights for fp8 activations: a sign and three bits.

    Args:
        values: (out, in) int8, each from -7 to 7.

    Returns:
        (rows, columns/2) int8.

    Raises:
        OptionError: The values are not of a sign and three bits.
    """
    if values.dtype != torch.int8 or values.dim() != 2:
        raise OptionError(f"weights must be int8 of two axes, not {_described(values)}")
    if values.numel() and int(values.abs().max()) > 7:
        raise OptionError("weights for fp8 activations must be from -7 to 7")
    wide = values.to(torch.int32)
    return _pack_halves(wide.abs() | (wide < 0).to(torch.int32) << 3)


def unpack_sm4(packed: Tensor) -> Tensor:
    """The inverse of `pack_sm4`, with the padding: (rows, columns) int8."""
    bits = unpack_hu4(packed)
    return torch.where(bits > 7, -(bits & 7), bits)


def _pack_halves(nibbles: Tensor) -> Tensor:
    nibbles = _pad(nibbles)
    rows, columns = nibbles.shape
    half = half_of(columns)
    parts = nibbles.view(rows, columns // (2 * half), 2, half)
    packed = parts[:, :, 0] | (parts[:, :, 1] << 4)
    return _signed(packed, 8).to(torch.int8).reshape(rows, columns // 2)


def _unpacked_halves(
    packed: Tensor, low: Callable[[Tensor], Tensor], high: Callable[[Tensor], Tensor]
) -> Tensor:
    rows, columns = packed.shape[0], packed.shape[1] * 2
    half = half_of(columns)
    spans = packed.view(rows, columns // (2 * half), 1, half)
    return torch.cat((low(spans), high(spans)), 2).reshape(rows, columns)


def pack_scales(scales: Tensor, columns: int, group: int) -> Tensor:
    """Pad scales or zero points, (groups, out), to the groups and rows of the packed weights.

    Args:
        scales: One row per group of columns, the last of which may be short.
        columns: Input features before padding.
        group: Weights that share a scale; 0 for one scale per output feature.

    Raises:
        OptionError: The number of groups is another than the columns have.
    """
    groups = 1 if group == 0 else -(-columns // group)
    if scales.dim() != 2 or scales.shape[0] != groups:
        raise OptionError(
            f"scales must be (groups, out) with {groups} groups, not {_described(scales)}",
            hint=f"{columns} columns in groups of {group or columns}",
        )
    whole = 1 if group == 0 else padded(columns, SPAN) // group
    rows = padded(scales.shape[1], ROWS)
    return F.pad(scales, (0, rows - scales.shape[1], 0, whole - groups)).contiguous()


def widened(x: Tensor, columns: int) -> Tensor:
    """Activations, (tokens, in), padded to the columns of the weights, in one piece.

    Nothing is copied where nothing is missing: padding by nothing would be a copy.
    """
    if x.shape[1] != columns:
        # Zero has the same bits in every type, and not every type can be padded.
        bits = x.view(torch.int8) if x.element_size() == 1 else x
        x = F.pad(bits, (0, columns - x.shape[1])).view(x.dtype)
    return x.contiguous()


def _shifts(bits: int, words: Tensor) -> Tensor:
    # Made on the device: a copy to it is something that no CUDA graph captures. And not one by one
    # and stacked: AOTInductor (torch 2.13, CPU) makes NaN of that where bf16 products follow.
    return torch.arange(0, 16, bits, dtype=torch.int16, device=words.device)[:, None]


def _pad(values: Tensor) -> Tensor:
    rows, columns = values.shape
    return F.pad(values, (0, padded(columns, SPAN) - columns, 0, padded(rows, ROWS) - rows))


def _signed(words: Tensor, bits: int) -> Tensor:
    # Wraps by arithmetic, because a cast that overflows is not defined everywhere.
    return words - ((words >> (bits - 1)) << bits)


def _check(values: Tensor, group: int) -> None:
    if group not in GROUPS:
        raise OptionError(
            f"no layout for groups of {group}", hint=f"known are {', '.join(map(str, GROUPS))}"
        )
    if values.dtype != torch.uint8 or values.dim() != 2:
        raise OptionError(f"weights must be uint8 of two axes, not {_described(values)}")
    if values.numel() and int(values.max()) > 15:
        raise OptionError(f"weights must be below 16, the largest is {int(values.max())}")


def _described(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
