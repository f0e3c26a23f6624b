"""``torchlathe::low_rank_linear``: ``x @ down.T @ up.T``, in two launches for few tokens.

Two products by the library take up to five launches for few tokens: each is split and added up,
and what follows is elementwise. Here the first leaves its parts as they are, and the second adds
them up as it reads them, and finishes. Source: own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.ir.errors import OptionError
from torchlathe.kernels.blocks.launching import on_rows
from torchlathe.kernels.epilogue import activation_code, finished, rows_for
from torchlathe.kernels.packing import ROWS, SPAN, padded, widened
from torchlathe.kernels.registering import differentiate, register
from torchlathe.kernels.tuning.table import processors_of
from torchlathe.kernels.tuning.tiles import Tile

__all__ = ["Factors", "default_tile", "launch", "low_rank_linear", "pack", "reference"]

_STEP = 64  # ranks of a block of the first product and of a step of the second
_MOST_TOKENS = 64
_MOST_RANK = 512  # above, products by the library cost more than launches


class Factors(NamedTuple):
    """Padded factors.

    Attributes:
        down: (rank, columns).
        up: (rows, rank).
    """

    down: Tensor
    up: Tensor


def pack(down: Tensor, up: Tensor) -> Factors:
    """Pad factors: the rank to 64, columns and rows to 128.

    Args:
        down: (rank, in).
        up: (out, rank).

    Raises:
        OptionError: The ranks differ.
    """
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
        raise OptionError(
            f"factors {tuple(down.shape)} and {tuple(up.shape)} have no product",
            hint="down is (rank, in) and up (out, rank)",
        )
    more = padded(down.shape[0], _STEP) - down.shape[0]
    return Factors(
        F.pad(down, (0, padded(down.shape[1], SPAN) - down.shape[1], 0, more)),
        F.pad(up, (0, more, 0, padded(up.shape[0], ROWS) - up.shape[0])),
    )


def reference(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """The meaning of the op: everything in fp32, or in float64 for float64 activations."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    narrow = F.linear(x.to(wide), down[:, : x.shape[-1]].to(wide))
    product = F.linear(narrow, up[: rows_for(out_features, activation)].to(wide))
    return finished(product, bias, residual, activation, out_features).to(x.dtype)


@register("low_rank_linear")
def low_rank_linear(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """``activation(x @ down.T @ up.T + bias) + residual`` for `Factors`.

    Shapes: x (..., in) in the type of the factors; bias (out,); residual and the result (..., out).
    """
    flat = x.reshape(-1, x.shape[-1])
    few = x.device.type != "cpu" and flat.shape[0] <= _MOST_TOKENS
    if not few or down.shape[0] > _MOST_RANK:
        narrow = F.linear(x, down[:, : x.shape[-1]])
        product = F.linear(narrow, up[: rows_for(out_features, activation)])
        if bias is None and residual is None and activation == "none":
            return product
        product = product.to(torch.float32)
        return finished(product, bias, residual, activation, out_features).to(x.dtype)
    tile = default_tile(flat.shape[0], down.shape[0], down.shape[1], processors_of(x.device))
    run = partial(launch, factors=Factors(down, up), tile=tile, bias=bias, activation=activation)
    return on_rows(run, x, residual, out_features)


differentiate(low_rank_linear)


def default_tile(tokens: int, rank: int, columns: int, processors: int) -> Tile:
    """The tile; its split is of the first product, and few parts are read by each of the second."""
    BM = next((m for m in (8, 16, 32) if tokens <= m), 64)
    split = 1
    while rank // _STEP * split < processors and columns // SPAN >= 4 * split and split < 8:
        split *= 2
    return Tile(BM, 64 if BM <= 8 else 128, split)


def launch(
    x: Tensor,
    factors: Factors,
    tile: Tile,
    *,
    out_features: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    wide: bool = False,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> Tensor:
    """Run the two kernels; arguments as `torchlathe.kernels.blocks.launching.launch`.

    Returns:
        (tokens, out).
    """
    from torchlathe.kernels.low_rank.triton import narrowed, widened_again

    down, up = factors
    x = widened(x, down.shape[1])
    tokens, rank = x.shape[0], down.shape[0]
    parts = torch.empty((tile.split, tokens, rank), dtype=torch.float32, device=x.device)
    out = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    blocks = -(-tokens // tile.BM)
    wrap(narrowed)[(rank // _STEP, blocks, tile.split)](
        x,
        down,
        parts,
        tokens,
        rank,
        down.shape[1] // SPAN,
        x.stride(0),
        down.stride(0),
        BM=tile.BM,
        BN=_STEP,
        BK=SPAN,
        SPLIT_K=tile.split,
        WIDE=wide,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    wrap(widened_again)[(up.shape[0] // tile.BN, blocks)](
        parts,
        up,
        x if bias is None else bias,
        x if residual is None else residual,
        out,
        tokens,
        out_features,
        rank,
        BM=tile.BM,
        BN=tile.BN,
        BK=_STEP,
        PARTS=tile.split,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation_code(activation),
        WIDE=wide,
        num_warps=tile.warps,
        num_stages=2,
    )
    return out
