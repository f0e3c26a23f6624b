"""``torchlathe::semi_structured_linear``: two zeros in each four weights, where that is faster.

Triton has no sparse product, and on Hopper the library's gains a fifth of the time at best, for
many tokens: so the dense product runs unless a table, measured on the device, says otherwise.
Source: the products are cuSPARSELt's, as `torch.sparse` calls them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.ir.errors import OptionError
from torchlathe.kernels.epilogue import finished, rows_for
from torchlathe.kernels.packing import padded
from torchlathe.kernels.registering import register
from torchlathe.kernels.tuning.table import tile_for
from torchlathe.kernels.tuning.tiles import Problem, Tile

__all__ = [
    "SPARSE",
    "compress",
    "problem_of",
    "reference",
    "semi_structured_linear",
    "sparse_product",
]

# The entry of a table that says that the sparse product is faster; without one the dense one runs.
SPARSE = Tile(0, 0, 1, 0, 0)


def compress(weight: Tensor) -> Tensor | None:
    """What the sparse product takes, or None where there is no such product.

    Args:
        weight: (out, in) fp16 or bf16, with two zeros in each four weights of a row.

    Raises:
        OptionError: A weight has fewer zeros.
    """
    if weight.dim() != 2 or weight.shape[1] % 4:
        raise OptionError(
            f"a weight of shape {tuple(weight.shape)} has no fours",
            hint="weights are (out, in), inputs a multiple of four",
        )
    most = int(weight.unflatten(1, (-1, 4)).count_nonzero(2).max())
    if most > 2:
        raise OptionError(f"{most} of four weights are not zero", hint="two at most may be")
    if weight.device.type != "cuda" or not torch.backends.cusparselt.is_available():
        return None
    return torch._cslt_compress(weight)


def reference(
    x: Tensor,
    weight: Tensor,
    compressed: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """The meaning of the op: everything in fp32, or in float64 for float64 activations."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    product = F.linear(x.to(wide), weight[: rows_for(out_features, activation)].to(wide))
    return finished(product, bias, residual, activation, out_features).to(x.dtype)


@register("semi_structured_linear")
def semi_structured_linear(
    x: Tensor,
    weight: Tensor,
    compressed: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """``activation(x @ w.T + bias) + residual``, by the faster of two products.

    Shapes: x (..., in); weight (out, in), with its zeros; compressed as `compress` gives it; bias
    (out,); residual and the result (..., out).
    """
    flat = x.reshape(-1, x.shape[-1])
    sparse = compressed is not None and x.device.type != "cpu"
    if sparse and tile_for(problem_of(flat, weight), x.device) is not None:
        assert compressed is not None
        product = sparse_product(flat, compressed)
    else:
        product = F.linear(flat, weight)
    product = product.view(*x.shape[:-1], weight.shape[0])
    if bias is None and residual is None and activation == "none":
        return product
    product = product.to(torch.float32)
    return finished(product, bias, residual, activation, out_features).to(x.dtype)


def problem_of(x: Tensor, weight: Tensor) -> Problem:
    """What tables know the product of x, (tokens, in), as."""
    kind = str(x.dtype).removeprefix("torch.")
    return Problem("semi_structured", kind, x.shape[0], *weight.shape)


def sparse_product(x: Tensor, compressed: Tensor) -> Tensor:
    """The library's ``x @ w.T``, (tokens, out), for x (tokens, in)."""
    tokens = x.shape[0]
    # The library wants tokens in sixteens.
    wide = F.pad(x, (0, 0, 0, padded(tokens, 16) - tokens))
    product: Tensor = torch._cslt_sparse_mm(compressed, wide.t())
    return product.t()[:tokens].contiguous()
