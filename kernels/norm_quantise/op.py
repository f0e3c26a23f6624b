"""``torchlathe::norm_quantise`` and ``add_norm_quantise``: a norm that quantises token by token.

Source: RMSNorm (arXiv 1910.07467), LayerNorm (arXiv 1607.06450); quantising in the same pass over
memory is usual. The kernel is own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchlathe.ir.errors import OptionError
from torchlathe.kernels.registering import register

__all__ = [
    "MOST_COLUMNS",
    "add_norm_quantise",
    "launch",
    "norm_quantise",
    "quantise_rows",
    "reference",
]

# A row lies in the registers of one block: more columns spill.
MOST_COLUMNS = 32768

_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_LEAST = 2.0**-100  # keeps a row of zeros from dividing by zero


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    mean: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The meaning of the op: everything in fp32, or in float64 for float64 inputs.

    Args:
        x: (..., width).
        weight: (width,).
        bias: (width,).
        eps: What is added to the mean square.
        mean: Whether to subtract the mean, as LayerNorm does; without it this is RMSNorm.
        dtype: int8 or float8_e4m3fn.

    Returns:
        Numbers (..., width) and scales (...,) whose product is the norm's result.
    """
    largest = _largest(dtype)
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if mean:
        x = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    x = x * weight.to(x.dtype)
    if bias is not None:
        x = x * inverse + bias.to(x.dtype)
        inverse = torch.ones_like(inverse)
    most = x.abs().amax(-1, keepdim=True).clamp_min(_LEAST)
    numbers = x * (largest / most)
    if dtype == torch.int8:
        numbers = numbers.round()
    scales = most * inverse / largest
    return numbers.clamp(-largest, largest).to(dtype), scales.squeeze(-1).to(torch.float32)


@register("norm_quantise")
def norm_quantise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    mean: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """RMSNorm, or LayerNorm with ``mean``, quantised: numbers and one scale for each token."""
    if x.device.type == "cpu":
        return reference(x, weight, bias, eps, mean=mean, dtype=dtype)
    numbers, scales, _ = launch(
        x, None, weight, bias, eps, mean=mean, dtype=dtype, wrap=torch.library.wrap_triton
    )
    return numbers, scales


@register("add_norm_quantise")
def add_norm_quantise(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    mean: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same of ``x + residual``, and that sum."""
    if x.device.type == "cpu":
        summed = (x.to(torch.float32) + residual.to(torch.float32)).to(x.dtype)
        return (*reference(summed, weight, bias, eps, mean=mean, dtype=dtype), summed)
    return launch(
        x, residual, weight, bias, eps, mean=mean, dtype=dtype, wrap=torch.library.wrap_triton
    )


def quantise_rows(
    x: Tensor, dtype: torch.dtype, wrap: Callable[[Any], Any] = torch.library.wrap_triton
) -> tuple[Tensor, Tensor]:
    """Numbers and scales of rows as they are, by the same kernel: see `launch`."""
    numbers, scales, _ = launch(x, None, None, None, 0.0, mean=False, dtype=dtype, wrap=wrap)
    return numbers, scales


def launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    mean: bool,
    dtype: torch.dtype,
    each: int | None = None,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the kernel.

    Args:
        x: (..., width).
        residual: (..., width), added first.
        weight: (width,); None to quantise rows as they are.
        bias: (width,).
        eps: What is added to the mean square.
        mean: Whether to subtract the mean.
        dtype: int8 or float8_e4m3fn.
        each: Rows of a program; by default more of them the more rows there are.
        wrap: What makes a kernel traceable.

    Returns:
        Numbers, scales, and the sum with the residual (``x`` itself without one).
    """
    from torchlathe.kernels.norm_quantise.triton import norm_quantise as kernel

    _largest(dtype)
    width = x.shape[-1]
    rows = x.numel() // width
    x = x.contiguous()
    numbers = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    summed = x if residual is None else torch.empty_like(x)
    # Several rows share the loads of the weights, once there are enough to fill the device.
    each = each or (4 if rows >= 4096 else 1)
    block = 1 << max(width - 1, 1).bit_length()
    wrap(kernel)[(-(-rows // each),)](
        x,
        x if residual is None else residual.contiguous(),
        x if weight is None else weight,
        x if bias is None else bias,
        numbers,
        scales,
        summed,
        rows,
        width,
        eps,
        BLOCK=block,
        EACH=each,
        WHOLE=block == width,
        NORM=weight is not None,
        MEAN=mean,
        HAS_RESIDUAL=residual is not None,
        HAS_BIAS=bias is not None,
        INTEGER=dtype == torch.int8,
        num_warps=min(16, max(1, block // 1024)),
        num_stages=1,
    )
    return numbers, scales, summed


def _largest(dtype: torch.dtype) -> float:
    if dtype not in _LARGEST:
        kind = str(dtype).removeprefix("torch.")
        raise OptionError(f"cannot quantise to {kind}", hint="known are int8 and float8_e4m3fn")
    return _LARGEST[dtype]
