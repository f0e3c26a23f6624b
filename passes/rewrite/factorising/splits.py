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

__all__ = [
    "Split",
    "damped",
    "gram_energy",
    "joint_split",
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
    inputs: torch.Tensor,
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
    inputs: torch.Tensor | None = None,
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
    inputs: torch.Tensor | None = None,
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
            semidefinite; None for the identity.
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
    scale = _row_scale(rows)
    rank = min(rank, *weight.shape)
    if randomised is None:
        randomised = rank < _RANDOMISED_BELOW * min(weight.shape)
    norm = _Norm(inputs, damping)
    del inputs  # it can go as soon as the norm is done with it
    if randomised:
        matrix = _scaled(weight, scale)
        basis, energy, error = _random_basis(matrix, norm, rank, seed)
    else:
        basis, energy, error = _basis(weight, scale, norm, rank)
        matrix = _scaled(weight, scale)
    down = basis.T @ matrix
    del matrix
    up = basis if scale is None else basis / scale[:, None]
    sizes = up.norm(dim=0), down.norm(dim=1)
    # A direction with nothing in it stays zero in both factors.
    balance = torch.where(sizes[1] > 0, (sizes[1] / sizes[0]).sqrt(), 0.0)
    up, down = up * balance, down / torch.where(balance > 0, balance, 1.0)[:, None]
    return Split(up.to(weight.dtype), down.to(weight.dtype), error, energy)


def spectrum(
    weight: torch.Tensor,
    *,
    inputs: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    damping: float = 0.0,
) -> torch.Tensor:
    """Squared singular values in the norm of `split`, largest first: float64, (min(outs, ins),).

    ``spectrum(...)[r:].sum()`` is the ``error`` of the split of rank ``r``.
    """
    norm = _Norm(inputs, damping)
    scale = _row_scale(rows)
    if weight.shape[0] <= weight.shape[1]:
        gram = _gram(_scaled(weight, scale), norm)
    else:
        rooted = norm.rooted(_scaled(weight, scale))
        gram = rooted.T @ rooted
        del rooted
    values: torch.Tensor = torch.linalg.eigvalsh(gram)
    return values.flip(0).clamp_min(0)


def output_error(
    weight: torch.Tensor, other: torch.Tensor, inputs: torch.Tensor | None = None
) -> float:
    """``tr((W - W~) A (W - W~)')``: the mean squared error of the outputs, summed over them."""
    return _energy(weight.detach().double() - other.detach().double(), _wide(inputs))


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


def _energy(matrix: torch.Tensor, moment: torch.Tensor | None) -> float:
    """tr(M A M')."""
    return float(gram_energy(matrix, moment).sum())


class _Norm:
    """A second moment with damping, which is multiplied with once and then let go.

    Args:
        inputs: Shape (ins, ins); None for the identity.
        damping: Relative to the mean of the diagonal.
    """

    def __init__(self, inputs: torch.Tensor | None, damping: float) -> None:
        self._inputs = inputs
        self._added = 0.0 if inputs is None else damping * float(inputs.diagonal().double().mean())

    def of(self, matrix: torch.Tensor) -> torch.Tensor:
        """M A; the matrix itself for the identity."""
        if self._inputs is None:
            return matrix
        read = matrix @ self._inputs.detach().to(matrix.device, torch.float64)
        self._inputs = None
        return read.add_(matrix, alpha=self._added)

    def rooted(self, matrix: torch.Tensor) -> torch.Tensor:
        """M C with C C' = A, for any positive semidefinite A."""
        if self._inputs is None:
            return matrix
        own = self._inputs.detach().to(matrix.device, torch.float64, copy=True)
        own.diagonal().add_(self._added)
        self._inputs = None
        values, vectors = _eigh(own)
        return (matrix @ vectors).mul_(values.clamp_min(0).sqrt())


def _scaled(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """In float64; not to be changed, for it may be the weight."""
    return weight.detach().double() if scale is None else weight.detach() * scale[:, None]


def _gram(matrix: torch.Tensor, norm: _Norm) -> torch.Tensor:
    """M A M', of which both triangles are right but for rounding: solvers read one of them."""
    return norm.of(matrix) @ matrix.T


def _eigh(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and -vectors of a symmetric matrix, which is overwritten.

    LAPACK works in place, on columns; its workspace is twice the matrix. Other devices take a copy.
    """
    if matrix.device.type != "cpu":
        return tuple(torch.linalg.eigh(matrix))
    columns = matrix.mT
    values = matrix.new_empty(len(matrix))
    torch.linalg.eigh(columns, out=(values, columns))
    return values, columns


def _basis(
    weight: torch.Tensor, scale: torch.Tensor | None, norm: _Norm, rank: int
) -> tuple[torch.Tensor, float, float]:
    """Leading left singular vectors of M C, (outs, rank), with the energy of all and of the rest.

    By the Gram matrix of the smaller side. In float64 it resolves singular values down to 1e-8 of
    the largest, which is what float32 weights hold. M is D W; while the vectors are solved for,
    only the Gram matrix is there.
    """
    if weight.shape[0] <= weight.shape[1]:
        values, vectors = _eigh(_gram(_scaled(weight, scale), norm))
        basis = vectors[:, -rank:].flip(1)
    else:
        rooted = norm.rooted(_scaled(weight, scale))
        values, vectors = _eigh(rooted.T @ rooted)
        # QR instead of dividing by singular values, some of which may be zero.
        basis = _orthonormal(rooted @ vectors[:, -rank:].flip(1))
    values = values.clamp_min(0)
    return basis, float(values.sum()), float(values[: len(values) - rank].sum())


def _random_basis(
    matrix: torch.Tensor, norm: _Norm, rank: int, seed: int
) -> tuple[torch.Tensor, float, float]:
    """The same by randomised subspace iteration (Halko, Martinsson, Tropp, algorithm 4.4)."""
    generator = torch.Generator().manual_seed(seed)
    width = min(rank + max(10, rank // 5), *matrix.shape)
    start = torch.randn(matrix.shape[1], width, dtype=matrix.dtype, generator=generator)
    # W A once, which the energy takes anyway; each further product is with few vectors.
    read = norm.of(matrix)
    basis = _orthonormal(matrix @ start.to(matrix.device))
    for _ in range(_POWER_ITERATIONS):
        basis = _orthonormal(read @ (matrix.T @ basis))
    small = (read.T @ basis).T @ (matrix.T @ basis)
    values, vectors = torch.linalg.eigh((small + small.T) / 2)
    energy = float(torch.vdot(read.flatten(), matrix.flatten()))
    error = max(energy - float(values[-rank:].sum()), 0.0)
    return basis @ vectors[:, -rank:].flip(1), energy, error


def _orthonormal(vectors: torch.Tensor) -> torch.Tensor:
    basis: torch.Tensor = torch.linalg.qr(vectors).Q
    return basis
