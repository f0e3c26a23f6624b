"""The values that a quantised matrix can have: scales and zero points, and rounding to them.

`quantised` is all of it for one matrix. Scales are rounded to the type that they are stored in
before anything is divided by them, so that what is rounded is rounded once.

Source: rounding to nearest is textbook; clipping by a search over shrunken ranges is that of AWQ
(arXiv 2306.00978, its ``auto_clip``), here with the weights of the columns as GPTQ's moment gives
them. The rest is own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

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
from torchlathe.passes.rewrite.quantising.layouts import Layout

__all__ = [
    "Clip",
    "Grid",
    "Quantised",
    "blank",
    "fit_grid",
    "joined",
    "quantised",
    "stacked",
    "total_of",
]

Clip = Literal["none", "mse"]

# Shares of the range that a search tries; all of it first, which wins a tie.
_SHARES = tuple(1 - 0.03 * step for step in range(22))
# Elements that a search holds in wide form at a time, few enough for a cache; rows do not depend on
# one another.
_MANY = 2**18


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

    def rows(self, which: slice) -> Grid:
        """The grid of some rows."""
        zeros = None if self.zeros is None else self.zeros[which]
        return replace(self, scales=self.scales[which], zeros=zeros, stored=self.stored[which])

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
    whole = weight.detach()
    fitted = _Fit.of(whole, format, group, symmetric, clip, importance)
    parts = []
    for rows in fitted.blocks(whole):
        grid = fitted.grid(rows)
        parts.append(grid.quantised(grid.codes(rows.to(grid.scales.dtype))))
    return stacked(parts)


def fit_grid(
    weight: Tensor,
    format: str = "int8",
    *,
    group: int = 0,
    symmetric: bool = True,
    clip: Clip = "none",
    importance: Tensor | None = None,
    total: Tensor | None = None,
) -> Grid:
    """Scales and zero points for a matrix; the other arguments are those of `quantised`.

    Args:
        weight: (rows, columns), floating.
        format: Name of the format.
        group: Columns that share a scale; 0 for a whole row.
        symmetric: Whether to do without zero points.
        clip: How ranges are chosen.
        importance: (columns,) how much the error of each column counts for that.
        total: The one more scale of ``nvfp4``, where the matrix is a part of a larger one.

    Raises:
        OptionError: There is no such format, or the matrix is none.
    """
    whole = weight.detach()
    fitted = _Fit.of(whole, format, group, symmetric, clip, importance, total)
    grids = [fitted.grid(rows) for rows in fitted.blocks(whole)]
    return joined(grids)


def joined(grids: Sequence[Grid]) -> Grid:
    """Grids of matrices that lie below each other, with the same columns and groups."""
    first = grids[0]
    zeros = [grid.zeros for grid in grids if grid.zeros is not None]
    return replace(
        first,
        scales=torch.cat([grid.scales for grid in grids]),
        stored=torch.cat([grid.stored for grid in grids]),
        zeros=torch.cat(zeros) if zeros else None,
    )


def total_of(weight: Tensor, format: str) -> Tensor | None:
    """The one scale for all of a tensor, shape (), float32, of formats that have it."""
    form = format_of(format)
    if form.scales != "e4m3":
        return None
    low, high = weight.aminmax() if weight.numel() else (weight.new_zeros(()),) * 2
    # The largest group has the largest scale that e4m3 has.
    total = (torch.maximum(-low, high).double() / (form.most * 448)).to(torch.float32)
    return torch.where(total > 0, total, torch.ones_like(total))


@dataclass(frozen=True)
class _Fit:
    """How the scales of any rows of a matrix are chosen."""

    layout: Layout
    clip: Clip
    dtype: torch.dtype
    importance: Tensor | None
    total: Tensor | None

    @classmethod
    def of(
        cls,
        weight: Tensor,
        format: str,
        group: int,
        symmetric: bool,
        clip: Clip,
        importance: Tensor | None,
        total: Tensor | None = None,
    ) -> _Fit:
        if weight.dim() != 2 or not weight.is_floating_point():
            raise OptionError(
                f"expected a floating matrix, got {weight.dtype} {tuple(weight.shape)}"
            )
        layout = Layout.of(
            format, weight.shape[1], group=group, symmetric=symmetric, dtype=weight.dtype
        )
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        total = total_of(weight, format) if total is None else total
        return cls(layout, clip, dtype, importance, total)

    def blocks(self, weight: Tensor) -> tuple[Tensor, ...]:
        """A matrix in blocks of few rows."""
        found: tuple[Tensor, ...] = weight.split(max(1, _MANY // max(1, self.layout.columns)))
        return found

    def grid(self, rows: Tensor) -> Grid:
        """The grid of some rows."""
        layout = self.layout
        parts = grouped(rows.to(self.dtype), layout.group)
        choices = _choices(parts, layout.form, symmetric=not layout.zeros)
        chosen = choices[0] if len(choices) == 1 and self.clip == "none" else None
        if chosen is None:
            chosen = self._best(parts, choices)
        scales, zeros, stored = self._at(*chosen)
        return Grid(layout.form, layout.columns, layout.group, scales, zeros, stored, self.total)

    def _best(self, parts: Tensor, choices: Sequence[_Range]) -> _Range:
        """Of the ranges, and of shares of the last, that of least squared error for each group."""
        counts = torch.ones(self.layout.columns, dtype=self.dtype, device=parts.device)
        if self.importance is not None and self.clip == "mse":
            counts = self.importance.to(counts)
        weights = grouped(counts[None], self.layout.group)
        best = torch.full(parts.shape[:2], torch.inf, dtype=self.dtype, device=parts.device)
        chosen = choices[0]
        tried = list(choices)
        if self.clip == "mse":
            low, high = choices[-1]
            tried += [_Range(low * share, high * share) for share in _SHARES[1:]]
        for low, high in tried:
            scales, zeros, _ = self._at(low, high)
            own = None if zeros is None else zeros[..., None]
            numbers = encode(parts / scales[..., None], self.layout.form, own)
            back = decode(numbers, self.layout.form, own, self.dtype)
            loss = ((back * scales[..., None] - parts).square_() * weights).sum(-1)
            better = loss < best
            best = torch.where(better, loss, best)
            chosen = _Range(
                torch.where(better, low, chosen.low), torch.where(better, high, chosen.high)
            )
        return chosen

    def _at(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Scales as numbers, zero points, and scales as stored, for ranges of groups."""
        form = self.layout.form
        if not self.layout.zeros:
            scales, stored = self._stored(high)
            return scales, None, stored
        scales, stored = self._stored((high - low) / (2**form.bits - 1))
        lowest = float(form.least) if form.bits == 8 else 0.0
        zeros = (lowest - low / scales).round()
        return scales, zeros.clamp(lowest, lowest + 2**form.bits - 1), stored

    def _stored(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Rounded up to what can be stored, so that nothing is clipped; one for empty groups."""
        dtype, form, kind = scales.dtype, self.layout.form, self.layout.scales
        scales = torch.where(scales != 0, scales, torch.ones_like(scales))
        if form.scales == "e8m0":
            stored = (scales.log2().ceil() + 127).clamp(0, 254).to(torch.uint8)
        elif form.scales == "e4m3":
            assert self.total is not None
            wanted = (scales / self.total.to(dtype)).clamp(max=448.0)
            # 2^-9 is the least that is not zero; the step of what is larger is 2^-3 of it.
            up = (wanted * (1 + 2.0**-4)).clamp(2.0**-9, 448.0).to(torch.float32)
            stored = up.to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            finfo = torch.finfo(kind)
            up = scales.abs()
            if kind != dtype:
                # To the next number that there is, unless it is one already.
                near = up.to(kind).to(dtype)
                up = torch.where(near < up, near * (1 + 0.75 * finfo.eps), near)
            stored = up.clamp(finfo.tiny, finfo.max).copysign(scales).to(kind)
        return decode_scales(stored, form, self.total, dtype), stored


class _Range(NamedTuple):
    """What the numbers of groups are to cover, (rows, groups) each.

    With zero points the lowest and the highest value; without, ``high`` is the step itself, whose
    sign says which side has one number more, and ``low`` is nothing.
    """

    low: Tensor
    high: Tensor


def _choices(parts: Tensor, form: Format, *, symmetric: bool) -> list[_Range]:
    """Ranges that leave every value within half a step.

    A symmetric format of b bits has one number more below zero than above. Where the largest
    magnitude of a group is let fall on that side, by the sign of the scale, and half a step beyond
    the last number is used as well, -2^(b-1) - 1/2 to 2^(b-1) - 1/2 are covered instead of
    -2^(b-1) + 1 to 2^(b-1) - 1. That is the smaller step; the plain one represents the largest
    magnitude itself, as values that were rounded before need it.
    """
    low, high = parts.amin(-1), parts.amax(-1)
    if not symmetric:
        return [_Range(low.clamp(max=0), high.clamp(min=0))]
    most = torch.maximum(-low, high)
    plain = _Range(most, most / form.most)
    if not form.integer:
        return [plain]
    if form.bits == 8:
        # The one number more is not worth a sign: 127 and a half cover both sides.
        return [plain, _Range(most, most / (form.most + 0.5))]
    other = torch.minimum(-low, high).clamp(min=0)
    step = torch.maximum(most / (0.5 - form.least), other / (form.most + 0.5))
    return [plain, _Range(most, torch.where(high > -low, -step, step))]


def grouped(matrix: Tensor, group: int) -> Tensor:
    """(rows, groups, columns of a group); the last is filled up with zeros."""
    if group == 0:
        return matrix[:, None]
    missing = -matrix.shape[1] % group
    parts: Tensor = F.pad(matrix, (0, missing)).unflatten(1, (-1, group))
    return parts


def blank(weight: Tensor, format: str, *, group: int, symmetric: bool) -> Quantised:
    """The stored form of a matrix of this shape and type, with nothing but zeros in it."""
    one = quantised(torch.zeros_like(weight[:1]), format, group=group, symmetric=symmetric)

    def repeated(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.expand(len(weight), -1).contiguous()

    values, scales = repeated(one.values), repeated(one.scales)
    assert values is not None
    assert scales is not None
    return replace(one, values=values, scales=scales, zeros=repeated(one.zeros))


def stacked(parts: list[Quantised]) -> Quantised:
    """Several matrices of one form below each other."""
    first = parts[0]

    def part_of(name: str) -> Tensor | None:
        found = [getattr(part, name) for part in parts]
        return None if found[0] is None else torch.cat(found)

    values, scales = part_of("values"), part_of("scales")
    assert values is not None
    assert scales is not None
    return replace(first, values=values, scales=scales, zeros=part_of("zeros"))
