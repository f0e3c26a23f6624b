"""What follows a product: bias, activation, residual; and adding up the parts of a split sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.ir.errors import OptionError

__all__ = ["ACTIVATIONS", "activation_code", "add_parts", "finished", "room_for"]

# In the order of the kernels' codes.
ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh")


def activation_code(activation: str) -> int:
    """The kernels' number of an activation.

    Raises:
        OptionError: There is no such activation.
    """
    if activation not in ACTIVATIONS:
        raise OptionError(
            f"no activation {activation!r}", hint=f"known are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS.index(activation)


def finished(
    product: Tensor, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """``activation(product + bias) + residual`` in the type of the product."""
    code = activation_code(activation)
    if bias is not None:
        product = product + bias.to(product.dtype)
    if code == 1:
        product = F.relu(product)
    elif code == 2:
        product = F.silu(product)
    elif code in {3, 4}:
        product = F.gelu(product, approximate="tanh" if code == 4 else "none")
    if residual is not None:
        product = product + residual.to(product.dtype)
    return product


def room_for(
    tokens: int, features: int, split: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The result, (tokens, features), and what the product writes: that, or (split, ...) fp32."""
    out = torch.empty((tokens, features), dtype=dtype, device=device)
    if split == 1:
        return out, out
    return out, torch.empty((split, tokens, features), dtype=torch.float32, device=device)


def add_parts(
    parts: Tensor,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    wrap: Callable[[Any], Any],
) -> None:
    """Add the parts of a split sum, (parts, tokens, out) fp32, and finish, into ``out``."""
    from torchlathe.kernels.blocks.triton import sum_parts

    count, tokens, features = parts.shape
    block = 512
    wrap(sum_parts)[(-(-features // block), tokens)](
        parts,
        out if bias is None else bias,
        out if residual is None else residual,
        out,
        tokens,
        features,
        PARTS=count,
        BLOCK=block,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation_code(activation),
        num_warps=4,
    )
