"""Stored layers as tensors of a ``compressed-tensors`` file, and back.

What the format is was read in the reference library (``compressed_tensors`` 0.20, its
``compressors``), whose own functions the tests hold these to: ``pack-quantized`` puts numbers of
b bits one behind the other into 32-bit words, the first in the lowest bits, with ``2^(b-1)``
added; zero points likewise along the rows. ``nvfp4-pack-quantized`` divides scales by the scale of
all, where ``nvfp4`` here multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.backends.checkpoints.stored import Stored
from torchlathe.ir import ArtifactError, UnsupportedError
from torchlathe.kernels.dequantize.formats import Format, format_of, pack, unpack

__all__ = ["SUFFIXES", "Numbers", "from_file", "numbers_of", "to_file"]

# What a quantised layer may have in a file besides its bias.
SUFFIXES = (
    "weight",
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
)

_AT_ONCE = 1 << 24  # numbers that are unpacked at once


@dataclass(frozen=True)
class Numbers:
    """What a file says of the numbers of a layer.

    Attributes:
        layout: Name of the format of the file.
        bits: Of a number.
        integer: Whether numbers are evenly spaced.
        symmetric: Whether there are no zero points.
        strategy: What shares a scale: ``channel``, ``group``, ``tensor``, ``tensor_group`` or
            ``block``.
        group: Columns that share one, 0 for all.
        block: Rows and columns of a block.
        activations: Number format of the inputs, or None.
    """

    layout: str
    bits: int
    integer: bool
    symmetric: bool
    strategy: str
    group: int
    block: tuple[int, int] | None = None
    activations: str | None = None


def numbers_of(stored: Stored, where: str) -> Numbers:
    """How the format calls what a layer is stored as.

    Raises:
        UnsupportedError: It has no name for it.
    """
    form = stored.form
    group = form.block or stored.group
    if group and stored.columns % group:
        raise UnsupportedError(
            f"the format has whole groups only, and {stored.columns} columns are no multiple of "
            f"{group}",
            where=where,
            hint="give quantize a group that divides the columns, or group=0",
        )
    if stored.activations not in (None, "int8" if form.integer else "fp8"):
        raise UnsupportedError(
            f"{stored.format} weights with {stored.activations} inputs have no name in the format",
            where=where,
        )
    strategy = "group" if group else "channel"
    if form.scales == "e4m3":
        layout, strategy = "nvfp4-pack-quantized", "tensor_group"
    elif form.scales == "e8m0":
        layout = "mxfp4-pack-quantized"
    elif not form.integer:
        layout = "float-quantized" if stored.activations else "naive-quantized"
    else:
        layout = "int-quantized" if stored.activations else "pack-quantized"
    if stored.activations and form.bits == 4 and not form.integer:
        raise UnsupportedError(f"{stored.format} goes with inputs as they are", where=where)
    symmetric = stored.zeros is None
    return Numbers(layout, form.bits, form.integer, symmetric, strategy, group,
                   activations=stored.activations)  # fmt: skip


def to_file(stored: Stored, numbers: Numbers) -> dict[str, Tensor]:
    """The tensors of a layer in a file, by the last part of their names.

    Scales have at least the precision of the floating weights, which the reference multiplies in.
    """
    form = stored.form
    if form.scales == "float":
        wide = torch.promote_types(stored.scales.dtype, stored.dtype)
        found = {"weight_scale": stored.scales.to(wide)}
    elif form.scales == "e8m0":
        found = {"weight_scale": stored.scales}
    else:
        assert stored.total is not None
        found = {
            "weight_scale": stored.scales.view(torch.float8_e4m3fn),
            "weight_global_scale": stored.total.to(torch.float32).reciprocal().reshape(1),
        }
    if not form.integer:
        packed = form.each > 1
        own = stored.values if packed else stored.values.view(torch.float8_e4m3fn)
        return {"weight_packed" if packed else "weight": own, **found}
    if numbers.layout == "pack-quantized":
        found["weight_packed"] = _words(_offset(stored.values, form), form)
        found["weight_shape"] = torch.tensor([stored.rows, stored.columns])
    else:
        codes = unpack(stored.values, form, stored.columns)
        found["weight"] = codes if form.bits == 8 else _signed(codes, form.bits)
    if stored.zeros is not None:
        zeros = stored.zeros if form.bits == 8 else _signed(stored.zeros, form.bits)
        if numbers.layout == "pack-quantized":
            zeros = _packed(zeros.t(), form).t().contiguous()
        found["weight_zero_point"] = zeros
    return found


def from_file(
    tensors: Mapping[str, Tensor], numbers: Numbers, dtype: torch.dtype, where: str
) -> Stored:
    """The inverse of `to_file`; also of what other programs wrote.

    Numbers of 3 to 7 bits take the place of the next format that has them: the scales stay.

    Raises:
        ArtifactError: A tensor is missing, or of another shape than the others say.
    """
    if not numbers.integer:
        return _floats(tensors, numbers, dtype, where)
    form = format_of("int2" if numbers.bits <= 2 else "int4" if numbers.bits <= 4 else "int8")
    zeros: Tensor | None = None
    scales = _need(tensors, "weight_scale", where)
    if numbers.layout == "pack-quantized":
        words = _need(tensors, "weight_packed", where)
        rows, columns = (int(n) for n in _need(tensors, "weight_shape", where).tolist())
        codes = _unpacked(words, numbers.bits, columns, where)
        if not numbers.symmetric:
            zeros = _unpacked(_need(tensors, "weight_zero_point", where).t(), numbers.bits, rows,
                              where).t()  # fmt: skip
    else:
        codes = _need(tensors, "weight", where)
        rows, columns = codes.shape
        zeros = None if numbers.symmetric else _need(tensors, "weight_zero_point", where)
    if codes.shape != (rows, columns) or codes.dtype != torch.int8:
        shape = f"{codes.dtype} {tuple(codes.shape)}"
        raise ArtifactError(f"the numbers are {shape}, not int8 ({rows}, {columns})", where=where)
    scales = _scales(scales, numbers, rows, columns, where)
    if zeros is not None:
        zeros = _codes(zeros.expand(rows, -1).expand_as(scales), form).contiguous()
    values = pack(_codes(codes, form), form)
    group = numbers.group if scales.shape[1] > 1 else 0
    return Stored(values, scales, zeros, None, columns, group, form.name, dtype,
                  numbers.activations)  # fmt: skip


def _floats(
    tensors: Mapping[str, Tensor], numbers: Numbers, dtype: torch.dtype, where: str
) -> Stored:
    scales = _need(tensors, "weight_scale", where)
    if numbers.bits == 8:
        values = _need(tensors, "weight", where)
        if values.dtype != torch.float8_e4m3fn:
            raise ArtifactError(f"the numbers are {values.dtype}, not float8_e4m3fn", where=where)
        rows, columns = values.shape
        scales = _scales(scales, numbers, rows, columns, where)
        group = (numbers.group or (numbers.block or (0, 0))[1]) if scales.shape[1] > 1 else 0
        return Stored(values.view(torch.uint8), scales, None, None, columns, group, "fp8", dtype,
                      numbers.activations)  # fmt: skip
    values = _need(tensors, "weight_packed", where)
    columns = 2 * values.shape[1]
    form = format_of("nvfp4" if numbers.group == 16 else "mxfp4")
    total = None
    if form.name == "nvfp4":
        total = _need(tensors, "weight_global_scale", where).to(torch.float32).reciprocal()
        total = total.reshape(())
    if scales.shape != (values.shape[0], columns // numbers.group):
        raise ArtifactError(f"{values.shape[0]} rows of {columns} columns have scales "
                            f"{tuple(scales.shape)}", where=where)  # fmt: skip
    group = numbers.group if scales.shape[1] > 1 else 0
    return Stored(values, scales.view(torch.uint8), None, total, columns, group, form.name, dtype,
                  numbers.activations)  # fmt: skip


def _scales(scales: Tensor, numbers: Numbers, rows: int, columns: int, where: str) -> Tensor:
    """Scales as (rows, groups): fp32 for rows, and as short as they are exact for groups."""
    found = scales
    if numbers.strategy == "tensor":
        found = scales.reshape(1, 1).expand(rows, 1)
    elif numbers.strategy == "block":
        assert numbers.block is not None
        found = scales.repeat_interleave(numbers.block[0], 0)[:rows]
    groups = found.shape[1] if found.dim() == 2 else -1
    width = numbers.group or (numbers.block or (0, columns))[1]
    if found.shape != (rows, max(1, -(-columns // width))) or not found.is_floating_point():
        raise ArtifactError(
            f"{rows} rows of {columns} columns have scales {scales.dtype} {tuple(scales.shape)}",
            where=where,
        )
    if groups > 1:
        short = found.to(torch.bfloat16)
        exact = bool((short.to(found.dtype) == found).all())
        return (short if exact else found.to(torch.float32)).contiguous()
    return found.to(torch.float32).contiguous()


def _need(tensors: Mapping[str, Tensor], name: str, where: str) -> Tensor:
    if name not in tensors:
        raise ArtifactError(
            f"the file has no {where}.{name}",
            where=where,
            hint="its quantization_config says that the layer is quantised",
        )
    return tensors[name]


# -- bits ------------------------------------------------------------------------------------


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Codes from 0 as numbers around 0, int8."""
    return (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


def _codes(numbers: Tensor, form: Format) -> Tensor:
    """Numbers around 0, int8, as the codes that a format stores."""
    if form.bits == 8:
        return numbers
    return (numbers.to(torch.int16) - form.least).to(torch.uint8)


def _offset(values: Tensor, form: Format) -> Tensor:
    """Stored numbers as bits that count from 0."""
    return values if form.bits < 8 else (values.to(torch.int16) + 128).to(torch.uint8)


def _packed(numbers: Tensor, form: Format) -> Tensor:
    """Numbers around 0, int8 (n, m), as words (n, m / numbers in a word)."""
    codes = (numbers.to(torch.int16) + (1 << (form.bits - 1))).to(torch.uint8)
    return _words(pack(codes, form), form)


def _words(stored: Tensor, form: Format) -> Tensor:
    """Bytes as 32-bit words, the first byte lowest; what fills up the last word is zero."""
    missing = -stored.shape[1] % 4
    filled: Any = F.pad(stored, (0, missing)) if missing else stored.contiguous()
    return _word_view(filled)


def _word_view(filled: Tensor) -> Tensor:
    parts = filled.unflatten(1, (-1, 4)).to(torch.int64)
    places = torch.arange(0, 32, 8, device=filled.device)
    words = (parts << places).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _unpacked(words: Tensor, bits: int, count: int, where: str) -> Tensor:
    """Numbers around 0, int8 (n, count), of words (n, m); numbers may go across words."""
    if words.dtype != torch.int32 or words.dim() != 2 or words.shape[1] != -(-count * bits // 32):
        raise ArtifactError(
            f"{count} numbers of {bits} bits in words {words.dtype} {tuple(words.shape)}",
            where=where,
        )
    # Some rows at a time: each number is 64 bits on its way.
    parts = words.split(max(1, _AT_ONCE // max(1, count)))
    return torch.cat([_numbers(part, bits, count) for part in parts])


def _numbers(words: Tensor, bits: int, count: int) -> Tensor:
    starts = torch.arange(count, device=words.device) * bits
    wide = F.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    place = starts // 32
    both = wide[:, place] | (wide[:, place + 1] << 32)
    return _signed((both >> (starts % 32)) & ((1 << bits) - 1), bits)
