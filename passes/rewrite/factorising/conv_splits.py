"""Splits of a convolution's kernel that follow its axes; tensors in, tensors out.

The split by channels (a convolution to few channels, then 1 x 1) is that of the kernel as one
matrix, see `torchlathe.passes.rewrite.factorising.splits`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from torchlathe.passes.rewrite.factorising.splits import svd_split

__all__ = ["cp_errors", "cp_split", "spatial_split", "tucker_ranks", "tucker_split"]

# Sum of the squared norms of canonical terms over that of the tensor, past which they cancel.
_MOST_CANCELLING = 100.0


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


def cp_split(weight: torch.Tensor, rank: int, *, sweeps: int = 25) -> tuple[torch.Tensor, ...]:
    """A kernel as 1 x 1 to ``rank`` channels, a kernel for each of them alone, and 1 x 1.

    The canonical decomposition of the kernel as a tensor of three axes (outs, ins, positions), by
    alternating least squares. It begins with the largest singular triplets of the kernel's slices
    along its principal positions, where what is left out is the error; no sweep raises it. Sums of
    canonical terms may have no best approximation: terms then grow and cancel. The sweeps end
    before that, and terms are balanced, so that the three factors of one have the same norm.

    Source: arXiv 1412.6553, section 3 (there the axes of the kernel are apart, which takes one more
    convolution for hardly fewer parameters); start and end of the sweeps, own.

    Args:
        weight: Shape (outs, ins, *kernel).
        rank: Number of terms.
        sweeps: At most so many; fewer where a sweep gains less than a thousandth.

    Returns:
        Kernels (rank, ins, 1...), (rank, 1, *kernel) for as many groups, and (outs, rank, 1...).
    """
    wide = weight.detach().double()
    outs, ins, *kernel = wide.shape
    cube = wide.reshape(outs, ins, -1)
    factors = _slice_terms(cube, rank)
    left, right, places = _balanced(_swept(cube, factors, sweeps))
    ones = [1] * len(kernel)
    first = right.T.reshape(rank, ins, *ones)
    middle = places.T.reshape(rank, 1, *kernel)
    last = left.reshape(outs, rank, *ones)
    dtype = weight.dtype
    return tuple(kernel.to(dtype).contiguous() for kernel in (first, middle, last))


def cp_errors(weight: torch.Tensor, ranks: Sequence[int], *, sweeps: int = 3) -> list[float]:
    """Squared errors of `cp_split` over the squared norm after a few sweeps, for ascending ranks.

    Terms of a lower rank are the first ones of a higher one when the sweeps begin, so that the
    slices are decomposed once.
    """
    wide = weight.detach().double()
    cube = wide.reshape(*wide.shape[:2], -1)
    whole = float(cube.square().sum())
    terms = _slice_terms(cube, max(ranks, default=1))
    errors = []
    for rank in ranks:
        left, right, places = (term[:, :rank] for term in terms)
        errors.append(_cp_error(cube, _swept(cube, (left, right, places), sweeps)))
    return [error / whole if whole > 0 else 0.0 for error in errors]


_Terms = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _swept(cube: torch.Tensor, factors: _Terms, sweeps: int) -> _Terms:
    """Terms after up to so many sweeps, none of which raises the error or lets terms cancel."""
    error, whole = _cp_error(cube, factors), float(cube.square().sum())
    for _ in range(sweeps):
        tried = _sweep(cube, factors)
        now = _cp_error(cube, tried)
        sizes = torch.stack([factor.norm(dim=0) for factor in tried]).prod(0)
        if not now <= error or float(sizes.square().sum()) > _MOST_CANCELLING * whole:
            break
        done = error - now <= 1e-3 * error
        factors, error = tried, now
        if done:
            break
    return factors


def _slice_terms(cube: torch.Tensor, rank: int) -> _Terms:
    """The largest singular triplets of slices along the principal directions of the last axis."""
    positions = cube.shape[2]
    rotation = _leading(cube.permute(2, 0, 1).reshape(positions, -1), positions)
    slices = torch.einsum("oik,kp->poi", cube, rotation)
    left, values, right = torch.linalg.svd(slices, full_matrices=False)
    chosen = values.flatten().topk(min(rank, values.numel())).indices
    slice_, place = chosen // values.shape[1], chosen % values.shape[1]
    size = values[slice_, place]
    terms = left[slice_, :, place].T * size, right[slice_, place, :].T, rotation[:, slice_]
    missing = rank - len(chosen)
    # More terms than there are triplets: the further ones are zero.
    first, second, third = (torch.nn.functional.pad(term, (0, missing)) for term in terms)
    return first, second, third


def _sweep(cube: torch.Tensor, factors: _Terms) -> _Terms:
    """One round of least squares for each factor; the others are normalised before it."""
    left, right, places = factors
    right, places = _unit(right), _unit(places)
    # Slice by slice, since the products of all of them at once would take the rank times as much.
    pairs = list(zip(cube.unbind(2), places, strict=True))
    left = _unit(_solved(_sum(s @ (right * place) for s, place in pairs), right, places))
    right = _unit(_solved(_sum(s.T @ (left * place) for s, place in pairs), left, places))
    crossed = torch.stack([((s @ right) * left).sum(0) for s, _ in pairs])
    return left, right, _solved(crossed, left, right)


def _sum(parts: Iterable[torch.Tensor]) -> torch.Tensor:
    total: torch.Tensor | None = None
    for part in parts:
        total = part if total is None else total + part
    assert total is not None
    return total


def _solved(crossed: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The factor of least squares, from the tensor's products with the other two, both unit."""
    gram = (first.T @ first) * (second.T @ second)
    gram.diagonal().add_(1e-10 * float(gram.diagonal().mean()) + 1e-300)
    solved: torch.Tensor = torch.linalg.solve(gram, crossed.T).T
    return solved


def _cp_error(cube: torch.Tensor, factors: _Terms) -> float:
    left, right, places = factors
    pairs = zip(cube.unbind(2), places, strict=True)
    return sum(float((s - (left * place) @ right.T).square().sum()) for s, place in pairs)


def _unit(factor: torch.Tensor) -> torch.Tensor:
    unit: torch.Tensor = factor / factor.norm(dim=0).clamp_min(1e-300)
    return unit


def _balanced(factors: _Terms) -> _Terms:
    """The same terms, each with three factors of one norm: their scales are free otherwise."""
    sizes = torch.stack([factor.norm(dim=0) for factor in factors])
    size = sizes.prod(0).pow(1 / 3)
    left, right, places = (
        factor * (size / own.clamp_min(1e-300)) for factor, own in zip(factors, sizes, strict=True)
    )
    return left, right, places


def _leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    """Leading left singular vectors, by the Gram matrix of the rows."""
    _, vectors = torch.linalg.eigh(matrix @ matrix.T)
    basis: torch.Tensor = vectors[:, -rank:].flip(1)
    return basis
