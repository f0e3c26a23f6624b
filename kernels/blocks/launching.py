"""Launching the one product kernel: what the ops of all formats of weights have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.kernels.epilogue import activation_code, finished, rows_for
from torchlathe.kernels.packing import ROWS, padded, widened
from torchlathe.kernels.tuning.table import tile_for
from torchlathe.kernels.tuning.tiles import Problem, Tile

__all__ = [
    "KINDS",
    "Packed",
    "Routing",
    "add_parts",
    "launch",
    "linear",
    "on_rows",
    "pad_rank",
    "room_for",
]

# Formats of weights, in the order of the kernel's codes.
KINDS = ("w4a16", "w8a16", "w8a8", "w4a8")

_EIGHT_BITS = ("w8a8", "w4a8")


@dataclass(frozen=True)
class Packed:
    """Packed weights as the kernel takes them.

    Attributes:
        kind: One of `KINDS`.
        weight: (rows, ...), with experts first where there are several.
        scales: (groups, rows), or (rows,), with experts first.
        zeros: As the scales; None without.
        columns: Input features with padding.
        piece: Columns of a span that lie together.
        pieces: Pieces of a span, which is a step of the kernel's loop.
        group: Weights that share a scale; 0 for a whole row.
    """

    kind: str
    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    columns: int
    piece: int
    pieces: int
    group: int


class Routing(NamedTuple):
    """Which expert takes which slots.

    Attributes:
        order: (slots,) int32, the token of each slot; None if slots are tokens.
        places: (slots,) int32, the row of the result of each slot; None for the slots' order.
        weights: (slots,) fp32, what the results are multiplied by.
        blocks: (blocks, 3) int32: expert, first slot, one past the last.
        slots: How many there are.
    """

    order: Tensor | None
    places: Tensor | None
    weights: Tensor | None
    blocks: Tensor
    slots: int


def linear(
    x: Tensor,
    packed: Packed,
    unpacked_product: Callable[[Tensor, int], Tensor],
    *,
    out_features: int,
    dtype: torch.dtype,
    x_scales: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """A linear op: the kernel on a GPU where a tile is known for it, else torch's product.

    Args:
        x: (..., in).
        packed: The weights.
        unpacked_product: Gives ``x @ w.T``, scales included, (tokens, rows), from x as (tokens, in)
            and a number of rows: what the kernel is replaced by.
        out_features: Features of the result.
        dtype: Type of the result.
        x_scales: (...,), where x has 8 bits.
        bias: (rows,), see `torchlathe.kernels.epilogue.rows_for`.
        residual: (..., out).
        activation: One of `torchlathe.kernels.epilogue.ACTIVATIONS`, or a gated one.
        low_rank: (..., rank) and (rows padded, rank), whose product is added.

    Returns:
        (..., out).
    """
    rows = rows_for(out_features, activation)
    flat = x.reshape(-1, x.shape[-1])
    narrow = None if low_rank is None else low_rank[0].reshape(-1, low_rank[0].shape[-1])
    tile = None
    if x.device.type != "cpu":
        kind = str(x.dtype).removeprefix("torch.")
        op = "fp8" if packed.kind == "w8a8" and x.dtype != torch.int8 else packed.kind
        problem = Problem(op, kind, flat.shape[0], rows, flat.shape[1], packed.group)
        tile = tile_for(problem, x.device)
    if tile is None:
        product = unpacked_product(flat, rows).view(*x.shape[:-1], rows)
        ends = (bias, residual, low_rank)
        if all(value is None for value in ends) and activation == "none":
            return product.to(dtype)
        product = product.to(torch.float32)
        if low_rank is not None:
            product = product + F.linear(low_rank[0], low_rank[1][:rows]).to(torch.float32)
        return finished(product, bias, residual, activation, out_features).to(dtype)
    run = partial(
        launch,
        packed=packed,
        tile=tile,
        dtype=dtype,
        x_scales=None if x_scales is None else x_scales.reshape(-1),
        bias=bias,
        activation=activation,
        low_rank=None if low_rank is None or narrow is None else (narrow, low_rank[1]),
    )
    return on_rows(run, x, residual, out_features)


def on_rows(
    run: Callable[..., Tensor], x: Tensor, residual: Tensor | None, out_features: int
) -> Tensor:
    """Run a kernel that takes (tokens, in) on (..., in), so that tracing sees it.

    Args:
        run: Takes x, ``out_features``, ``residual`` and ``wrap``, and gives (tokens, out).
        x: (..., in).
        residual: (..., out).
        out_features: Features of the result.

    Returns:
        (..., out).
    """
    out = run(
        x.reshape(-1, x.shape[-1]),
        out_features=out_features,
        residual=None if residual is None else residual.reshape(-1, out_features),
        wrap=torch.library.wrap_triton,
    )
    return out.view(*x.shape[:-1], out_features)


def pad_rank(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Pad factors, (rank, in) and (out, rank), to the rank and the rows that the kernel wants.

    Raises:
        OptionError: The rank is over 128.
    """
    from torchlathe.ir.errors import OptionError

    rank = down.shape[0]
    wanted = max(16, 1 << max(rank - 1, 1).bit_length())
    if wanted > 128:
        raise OptionError(f"a rank of {rank} cannot be fused", hint="use two linear layers")
    more = wanted - rank
    rows = padded(up.shape[0], ROWS) - up.shape[0]
    return F.pad(down, (0, 0, 0, more)), F.pad(up, (0, more, 0, rows))


def launch(
    x: Tensor,
    packed: Packed,
    tile: Tile,
    *,
    out_features: int,
    dtype: torch.dtype,
    x_scales: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    low_rank: tuple[Tensor, Tensor] | None = None,
    routing: Routing | None = None,
    wide: bool = False,
    fast: bool = True,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> Tensor:
    """Run the kernel.

    Args:
        x: (tokens, in).
        packed: The packed weights.
        tile: How the product is cut up.
        out_features: Features of the result.
        dtype: Type of the result.
        x_scales: (tokens,), where x has 8 bits.
        bias: (rows,).
        residual: (tokens, out).
        activation: One of `torchlathe.kernels.epilogue.ACTIVATIONS`, or a gated one.
        low_rank: (tokens, rank) and (rows, rank), whose product is added to the sums.
        routing: The experts of the slots, where there are several.
        wide: Multiply in fp32, for the interpreter, which has no bf16.
        fast: Use PTX; other vendors and the interpreter have the plain form.
        wrap: What makes a kernel traceable.

    Returns:
        (tokens or slots, out).
    """
    from torchlathe.kernels.product.triton import product

    weight, scales, zeros = packed.weight, packed.scales, packed.zeros
    x = widened(x, packed.columns)
    M = x.shape[0] if routing is None else routing.slots
    N = out_features
    split = tile.split if routing is None else 1
    ends = rows_for(N, activation)
    out, parts = room_for(M, N, ends, split, dtype, x.device)
    whole = split == 1
    blocks = -(-M // tile.BM) if routing is None else routing.blocks.shape[0]
    # What there is none of is never read, but takes a pointer.
    order, places, weights = (None,) * 3 if routing is None else routing[:3]
    wrap(product)[(weight.shape[-2] // tile.BN, blocks, split)](
        x,
        x if x_scales is None else x_scales,
        weight,
        scales,
        weight if zeros is None else zeros,
        x if bias is None else bias,
        x if residual is None else residual,
        x if low_rank is None else low_rank[0],
        x if low_rank is None else low_rank[1],
        x if order is None else order,
        x if places is None else places,
        x if routing is None else routing.blocks,
        x if weights is None else weights,
        parts,
        M,
        N if whole else ends,
        packed.columns // (packed.piece * packed.pieces),
        x.stride(0),
        weight.stride(-2),
        scales.stride(-2) if scales.dim() > 1 else 0,
        0 if routing is None else weight.stride(0),
        0 if routing is None else scales.stride(0),
        KIND=KINDS.index(packed.kind),
        BM=tile.BM,
        BN=tile.BN,
        PIECE=packed.piece,
        PIECES=packed.pieces,
        GROUP=packed.group,
        SPLIT_K=split,
        RANK=0 if low_rank is None else low_rank[0].shape[1],
        EXPERTS=routing is not None,
        HAS_ORDER=order is not None,
        HAS_PLACES=places is not None,
        HAS_ZEROS=zeros is not None,
        HAS_BIAS=bias is not None and whole,
        HAS_RESIDUAL=residual is not None and whole,
        HAS_WEIGHTS=weights is not None,
        ACTIVATION=activation_code(activation) if whole else 0,
        WIDE=wide,
        FAST=fast and torch.version.hip is None,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if not whole:
        add_parts(parts, out, bias, residual, activation, wrap)
    return out


def room_for(
    tokens: int, features: int, rows: int, split: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The result, (tokens, features), and what the product writes: that, or fp32 parts by row."""
    out = torch.empty((tokens, features), dtype=dtype, device=device)
    if split == 1:
        return out, out
    return out, torch.empty((split, tokens, rows), dtype=torch.float32, device=device)


def add_parts(
    parts: Tensor,
    out: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    wrap: Callable[[Any], Any],
) -> None:
    """Add the parts of a split sum, (parts, tokens, rows) fp32, and finish, into ``out``."""
    from torchlathe.kernels.blocks.triton import sum_parts

    count, tokens, rows = parts.shape
    block = 512
    wrap(sum_parts)[(-(-rows // block), tokens)](
        parts,
        out if bias is None else bias,
        out if residual is None else residual,
        out,
        tokens,
        rows,
        out.shape[1],
        PARTS=count,
        BLOCK=block,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation_code(activation),
        num_warps=4,
    )
