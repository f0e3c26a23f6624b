"""``torchlathe::block_sparse_linear``: a linear layer of which only some blocks are stored.

Source: the block compressed sparse row format (BSR) of torch and SciPy; the kernel is own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlathe.ir.errors import OptionError
from torchlathe.kernels.blocks.launching import add_parts, on_rows, room_for
from torchlathe.kernels.epilogue import activation_code, finished, rows_for
from torchlathe.kernels.packing import padded, widened
from torchlathe.kernels.registering import no_backward, register
from torchlathe.kernels.tuning.table import processors_of
from torchlathe.kernels.tuning.tiles import Tile

__all__ = ["BLOCKS", "BlockSparse", "block_sparse_linear", "dense", "launch", "pack", "reference"]

# Sizes of blocks that the kernel takes.
BLOCKS = (64, 128)

_LEAST = 4  # stored blocks of a program, or filling the pipeline is all that it does


class BlockSparse(NamedTuple):
    """A weight of which only some blocks are stored.

    Attributes:
        values: (blocks, size, size), row of blocks by row of blocks.
        columns: (blocks,) int32: which column of blocks each is in.
        offsets: (rows of blocks + 1,) int32: where each row of blocks begins.
    """

    values: Tensor
    columns: Tensor
    offsets: Tensor


def pack(weight: Tensor, size: int = 64) -> BlockSparse:
    """Keep the blocks of a weight that are not zero.

    Args:
        weight: (out, in), padded with zeros to whole blocks.
        size: Rows and columns of a block, one of `BLOCKS`.

    Raises:
        OptionError: There are no such blocks.
    """
    if size not in BLOCKS or weight.dim() != 2:
        raise OptionError(
            f"no kernel for blocks of {size} of a weight of {weight.dim()} axes",
            hint=f"weights are (out, in), blocks {' or '.join(map(str, BLOCKS))}",
        )
    rows, columns = (padded(extent, size) for extent in weight.shape)
    whole = F.pad(weight, (0, columns - weight.shape[1], 0, rows - weight.shape[0]))
    blocks = whole.view(rows // size, size, columns // size, size).transpose(1, 2)
    kept = blocks.ne(0).flatten(2).any(2)
    counts = kept.sum(1, dtype=torch.int32)
    offsets = F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
    return BlockSparse(
        blocks[kept].contiguous(), kept.nonzero()[:, 1].to(torch.int32).contiguous(), offsets
    )


def dense(values: Tensor, columns: Tensor, offsets: Tensor, in_features: int) -> Tensor:
    """The padded weight, (rows, columns)."""
    size = values.shape[1]
    across = -(-in_features // size)
    blocks = values.new_zeros(offsets.shape[0] - 1, across, size, size)
    blocks[_rows_of(columns, offsets), columns.to(torch.int64)] = values
    return blocks.transpose(1, 2).reshape(-1, across * size)


def _rows_of(columns: Tensor, offsets: Tensor) -> Tensor:
    """Row of blocks of each block."""
    each = torch.arange(columns.shape[0], dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:], each, right=True)


def reference(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """The meaning of the op: everything in fp32, or in float64 for float64 activations."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = dense(values, columns, offsets, x.shape[-1]).to(wide)
    weight = weight[: rows_for(out_features, activation), : x.shape[-1]]
    product = F.linear(x.to(wide), weight)
    return finished(product, bias, residual, activation, out_features).to(x.dtype)


@register("block_sparse_linear")
def block_sparse_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    out_features: int,
    activation: str = "none",
) -> Tensor:
    """``activation(x @ w.T + bias) + residual`` for the stored blocks `BlockSparse` of w.

    Shapes: x (..., in) in the type of the values; bias (out,); residual and the result (..., out).
    """
    flat = x.reshape(-1, x.shape[-1])
    if x.device.type == "cpu":
        rows = rows_for(out_features, activation)
        product = _product(flat, values, columns, offsets)[:, :rows].to(torch.float32)
        product = product.view(*x.shape[:-1], rows)
        return finished(product, bias, residual, activation, out_features).to(x.dtype)
    tile = default_tile(
        flat.shape[0],
        offsets.shape[0] - 1,
        columns.shape[0],
        values.shape[1],
        processors_of(x.device),
    )
    weight = BlockSparse(values, columns, offsets)
    run = partial(launch, weight=weight, tile=tile, bias=bias, activation=activation)
    return on_rows(run, x, residual, out_features)


def _taken(x: Tensor, columns: Tensor, size: int) -> Tensor:
    """What each block reads of x, (tokens, in): (blocks, tokens, size)."""
    x = widened(x, padded(x.shape[1], size))
    return x.view(x.shape[0], -1, size).transpose(0, 1).index_select(0, columns)


def _product(x: Tensor, values: Tensor, columns: Tensor, offsets: Tensor) -> Tensor:
    """Products of the stored blocks alone, added up in fp32 by their row: (tokens, rows)."""
    size, count = values.shape[1], offsets.shape[0] - 1
    each = torch.bmm(_taken(x, columns, size), values.transpose(1, 2)).to(torch.float32)
    total = each.new_zeros(count, x.shape[0], size)
    total = total.index_add(0, _rows_of(columns, offsets), each)
    return total.transpose(0, 1).reshape(x.shape[0], count * size)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.activation = inputs[-1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if ctx.activation != "none":
        raise no_backward(ctx.activation)
    x, values, columns, offsets = ctx.saved_tensors
    size = values.shape[1]
    needed = ctx.needs_input_grad
    found: list[Tensor | None] = [None] * 8
    flat = grad.flatten(0, -2)
    of_rows = _taken(
        F.pad(flat, (0, (offsets.shape[0] - 1) * size - flat.shape[1])),
        _rows_of(columns, offsets),
        size,
    )
    rows = x.reshape(-1, x.shape[-1])
    if needed[0]:
        each = torch.bmm(of_rows, values)
        across = -(-rows.shape[1] // size)
        total = each.new_zeros(across, rows.shape[0], size)
        total = total.index_add(0, columns.to(torch.int64), each)
        total = total.transpose(0, 1).reshape(rows.shape[0], across * size)
        found[0] = total[:, : rows.shape[1]].reshape(x.shape)
    if needed[1]:
        found[1] = torch.bmm(of_rows.transpose(1, 2), _taken(rows, columns, size))
    if needed[4]:
        found[4] = flat.sum(0)
    if needed[5]:
        found[5] = grad
    return tuple(found)


_op: Any = block_sparse_linear
_op.register_autograd(_backward, setup_context=_setup)


def default_tile(tokens: int, rows: int, blocks: int, size: int, processors: int) -> Tile:
    """The tile for so many rows of blocks that store so many blocks."""
    BM = next((m for m in (8, 16, 32, 64) if tokens <= m), 128)
    warps = 8 if BM * size >= 64 * 128 else 4
    # Blocks of 128 take 32 KB each, with 64 tokens or more 16 KB on top.
    stages = 4 if size == 64 or BM <= 16 else 3
    programs = rows * -(-tokens // BM)
    split = 1
    while programs * split < processors and blocks >= 2 * split * _LEAST * rows and split < 16:
        split *= 2
    return Tile(BM, size, split, warps, stages)


def launch(
    x: Tensor,
    weight: BlockSparse,
    tile: Tile,
    *,
    out_features: int,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    wide: bool = False,
    wrap: Callable[[Any], Any] = lambda kernel: kernel,
) -> Tensor:
    """Run the kernel; the arguments are those of `torchlathe.kernels.blocks.launching.launch`.

    Returns:
        (tokens, out).
    """
    from torchlathe.kernels.block_sparse.triton import block_sparse

    values, columns, offsets = weight
    size = values.shape[1]
    x = widened(x, padded(x.shape[1], size))
    tokens = x.shape[0]
    rows = rows_for(out_features, activation)
    out, parts = room_for(tokens, out_features, rows, tile.split, x.dtype, x.device)
    whole = tile.split == 1
    wrap(block_sparse)[(offsets.shape[0] - 1, -(-tokens // tile.BM), tile.split)](
        x,
        values,
        columns,
        offsets,
        x if bias is None else bias,
        x if residual is None else residual,
        parts,
        tokens,
        out_features if whole else rows,
        x.stride(0),
        BM=tile.BM,
        BN=size,
        SPLIT_K=tile.split,
        HAS_BIAS=bias is not None and whole,
        HAS_RESIDUAL=residual is not None and whole,
        ACTIVATION=activation_code(activation) if whole else 0,
        WIDE=wide,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if not whole:
        add_parts(parts, out, bias, residual, activation, wrap)
    return out
