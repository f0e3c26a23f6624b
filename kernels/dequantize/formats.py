"""Number formats of quantised tensors: which values there are, and how they are stored.

Codes are stored as they are on disk and in memory: int8 as int8, all else as the bits in uint8, so
that no conversion of a model's floating type touches them. Formats of fewer than 8 bits are packed
along the last axis, the first column in the lowest bits. Source of the 4-bit floats: OCP
Microscaling Formats (MX) 1.0, section 5; NVFP4 as in the CUDA documentation: blocks of 16 with an
e4m3 scale, and one fp32 scale for the tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.ir.errors import OptionError

__all__ = ["FORMATS", "Format", "decode", "decode_scales", "encode", "format_of", "pack", "unpack"]

ScaleKind = Literal["float", "e8m0", "e4m3"]


@dataclass(frozen=True)
class Format:
    """One number format.

    Attributes:
        name: As ops and options call it.
        bits: Of one number.
        most: The largest magnitude of both signs, in units of the scale.
        integer: Whether the values are evenly spaced, and may have a zero point.
        scales: How scales are stored.
        block: Columns that share a scale, where the format fixes it.
    """

    name: str
    bits: int
    most: float
    integer: bool = True
    scales: ScaleKind = "float"
    block: int | None = None

    @property
    def least(self) -> int:
        """Of integers, the lowest value."""
        return -(1 << (self.bits - 1))

    @property
    def each(self) -> int:
        """How many numbers a byte holds."""
        return 8 // self.bits

    @property
    def stored(self) -> torch.dtype:
        """Type that the numbers are stored in."""
        return torch.int8 if self.name == "int8" else torch.uint8


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        f.name: f
        for f in (
            Format("int8", 8, 127.0),
            Format("int4", 4, 7.0),
            Format("int2", 2, 1.0),
            Format("fp8", 8, 448.0, integer=False),
            Format("mxfp4", 4, 6.0, integer=False, scales="e8m0", block=32),
            Format("nvfp4", 4, 6.0, integer=False, scales="e4m3", block=16),
        )
    }
)

# Halfway between neighbours of 0, 0.5, 1, 1.5, 2, 3, 4, 6; a tie goes to the even code.
_E2M1_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def format_of(name: str) -> Format:
    """The format of this name.

    Raises:
        OptionError: There is none.
    """
    if name not in FORMATS:
        raise OptionError(f"no format {name!r}", hint=f"known are {', '.join(FORMATS)}")
    return FORMATS[name]


def encode(x: Tensor, form: Format, zeros: Tensor | None = None) -> Tensor:
    """Nearest numbers of the format, in units of the scale.

    Args:
        x: Values over their scales, any floating type.
        form: The format.
        zeros: Zero points, in codes, that broadcast; only for integers.

    Returns:
        Codes, one for each element: int8 for ``int8``, else uint8 from 0.
    """
    if form.integer:
        if form.bits == 8:  # the codes are signed
            shifted = x.round() if zeros is None else x.round() + zeros.to(x.dtype)
            return shifted.clamp(-128, 127).to(torch.int8)
        centre = -form.least if zeros is None else zeros.to(x.dtype)
        return (x.round() + centre).clamp(0, 2**form.bits - 1).to(torch.uint8)
    if form.bits == 8:
        bounded = x.clamp(-form.most, form.most).to(torch.float32)
        return bounded.to(torch.float8_e4m3fn).view(torch.uint8)
    magnitude = x.abs().clamp(max=form.most).contiguous()
    middles = torch.tensor(_E2M1_MIDDLES, dtype=x.dtype, device=x.device)
    upper = torch.bucketize(magnitude, middles, right=True)
    lower = torch.bucketize(magnitude, middles)
    code = torch.where(lower % 2 == 0, lower, upper)
    return (code + 8 * ((x < 0) & (code > 0))).to(torch.uint8)


def decode(codes: Tensor, form: Format, zeros: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The numbers of codes, in units of the scale; the inverse of `encode`."""
    if form.integer:
        if form.bits == 8:
            return codes.to(dtype) if zeros is None else codes.to(dtype) - zeros.to(dtype)
        centre = -form.least if zeros is None else zeros.to(dtype)
        return codes.to(dtype) - centre
    if form.bits == 8:
        return codes.view(torch.float8_e4m3fn).to(dtype)
    number = (codes & 7).to(dtype)
    # 0 0.5 1 1.5, then 2 3, then 4 6: arithmetic, since a table would be a tensor of its own.
    high = torch.where(number < 6, number - 2, 2 * number - 8)
    number = torch.where(number < 4, 0.5 * number, high)
    return torch.where(codes >= 8, -number, number)


def decode_scales(scales: Tensor, form: Format, total: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Scales as numbers, from what is stored."""
    if form.scales == "e8m0":
        return torch.exp2(scales.to(dtype) - 127)
    if form.scales == "e4m3":
        real = scales.view(torch.float8_e4m3fn).to(dtype)
        return real if total is None else real * total.to(dtype)
    return scales.to(dtype)


def pack(codes: Tensor, form: Format) -> Tensor:
    """Codes, one a number, as they are stored: several to a byte along the last axis.

    The last byte of a row is filled with zeros.
    """
    if form.each == 1:
        return codes.contiguous()
    missing = -codes.shape[-1] % form.each
    codes = F.pad(codes, (0, missing)) if missing else codes
    parts: Tensor = codes.unflatten(-1, (-1, form.each)).to(torch.int32)
    places = torch.arange(0, 8, form.bits, dtype=torch.int32, device=codes.device)
    return (parts << places).sum(-1).to(torch.uint8)


def unpack(values: Tensor, form: Format, columns: int) -> Tensor:
    """The inverse of `pack`: one code a number, of so many columns."""
    if form.each == 1:
        return values
    places = torch.arange(0, 8, form.bits, dtype=torch.uint8, device=values.device)
    codes: Tensor = (values[..., None] >> places) & (2**form.bits - 1)
    return codes.flatten(-2)[..., :columns]
