"""Low-rank splits of one matrix: tensors in, tensors out, no program and no graph.

All of them are one projection. Let ``M = D W C`` with ``C C' = A`` the second moment of the inputs
and ``D`` the square roots of weights of the rows (identities where absent), and ``U`` the leading
left singular vectors of ``M``. Then ``W~ = D^-1 U U' D W`` is the best matrix of its rank in the
norm ``tr(D (W - W~) A (W - W~)' D)``, and what it loses is the sum of the squared singular values
that are left out (Eckart-Young applied to ``M``, since ``D W~ C = U U' M``). Nothing is inverted
but ``D``, so a rank-deficient second moment does no harm; damping decides what happens in the
directions that the data never shows.

Source: own form of truncation-aware whitening (SVD-LLM, arXiv 2403.07378, which inverts a Cholesky
factor of ``A``) and of Fisher-weighted SVD (arXiv 2207.00112, equation 5).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from torchlathe.passes.rewrite.factorising.products import (
    Moment,
    Read,
    Wide,
    blocks,
    eigenvalues,
    largest,
    orthonormal,
)

__all__ = [
    "Norm",
    "Split",
    "damped",
    "gram_energy",
    "joint_split",
    "left_vectors",
    "output_error",
    "rank_for",
    "saves",
    "spectrum",
    "split",
    "svd_split",
    "whitened_split",
]

# Subspace iterations and further vectors of the randomised method; with these its loss is within
# one per cent of the best on the flattest spectrum there is, that of a random matrix.
_POWER_ITERATIONS = 4
_RANDOMISED_BELOW = 1 / 8


@dataclass(frozen=True)
class Split:
    """A matrix as a product of two.

    Attributes:
        up: Shape (outs, rank).
        down: Shape (rank, ins). Column ``j`` of ``up`` and row ``j`` of ``down`` have the same
            norm, and these norms fall with ``j`` where the metric is the plain one.
        error: Squared error in the norm of the split, float64.
        energy: Squared norm of the matrix itself in that norm; ``error / energy`` is relative.
    """

    up: torch.Tensor
    down: torch.Tensor
    error: float
    energy: float

    @property
    def rank(self) -> int:
        """How many columns ``up`` has."""
        return int(self.up.shape[1])

    @property
    def product(self) -> torch.Tensor:
        """The matrix that the split stands for, (outs, ins)."""
        return self.up @ self.down


def rank_for(outs: int, ins: int, share: float) -> int:
    """The largest rank whose factors hold at most this share of the parameters; may be 0."""
    return min(int(share * outs * ins / (outs + ins)), outs, ins)


def saves(rank: int, outs: int, ins: int) -> bool:
    """Whether the two factors are smaller than the matrix: r (o + i) < o i."""
    return rank * (outs + ins) < outs * ins


def svd_split(
    weight: torch.Tensor, rank: int, *, randomised: bool | None = None, seed: int = 0
) -> Split:
    """The best approximation of a matrix itself (Eckart-Young); see `split`."""
    return split(weight, rank, randomised=randomised, seed=seed)


def whitened_split(
    weight: torch.Tensor,
    inputs: torch.Tensor | Moment,
    rank: int,
    *,
    damping: float = 1e-6,
    randomised: bool | None = None,
    seed: int = 0,
) -> Split:
    """The best approximation of what the matrix gives on the data; see `split`.

    ``error`` is the mean squared error of the outputs, summed over outputs, if ``inputs`` is the
    mean of ``x x'`` and ``damping`` is 0.
    """
    return split(weight, rank, inputs=inputs, damping=damping, randomised=randomised, seed=seed)


def joint_split(
    weights: Sequence[torch.Tensor],
    rank: int,
    *,
    inputs: torch.Tensor | Moment | None = None,
    scales: Sequence[float] | None = None,
    damping: float = 1e-6,
    randomised: bool | None = None,
    seed: int = 0,
) -> tuple[list[torch.Tensor], torch.Tensor, float, float]:
    """One factor that reads the input for several matrices that read the same one.

    Args:
        weights: Shapes (outs_k, ins).
        rank: Of the shared factor.
        inputs: Second moment of what they read, (ins, ins).
        scales: Weight of each matrix' squared error; by default 1.
        damping: As in `split`.
        randomised: As in `split`.
        seed: As in `split`.

    Returns:
        Per matrix its own factor (outs_k, rank); the shared one (rank, ins); ``error`` and
        ``energy`` as in `Split`, with the scales.
    """
    sizes = [int(weight.shape[0]) for weight in weights]
    rows = None
    if scales is not None:
        rows = torch.cat(
            [torch.full((n,), s, dtype=torch.float64) for n, s in zip(sizes, scales, strict=True)]
        ).to(weights[0].device)
    found = split(
        torch.cat(list(weights)),
        rank,
        inputs=inputs,
        rows=rows,
        damping=damping,
        randomised=randomised,
        seed=seed,
    )
    return list(found.up.split(sizes)), found.down, found.error, found.energy


def split(
    weight: torch.Tensor,
    rank: int,
    *,
    inputs: torch.Tensor | Moment | None = None,
    rows: torch.Tensor | None = None,
    damping: float = 0.0,
    randomised: bool | None = None,
    seed: int = 0,
) -> Split:
    """The best product of two factors in the norm of the data and of the rows.

    Args:
        weight: Shape (outs, ins), floating.
        rank: Columns of the first factor, at least 1; more than there are is as many as there are.
        inputs: Mean of ``x x'`` over what the matrix is multiplied with, (ins, ins), positive
            semidefinite, or sums that it is to be made of; None for the identity.
        rows: Non-negative weight of each row's squared error, (outs,); None for ones.
        damping: Added to the diagonal of ``inputs``, relative to its mean.
        randomised: Find the leading directions by subspace iteration; None does where the rank is
            below an eighth of the smaller side.
        seed: Of the random start.

    Returns:
        Factors in the dtype of the weight; the computation is in float64.

    Raises:
        ValueError: The rank is below 1.
    """
    if rank < 1:
        raise ValueError(f"a rank of {rank}")
    rank = min(rank, *weight.shape)
    if randomised is None:
        randomised = rank < _RANDOMISED_BELOW * min(weight.shape)
    matrix = Wide(weight, _row_scale(rows))
    norm = Norm(inputs, damping, weight.device)
    del inputs  # it can go as soon as the norm is done with it
    if randomised:
        up, energy, error = _random_basis(matrix, norm, rank, seed)
    else:
        up, energy, error = _basis(matrix, norm, rank)
    down = matrix.under(up)
    if matrix.scale is not None:
        up = up / matrix.scale[:, None]
    sizes = up.norm(dim=0), down.norm(dim=1)
    # A direction with nothing in it stays zero in both factors.
    balance = torch.where(sizes[1] > 0, (sizes[1] / sizes[0]).sqrt(), 0.0)
    up = (up * balance).to(weight.dtype)
    down.div_(torch.where(balance > 0, balance, 1.0)[:, None])
    return Split(up, down.to(weight.dtype), error, energy)


def spectrum(
    weight: torch.Tensor,
    *,
    inputs: torch.Tensor | Moment | None = None,
    rows: torch.Tensor | None = None,
    damping: float = 0.0,
) -> torch.Tensor:
    """Squared singular values in the norm of `split`, largest first: float64, (min(outs, ins),).

    ``spectrum(...)[r:].sum()`` is the ``error`` of the split of rank ``r``.
    """
    matrix = Wide(weight, _row_scale(rows))
    norm = Norm(inputs, damping, weight.device)
    wide = weight.shape[0] <= weight.shape[1]
    gram = matrix.outer(norm.read) if wide else matrix.inner(_by(norm.root()))
    norm.let_go()
    return eigenvalues(gram).flip(0).clamp_min(0)


def left_vectors(weight: torch.Tensor) -> torch.Tensor:
    """Left singular vectors of a matrix, largest first: float64, (outs, min(outs, ins))."""
    norm = Norm(None, 0.0, weight.device)
    return _basis(Wide(weight), norm, min(weight.shape))[0]


def output_error(
    weight: torch.Tensor,
    other: torch.Tensor | None,
    inputs: torch.Tensor | Moment | None = None,
) -> float:
    """``tr((W - W~) A (W - W~)')``: the mean squared error of the outputs, summed over them.

    Args:
        weight: W, (outs, ins).
        other: W~, of the same shape; None for zeros.
        inputs: A, (ins, ins); None for the identity.
    """
    norm, lost = Norm(inputs, 0.0, weight.device), 0.0
    for part in blocks(len(weight)):
        gap = weight[part].detach().double()
        gap = gap if other is None else gap - other[part].detach().double()
        lost += float((norm.read(gap) * gap).sum())
    return lost


def _row_scale(rows: torch.Tensor | None) -> torch.Tensor | None:
    """Square roots of the weights of rows; rows that do not count at all still count a little."""
    if rows is None:
        return None
    rows = rows.double()
    return rows.clamp_min(max(1e-6 * float(rows.mean()), 1e-300)).sqrt()


def _wide(moment: torch.Tensor | None) -> torch.Tensor | None:
    return None if moment is None else moment.detach().double()


def damped(
    inputs: torch.Tensor | None, damping: float, matrix: torch.Tensor
) -> torch.Tensor | None:
    """The second moment in float64 where the matrix is, with damping on its diagonal.

    Args:
        inputs: Shape (ins, ins); None for the identity, which stays None.
        damping: Relative to the mean of the diagonal.
        matrix: Whose device the result is on.
    """
    moment = _wide(inputs)
    if moment is None:
        return None
    moment = moment.to(matrix.device)
    added = damping * float(moment.diagonal().mean())
    if added > 0:
        moment = moment.clone()
        moment.diagonal().add_(added)
    return moment


def gram_energy(matrix: torch.Tensor, moment: torch.Tensor | None) -> torch.Tensor:
    """The diagonal of M A M', (rows,): the squared norm of each row."""
    read = matrix if moment is None else matrix @ moment
    return (read * matrix).sum(1)


class Norm:
    """A second moment A with damping, which can be let go when it was multiplied with.

    Args:
        inputs: A, (ins, ins); None for the identity.
        damping: Relative to the mean of the diagonal.
        device: Where the matrices are.
    """

    def __init__(
        self, inputs: torch.Tensor | Moment | None, damping: float, device: torch.device
    ) -> None:
        if isinstance(inputs, Moment) and inputs.sums[0].device != device:
            inputs = inputs.dense()  # to be moved once
        if isinstance(inputs, torch.Tensor):
            inputs = Moment((inputs.detach().to(device, torch.float64),), 1)
        self._moment = inputs
        self._added = 0.0
        if inputs is not None:
            self._added = damping * float(inputs.diagonal().mean())

    @property
    def plain(self) -> bool:
        """Whether A is the identity, or let go."""
        return self._moment is None

    def read(self, rows: torch.Tensor) -> torch.Tensor:
        """X A, which may be X itself."""
        if self._moment is None:
            return rows
        return self._moment.read(rows).add_(rows, alpha=self._added)

    def let_go(self) -> None:
        """A is needed no more."""
        self._moment = None

    def root(self) -> torch.Tensor | None:
        """C with C C' = A, for any positive semidefinite A, (ins, ins); A is let go."""
        if self._moment is None:
            return None
        own = self._moment.dense()
        own.diagonal().add_(self._added)
        self.let_go()
        values, vectors, _ = largest(own, len(own))
        return vectors.mul_(values.clamp_min(0).sqrt())


def _by(root: torch.Tensor | None) -> Read:
    """Multiplies rows with a matrix; None for the identity."""
    return (lambda rows: rows) if root is None else (lambda rows: rows @ root)


def _basis(matrix: Wide, norm: Norm, rank: int) -> tuple[torch.Tensor, float, float]:
    """Leading left singular vectors of M C, (outs, rank), with the energy of all and of the rest.

    By the Gram matrix of the smaller side. In float64 it resolves singular values down to 1e-8 of
    the largest, which is what float32 weights hold. M is D W; while the vectors are solved for,
    only the Gram matrix is there.
    """
    outs, ins = matrix.shape
    root = norm.root() if outs > ins else None
    gram = matrix.outer(norm.read) if outs <= ins else matrix.inner(_by(root))
    norm.let_go()
    energy = float(gram.diagonal().sum())
    _, vectors, rest = largest(gram, rank)
    del gram
    vectors = vectors.flip(1)
    if outs > ins:
        # QR instead of dividing by singular values, some of which may be zero.
        vectors = orthonormal(matrix.of(vectors if root is None else root @ vectors))
    return vectors, max(energy, 0.0), max(rest, 0.0)


def _random_basis(
    matrix: Wide, norm: Norm, rank: int, seed: int
) -> tuple[torch.Tensor, float, float]:
    """The same by randomised subspace iteration (Halko, Martinsson, Tropp, algorithm 4.4)."""
    generator = torch.Generator().manual_seed(seed)
    width = min(rank + max(10, rank // 5), *matrix.shape)
    start = torch.randn(matrix.shape[1], width, dtype=torch.float64, generator=generator)
    # M A once, which the energy takes anyway; each further product is with few vectors.
    read = matrix if norm.plain else Wide(matrix.map(norm.read, matrix.shape[1]))
    norm.let_go()
    basis = orthonormal(matrix.of(start.to(matrix.weight.device)))
    del start
    for _ in range(_POWER_ITERATIONS):
        basis = orthonormal(read.of(matrix.under(basis).T))
    under = matrix.under(basis)
    small = read.under(basis) @ under.T
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    energy = read.inner_product(matrix)
    error = max(energy - float(values[-rank:].sum()), 0.0)
    return basis @ vectors[:, -rank:].flip(1), energy, error
