"""Splits of a convolution's kernel that follow its axes; tensors in, tensors out.

The split by channels (a convolution to few channels, then 1 x 1) is that of the kernel as one
matrix, see `torchlathe.passes.rewrite.factorising.splits`.
"""

from __future__ import annotations

import torch

from torchlathe.passes.rewrite.factorising.splits import svd_split

__all__ = ["spatial_split", "tucker_ranks", "tucker_split"]


def spatial_split(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A k x l kernel as k x 1 to ``rank`` channels, then 1 x l.

    The best such pair in the norm of the kernel: it is the matrix with rows (out, l) and columns
    (in, k), split by its singular values.

    Source: Jaderberg et al., arXiv 1405.3866, scheme 2; solved by SVD as in arXiv 1511.06067.

    Args:
        weight: Shape (outs, ins, k, l).
        rank: Channels between the two.

    Returns:
        Kernels (rank, ins, k, 1) and (outs, rank, 1, l).
    """
    outs, ins, tall, wide = weight.shape
    matrix = weight.permute(0, 3, 1, 2).reshape(outs * wide, ins * tall)
    found = svd_split(matrix, rank)
    first = found.down.reshape(found.rank, ins, tall, 1)
    second = found.up.reshape(outs, wide, found.rank).permute(0, 2, 1)[:, :, None]
    return first.contiguous(), second.contiguous()


def tucker_ranks(outs: int, ins: int, positions: int, parameters: int) -> tuple[int, int]:
    """Ranks (of the inputs, of the outputs) in proportion to the channels, within a budget.

    Solves ``r1 ins + r1 r2 positions + r2 outs = parameters`` with ``r1 / ins = r2 / outs``; a rank
    of 0 says that the budget is too small.
    """
    quadratic, linear = ins * outs * positions, ins * ins + outs * outs
    share = (-linear + (linear**2 + 4 * quadratic * parameters) ** 0.5) / (2 * quadratic)
    share = min(share, 1.0)
    return int(share * ins), int(share * outs)


def tucker_split(
    weight: torch.Tensor, rank_in: int, rank_out: int, *, sweeps: int = 2
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A kernel as 1 x 1 to ``rank_in`` channels, a small kernel, and 1 x 1 from ``rank_out``.

    Source: Tucker-2 of Kim et al., arXiv 1511.06530, equation 4, with the factors of the
    higher-order SVD and then alternating updates (HOOI).

    Args:
        weight: Shape (outs, ins, *kernel).
        rank_in: Channels that the small kernel reads.
        rank_out: Channels that it gives.
        sweeps: Alternating updates; each lowers the error, or leaves it.

    Returns:
        Kernels (rank_in, ins, 1...), (rank_out, rank_in, *kernel) and (outs, rank_out, 1...).
    """
    wide = weight.detach().double()
    outs, ins = wide.shape[:2]
    kernel = wide.shape[2:]
    cube = wide.reshape(outs, ins, -1)
    left = _leading(cube.reshape(outs, -1), rank_out)
    right = _leading(cube.transpose(0, 1).reshape(ins, -1), rank_in)
    for _ in range(sweeps):
        left = _leading(torch.einsum("oik,ir->ork", cube, right).reshape(outs, -1), rank_out)
        right = _leading(torch.einsum("oik,os->isk", cube, left).reshape(ins, -1), rank_in)
    core = torch.einsum("oik,os,ir->srk", cube, left, right)
    ones = [1] * len(kernel)
    first = right.T.reshape(right.shape[1], ins, *ones)
    last = left.reshape(outs, left.shape[1], *ones)
    middle = core.reshape(left.shape[1], right.shape[1], *kernel)
    dtype = weight.dtype
    return first.to(dtype).contiguous(), middle.to(dtype), last.to(dtype).contiguous()


def _leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Leading left singular vectors, by the Gram matrix of the rows."""
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    basis: torch.Tensor = vectors[:, -rank:].flip(1)
    return basis
