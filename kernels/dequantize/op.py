"""Ops that give stored numbers their meaning: ``dequantize``, and rounding token by token.

A quantised weight stays in a graph as its stored numbers and this op before the layer that reads
it; the layer itself is the ordinary one. So analyses and passes see the graph that they know, and
every backend runs it; kernels that multiply the stored numbers take the place of both later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.ir.errors import OptionError
from torchlathe.kernels.dequantize.formats import (
    Format,
    decode,
    decode_scales,
    encode,
    format_of,
    unpack,
)
from torchlathe.kernels.norm_quantise.op import MOST_COLUMNS, quantise_rows
from torchlathe.kernels.registering import register

__all__ = [
    "dequantize",
    "meaning",
    "quantize_dequantize_tokens",
    "quantize_tokens",
    "rounded_tokens",
]

_LEAST = 2.0**-100  # keeps a token of zeros from dividing by zero


def meaning(
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    total: Tensor | None,
    columns: int,
    group: int,
    form: Format,
    dtype: torch.dtype,
) -> Tensor:
    """The tensor that stored numbers stand for; the arguments are those of `dequantize`."""
    # Products of a number and a scale are rounded once, to the type that is asked for.
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    lead = scales.dim() - 1
    real = decode_scales(scales, form, total, wide)
    if scales.shape[-1] == 1:
        ones = [1] * (values.dim() - lead - 1)
        numbers = unpack(values, form, columns)
        own = None if zeros is None else zeros.reshape(*zeros.shape, *ones)
        return (decode(numbers, form, own, wide) * real.reshape(*real.shape, *ones)).to(dtype)
    shape = values.shape
    codes = unpack(values.flatten(lead), form, columns)
    width = codes.shape[-1]
    if missing := -width % group:
        codes = F.pad(codes.view(torch.uint8), (0, missing)).view(codes.dtype)
    parts = codes.unflatten(-1, (-1, group))
    numbers = decode(parts, form, None if zeros is None else zeros[..., None], wide)
    result = (numbers * real[..., None]).flatten(-2).to(dtype)
    result = result[..., :width].contiguous() if missing else result
    return result.reshape(shape) if form.each == 1 else result


@register("dequantize")
def dequantize(
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    total: Tensor | None,
    columns: int,
    group: int,
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    """``(number - zero) * scale``, group by group.

    Args:
        values: (*lead, *rest) as stored: int8, or bits in uint8, packed along the last axis.
        scales: (*lead, groups): floating, or the bits of the format's own scales.
        zeros: (*lead, groups) zero points in codes; None where the format is symmetric.
        total: One more scale for all, shape (), of ``nvfp4``.
        columns: Numbers in a row, where they are packed; what fills the last byte is left out.
        group: Numbers of a row that share a scale; 0 for a whole row.
        format: One of `torchlathe.kernels.dequantize.formats.FORMATS`.
        dtype: Of the result.

    Returns:
        (*lead, *rest), or (*lead, columns) where numbers are packed.

    Raises:
        OptionError: There is no such format.
    """
    return meaning(values, scales, zeros, total, columns, group, format_of(format), dtype)


def _setup_dequantize(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, scales, zeros, total, columns, group, name, dtype = inputs
    ctx.save_for_backward(values, scales, zeros, total)
    ctx.rest = (columns, group, name, dtype)


def _backward_dequantize(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, scales, zeros, total = ctx.saved_tensors
    columns, group, name, _ = ctx.rest
    form = format_of(name)
    found = None
    if ctx.needs_input_grad[1] and form.scales == "float":
        ones = torch.ones_like(scales)
        numbers = meaning(values, ones, zeros, total, columns, group, form, grad.dtype)
        lead = scales.dim() - 1
        product = (grad * numbers).flatten(lead)
        if scales.shape[-1] > 1:
            product = F.pad(product, (0, -product.shape[-1] % group))
        found = product.unflatten(-1, (scales.shape[-1], -1)).sum(-1).to(scales.dtype)
    return (None, found, None, None, None, None, None, None)


def _fake_dequantize(
    values: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    total: Tensor | None,
    columns: int,
    group: int,
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    if format_of(format).each > 1:
        return values.new_empty((*values.shape[: scales.dim() - 1], columns), dtype=dtype)
    whole = scales.shape[-1] == 1  # a product, which has the strides of the numbers
    return (
        torch.empty_like(values, dtype=dtype)
        if whole
        else values.new_empty(values.shape, dtype=dtype)
    )


_trained: Any = dequantize
# Not the body on fakes, which takes some ten times as long, for each weight and each pass.
_trained.register_fake(_fake_dequantize)
_trained.register_autograd(_backward_dequantize, setup_context=_setup_dequantize)


def rounded_tokens(x: Tensor, axes: Sequence[int], form: Format) -> tuple[Tensor, Tensor]:
    """Activations in units of a scale for each token, as numbers of the format, and the scales.

    At least fp32: scales that are rounded to 16 bits would clip.

    Returns:
        Numbers as ``x`` in a wide floating type, and scales with the axes kept.
    """
    wide = x if x.dtype == torch.float64 else x.to(torch.float32)
    scales = wide.abs().amax(list(axes), keepdim=True).clamp_min(_LEAST) / form.most
    # The largest is the format's largest but for rounding, so that nothing needs to be clamped.
    numbers = wide * scales.reciprocal()
    if form.integer:
        return numbers.round(), scales  # not in place: exporters take it into graphs
    return decode(encode(numbers, form), form, None, numbers.dtype), scales


@register("quantize_dequantize_tokens")
def quantize_dequantize_tokens(x: Tensor, axes: Sequence[int], format: str) -> Tensor:
    """What is left of activations that are rounded to 8 bits, each token with a scale of its own.

    Args:
        x: Any shape, floating.
        axes: The axes that share a scale; all others tell tokens apart.
        format: ``int8`` or ``fp8``.

    Returns:
        As ``x``.

    Raises:
        OptionError: There is no such format.
    """
    form = format_of(format)
    numbers, scales = rounded_tokens(x, axes, form)
    return (numbers * scales).to(x.dtype)


def _setup_tokens(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pass


def _backward_tokens(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    # Straight through: rounding has no useful derivative, and nothing is clipped.
    return grad, None, None


_straight: Any = quantize_dequantize_tokens
_straight.register_autograd(_backward_tokens, setup_context=_setup_tokens)


@register("quantize_tokens")
def quantize_tokens(x: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Activations (..., in) as numbers, for kernels that multiply these, and a scale a token.

    Args:
        x: (..., in), floating.
        format: ``int8`` or ``fp8``.

    Returns:
        Numbers (..., in), int8 or float8_e4m3fn, and scales (...,), fp32.

    Raises:
        OptionError: There is no such format, or it is not one of 8 bits.
    """
    form = format_of(format)
    if form.bits != 8:
        raise OptionError(f"activations have 8 bits, {format} has {form.bits}")
    kind = torch.int8 if form.integer else torch.float8_e4m3fn
    if x.device.type != "cpu" and x.shape[-1] <= MOST_COLUMNS:
        return quantise_rows(x, kind)
    numbers, scales = rounded_tokens(x, (-1,), form)
    return numbers.to(kind), scales.squeeze(-1).to(torch.float32)
