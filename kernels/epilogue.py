"""What follows a product: bias, activation, residual."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.ir.errors import OptionError

__all__ = [
    "ACTIVATIONS",
    "EIGHT",
    "GATED",
    "activation_code",
    "finished",
    "interleave",
    "rows_for",
]

# In the order of the kernels' codes.
ACTIVATIONS = ("none", "relu", "silu", "gelu", "gelu_tanh")
# Activations of a gate, by the activation that they are of: ``activation(gate) * gated``.
GATED = {"bilinear": "none", "reglu": "relu", "swiglu": "silu", "geglu": "gelu"}
GATED |= {"geglu_tanh": "gelu_tanh"}
# Rows of a gate and of what it gates lie in turns of so many: one thread of the tensor cores holds
# sums of rows eight apart.
EIGHT = 8

_GATED_CODE = 16


def activation_code(activation: str) -> int:
    """The kernels' number of an activation; gated ones begin at 16.

    Raises:
        OptionError: There is no such activation.
    """
    if activation in GATED:
        return _GATED_CODE + ACTIVATIONS.index(GATED[activation])
    if activation not in ACTIVATIONS:
        raise OptionError(
            f"no activation {activation!r}", hint=f"known are {', '.join((*ACTIVATIONS, *GATED))}"
        )
    return ACTIVATIONS.index(activation)


def rows_for(out_features: int, activation: str) -> int:
    """Rows of the weights, without padding, whose product gives so many features."""
    return 2 * EIGHT * -(-out_features // EIGHT) if activation in GATED else out_features


def interleave(gate: Tensor, gated: Tensor, axis: int = 0) -> Tensor:
    """Put the rows of a gate and of what it gates in turns of eight, as gated activations want it.

    Both are padded to whole eights with zeros. Weights, scales (on their last axis), zero points
    and biases go through this before they are packed.

    Args:
        gate: What the activation is of, with the features on ``axis``.
        gated: What it is multiplied by, of the same shape.
        axis: Axis of the features.

    Returns:
        The tensors as one, with ``rows_for(features, "swiglu")`` features.

    Raises:
        OptionError: The shapes differ.
    """
    if gate.shape != gated.shape:
        raise OptionError(
            f"a gate of shape {tuple(gate.shape)} cannot gate {tuple(gated.shape)}",
            hint="both are (features, inputs), of the same type",
        )
    turns = []
    for tensor in (gate, gated):
        moved = tensor.movedim(axis, -1)
        moved = F.pad(moved, (0, -moved.shape[-1] % EIGHT))
        turns.append(moved.unflatten(-1, (-1, EIGHT)))
    return torch.stack(turns, -2).flatten(-3).movedim(-1, axis).contiguous()


def finished(
    product: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    out_features: int | None = None,
) -> Tensor:
    """``activation(product + bias) + residual`` in the type of the product.

    Args:
        product: (..., rows), where `rows_for` says how many.
        bias: (rows,).
        residual: (..., out).
        activation: One of `ACTIVATIONS` or `GATED`.
        out_features: Features of the result; needed where a gate's are no whole eights.
    """
    code = activation_code(activation)
    if bias is not None:
        product = product + bias.to(product.dtype)
    if code >= _GATED_CODE:
        gate, gated = product.unflatten(-1, (-1, 2, EIGHT)).unbind(-2)
        product = (_activated(gate, code - _GATED_CODE) * gated).flatten(-2)[..., :out_features]
    else:
        product = _activated(product, code)
    if residual is not None:
        product = product + residual.to(product.dtype)
    return product


def _activated(value: Tensor, code: int) -> Tensor:
    if code == 1:
        return F.relu(value)
    if code == 2:
        return F.silu(value)
    if code in {3, 4}:
        return F.gelu(value, approximate="tanh" if code == 4 else "none")
    return value
