"""W8A16 by torch's own CPU kernel, which takes int8 weights as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlathe.ir.errors import OptionError
from torchlathe.kernels.epilogue import finished
from torchlathe.kernels.registering import register

__all__ = ["supports", "w8a16_cpu_linear"]

_STEP = 16  # columns: torch's kernel reads past the end of others, and crashes or is wrong


def supports(columns: int) -> str | None:
    """Why torch's kernel cannot take a layer, or None."""
    if columns % _STEP:
        return f"{columns} columns: torch's kernel takes multiples of {_STEP}"
    return None


@register("w8a16_cpu_linear")
def w8a16_cpu_linear(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str = "none",
) -> Tensor:
    """``activation(x @ (values * scales).T + bias) + residual``.

    Shapes: x (..., in), bf16 for speed; values (out, in) int8; scales (out,) as x; bias (out,);
    residual and the result (..., out).

    Raises:
        OptionError: Torch's kernel cannot take the layer.
    """
    if reason := supports(values.shape[1]):
        raise OptionError(f"no product on a CPU: {reason}", hint="use w8a16_linear")
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    product: Tensor = torch.ops.aten._weight_int8pack_mm(rows, values, scales)
    product = product.view(*x.shape[:-1], values.shape[0])
    return finished(product, bias, residual, activation).to(x.dtype)
