"""The values that a quantised matrix can have: scales and zero points, and rounding to them.

`quantised` is all of it for one matrix. Scales are rounded to the type that they are stored in
before anything is divided by them, so that what is rounded is rounded once.

Source: rounding to nearest is textbook; clipping by a search over shrunken ranges is that of AWQ
(arXiv 2306.00978, its ``auto_clip``), here with the weights of the columns as GPTQ's moment gives
them. The rest is own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.ir import OptionError
from torchlathe.kernels.dequantize.formats import (
    Format,
    decode,
    decode_scales,
    encode,
    format_of,
    pack,
)
from torchlathe.kernels.dequantize.op import meaning

__all__ = ["Clip", "Grid", "Quantised", "fit_grid", "quantised"]

Clip = Literal["none", "mse"]

# Shares of the range that a search tries; all of it first, which wins a tie.
_SHARES = tuple(1 - 0.03 * step for step in range(22))


@dataclass(frozen=True)
class Quantised:
    """A matrix in its stored form; what `torchlathe.kernels.dequantize.op.dequantize` takes.

    Attributes:
        values: (rows, bytes or columns) as stored.
        scales: (rows, groups) as stored.
        zeros: (rows, groups) in codes, or None.
        total: One more scale, shape (), or None.
        columns: Numbers in a row.
        group: Columns that share a scale; 0 for a whole row.
        format: Name of the format.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    total: Tensor | None
    columns: int
    group: int
    format: str

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What it stands for, (rows, columns)."""
        return meaning(
            self.values,
            self.scales,
            self.zeros,
            self.total,
            self.columns,
            self.group,
            format_of(self.format),
            dtype,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of everything that is stored."""
        parts = (self.values, self.scales, self.zeros, self.total)
        return sum(p.numel() * p.element_size() for p in parts if p is not None)


@dataclass(frozen=True)
class Grid:
    """What the entries of a matrix may become.

    Attributes:
        form: The number format.
        columns: Of the matrix.
        group: Columns that share a scale; 0 for a whole row.
        scales: (rows, groups) as numbers, as they will be read back.
        zeros: (rows, groups) in codes, or None.
        stored: The scales as they are stored.
        total: One more scale, or None.
    """

    form: Format
    columns: int
    group: int
    scales: Tensor
    zeros: Tensor | None
    stored: Tensor
    total: Tensor | None = None

    def codes(self, x: Tensor, columns: Tensor | None = None) -> Tensor:
        """The nearest codes of some columns.

        Args:
            x: (rows, n) values, which may have moved since the grid was made.
            columns: Which columns these are, (n,) int64; by default all in order.

        Returns:
            (rows, n), int8 or uint8.
        """
        scales, zeros = self._of(columns)
        return encode(x / scales, self.form, zeros)

    def decoded(self, codes: Tensor, columns: Tensor | None = None) -> Tensor:
        """What codes stand for, in the type of the scales."""
        scales, zeros = self._of(columns)
        return decode(codes, self.form, zeros, scales.dtype) * scales

    def quantised(self, codes: Tensor) -> Quantised:
        """The stored form of all codes, (rows, columns)."""
        zeros = self.zeros
        return Quantised(
            pack(codes, self.form),
            self.stored,
            None if zeros is None else zeros.to(self.form.stored),
            self.total,
            self.columns,
            self.group if self.scales.shape[1] > 1 else 0,
            self.form.name,
        )

    def _of(self, columns: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points of columns, (rows, n), or (rows, 1) where they have the same."""
        if self.scales.shape[1] == 1:
            return self.scales, self.zeros
        if columns is None:
            columns = torch.arange(self.columns, device=self.scales.device)
        places = columns // self.group
        return self.scales[:, places], None if self.zeros is None else self.zeros[:, places]


def quantised(
    weight: Tensor,
    format: str = "int8",
    *,
    group: int = 0,
    symmetric: bool = True,
    clip: Clip = "none",
    importance: Tensor | None = None,
) -> Quantised:
    """A matrix rounded to nearest.

    Args:
        weight: (rows, columns), floating.
        format: One of `torchlathe.kernels.dequantize.formats.FORMATS`.
        group: Columns that share a scale; 0 for a whole row. A format with blocks has these.
        symmetric: Whether to do without zero points.
        clip: ``"mse"`` shrinks the range of each group where that makes the squared error less.
        importance: (columns,) how much the error of each column counts for that.

    Returns:
        With ``clip="none"``, every entry within half a step of what it was.

    Raises:
        OptionError: There is no such format, or the matrix is none.
    """
    grid = fit_grid(weight, format, group=group, symmetric=symmetric, clip=clip,
                    importance=importance)  # fmt: skip
    return grid.quantised(grid.codes(weight.detach().to(grid.scales.dtype)))


def fit_grid(
    weight: Tensor,
    format: str = "int8",
    *,
    group: int = 0,
    symmetric: bool = True,
    clip: Clip = "none",
    importance: Tensor | None = None,
) -> Grid:
    """Scales and zero points for a matrix; the arguments are those of `quantised`.

    Raises:
        OptionError: There is no such format, or the matrix is none.
    """
    form = format_of(format)
    if weight.dim() != 2 or not weight.is_floating_point():
        raise OptionError(f"expected a floating matrix, got {weight.dtype} {tuple(weight.shape)}")
    columns = weight.shape[1]
    group = form.block or group
    group = 0 if group >= columns and form.block is None else group
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    parts = _grouped(weight.detach().to(dtype), group)
    ranges = _Ranges.of(parts, form, symmetric=symmetric, narrow=group != 0)
    if clip == "none":
        return ranges.grid(1.0, columns, group)
    counts = torch.ones(columns, dtype=dtype, device=weight.device)
    counts = counts if importance is None else importance.to(counts)
    weights = _grouped(counts[None], group)
    best = torch.full(parts.shape[:2], torch.inf, dtype=dtype, device=weight.device)
    chosen = torch.ones_like(best)
    for share in _SHARES:
        scales, zeros, _ = ranges.at(share)
        numbers = encode(
            parts / scales[..., None], form, None if zeros is None else zeros[..., None]
        )
        back = decode(numbers, form, None if zeros is None else zeros[..., None], dtype)
        loss = ((back * scales[..., None] - parts).square_() * weights).sum(-1)
        better = loss < best
        best = torch.where(better, loss, best)
        chosen = torch.where(better, share, chosen)
    return ranges.grid(chosen, columns, group)


@dataclass(frozen=True)
class _Ranges:
    """The lowest and highest value of each group, which scales are made of."""

    form: Format
    low: Tensor
    high: Tensor
    symmetric: bool
    narrow: bool
    total: Tensor | None

    @classmethod
    def of(cls, parts: Tensor, form: Format, *, symmetric: bool, narrow: bool) -> _Ranges:
        """Of a matrix in groups, (rows, groups, columns of a group)."""
        if symmetric or not form.integer:
            high = parts.abs().amax(-1)
            low = -high
        else:
            low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
        total = None
        if form.scales == "e4m3":
            # The largest group has the largest scale that e4m3 has.
            total = (high.amax() / (form.most * 448)).to(torch.float32)
            total = torch.where(total > 0, total, torch.ones_like(total))
        return cls(form, low, high, symmetric, narrow, total)

    def at(self, share: float | Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Scales as numbers, zero points, and scales as stored, for a share of the ranges."""
        low, high = self.low * share, self.high * share
        if self.symmetric or not self.form.integer:
            scales, stored = self._stored(high / self.form.most)
            return scales, None, stored
        scales, stored = self._stored((high - low) / (2**self.form.bits - 1))
        lowest = float(self.form.least) if self.form.bits == 8 else 0.0
        zeros = (lowest - low / scales).round()
        return scales, zeros.clamp(lowest, lowest + 2**self.form.bits - 1), stored

    def grid(self, share: float | Tensor, columns: int, group: int) -> Grid:
        """The grid for a share of each range."""
        scales, zeros, stored = self.at(share)
        return Grid(self.form, columns, group, scales, zeros, stored, self.total)

    def _stored(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Rounded up to what can be stored, so that nothing is clipped; one for empty groups."""
        dtype = scales.dtype
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        if self.form.scales == "e8m0":
            stored = (scales.log2().ceil() + 127).clamp(0, 254).to(torch.uint8)
        elif self.form.scales == "e4m3":
            assert self.total is not None
            wanted = (scales / self.total.to(dtype)).clamp(max=448.0)
            # 2^-9 is the least that is not zero; the step of what is larger is 2^-3 of it.
            up = (wanted * (1 + 2.0**-4)).clamp(2.0**-9, 448.0).to(torch.float32)
            stored = up.to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            kind = torch.bfloat16 if self.narrow else torch.float32
            kind = torch.float64 if dtype == torch.float64 and not self.narrow else kind
            finfo = torch.finfo(kind)
            up = scales * (1 + finfo.eps) if kind != dtype else scales
            stored = up.clamp(finfo.tiny, finfo.max).to(kind)
        return decode_scales(stored, self.form, self.total, dtype), stored


def _grouped(matrix: Tensor, group: int) -> Tensor:
    """(rows, groups, columns of a group); the last is filled up with zeros."""
    if group == 0:
        return matrix[:, None]
    missing = -matrix.shape[1] % group
    parts: Tensor = F.pad(matrix, (0, missing)).unflatten(1, (-1, group))
    return parts


def stacked(parts: list[Quantised]) -> Quantised:
    """Several matrices of one form below each other."""
    first = parts[0]

    def joined(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found)

    values, scales = joined("values"), joined("scales")
    assert values is not None
    assert scales is not None
    return replace(first, values=values, scales=scales, zeros=joined("zeros"))
