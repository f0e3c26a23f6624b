"""Tensor trains of one matrix: tensors in, tensors out, no program and no graph.

A matrix (o, i) with ``o = o_1 ... o_n`` and ``i = i_1 ... i_n`` is a tensor with the legs
``(o_1 i_1), ..., (o_n i_n)``, and its tensor train (a matrix product operator) is a core of shape
``(left bond, o_k, i_k, right bond)`` for each site. With two sites it is a sum of Kronecker
products, and cutting it is the nearest such sum (Van Loan and Pitsianis).

Cutting by a singular value decomposition at each bond in turn leaves an error whose square is the
sum of the *squares* of the discarded values, since the cores to the left are orthonormal; at a
relative error of e, each of the n - 1 cuts may discard ``e ||W|| / sqrt(n - 1)``.

For the outputs on data with the second moment ``A``, two steps. The train of ``W C``, with
``C C' = A_1 (x) ... (x) A_n`` the Kronecker product nearest to ``A`` in its partial traces, can be
undone core by core, which it could not be for a general ``C``; in that norm the identity above
holds exactly. Then each core in turn is fitted to the true norm with the others fixed, a linear
least squares problem, which never makes the error larger.

Source: Oseledets 2011, theorem 2.2; Van Loan and Pitsianis 1993. CompactifAI (arXiv 2401.14109)
uses the first; whitening and fitting are own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch

from torchlathe.passes.rewrite.factorising.splits import spectrum, split

__all__ = [
    "Train",
    "apply_train",
    "balanced",
    "dense",
    "full_bonds",
    "input_factors",
    "kronecker_sum",
    "roots_of",
    "tensor_train",
    "train_parameters",
]


@dataclass(frozen=True)
class Train:
    """A matrix as a tensor train.

    Attributes:
        cores: Shapes (left bond, o_k, i_k, right bond); the outermost bonds are 1.
        discarded: Per bond the sum of the squares of the discarded values, in the norm of the cut.
        energy: Squared norm of the matrix in that norm; ``error / energy`` is relative.
    """

    cores: tuple[torch.Tensor, ...]
    discarded: tuple[float, ...]
    energy: float

    @property
    def error(self) -> float:
        """Squared error in the norm of the cuts."""
        return sum(self.discarded)

    @property
    def bonds(self) -> tuple[int, ...]:
        """Extents between the cores."""
        return tuple(int(core.shape[3]) for core in self.cores[:-1])

    @property
    def parameters(self) -> int:
        """Elements of all cores."""
        return sum(core.numel() for core in self.cores)

    @property
    def matrix(self) -> torch.Tensor:
        """The matrix that the train stands for, (outs, ins)."""
        return dense(self.cores)


def train_parameters(
    out_modes: Sequence[int], in_modes: Sequence[int], bonds: Sequence[int]
) -> int:
    """Elements of the cores: the sum of left bond x o_k x i_k x right bond."""
    ends = (1, *bonds, 1)
    legs = zip(ends, out_modes, in_modes, ends[1:], strict=False)
    return sum(prod(shape) for shape in legs)


def full_bonds(out_modes: Sequence[int], in_modes: Sequence[int]) -> tuple[int, ...]:
    """The bonds at which a train is any matrix of these modes."""
    legs = [o * i for o, i in zip(out_modes, in_modes, strict=True)]
    return tuple(min(prod(legs[:k]), prod(legs[k:])) for k in range(1, len(legs)))


def tensor_train(
    matrix: torch.Tensor,
    out_modes: Sequence[int],
    in_modes: Sequence[int],
    *,
    bond: int | Sequence[int] | None = None,
    error: float | None = None,
    factors: Sequence[torch.Tensor] | None = None,
    seed: int = 0,
) -> Train:
    """Cut a matrix bond by bond, from the left.

    Args:
        matrix: Shape (outs, ins), floating.
        out_modes: Factors of ``outs``, row-major.
        in_modes: Factors of ``ins``, as many.
        bond: Most that each bond may be, one for all or one per bond; None for any.
        error: Relative error (not squared) that the whole train may have in the norm of the cuts.
        factors: Second moment of each leg of the inputs, (i_k, i_k), positive definite, whose
            Kronecker product is the norm; see `input_factors`. None for the plain norm.
        seed: Of the randomised method for small bonds.

    Returns:
        The train, in the dtype of the matrix; the computation is in float64.

    Raises:
        ValueError: The modes do not multiply to the shape, or a bond is below 1.
    """
    outs, ins = tuple(out_modes), tuple(in_modes)
    count = len(outs)
    if (prod(outs), prod(ins)) != tuple(matrix.shape) or len(ins) != count:
        raise ValueError(f"modes {outs} and {ins} for a matrix of {tuple(matrix.shape)}")
    bonds = [bond] * (count - 1) if bond is None or isinstance(bond, int) else list(bond)
    if any(b is not None and b < 1 for b in bonds):
        raise ValueError(f"bonds of {bonds}")
    roots = None if factors is None else [roots_of(factor) for factor in factors]
    rest = _interleaved(matrix.detach().double(), outs, ins)
    if roots is not None:
        rest = _along_inputs(rest, [root for root, _ in roots])
    energy = float(rest.square().sum())
    allowed = None if error is None else error**2 * energy / max(count - 1, 1)
    cores, discarded, left = [], [], 1
    for site, most in enumerate(bonds):
        rest = rest.reshape(left * outs[site] * ins[site], -1)
        basis, rest, lost = _cut(rest, most, allowed, seed)
        cores.append(basis.reshape(left, outs[site], ins[site], -1))
        discarded.append(lost)
        left = int(rest.shape[0])
    cores.append(rest.reshape(left, outs[-1], ins[-1], 1))
    if roots is not None:
        undo = [inverse for _, inverse in roots]
        cores = [torch.einsum("aojb,ji->aoib", c, u) for c, u in zip(cores, undo, strict=True)]
    return Train(tuple(c.to(matrix.dtype) for c in balanced(cores)), tuple(discarded), energy)


def kronecker_sum(
    matrix: torch.Tensor, first: tuple[int, int], terms: int, *, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The nearest sum of Kronecker products, ``sum_r A_r (x) B_r``.

    Args:
        matrix: Shape (outs, ins).
        first: Shape of each ``A_r``; its extents divide those of the matrix.
        terms: How many products.
        seed: Of the randomised method for few terms.

    Returns:
        ``A`` (terms, o_1, i_1), ``B`` (terms, o_2, i_2), and the squared error.

    Raises:
        ValueError: The shape does not divide that of the matrix, or there is no term.
    """
    outs, ins = matrix.shape
    second = outs // first[0], ins // first[1]
    train = tensor_train(
        matrix, (first[0], second[0]), (first[1], second[1]), bond=terms, seed=seed
    )
    a, b = train.cores
    return a[0].permute(2, 0, 1).contiguous(), b[..., 0].contiguous(), train.error


def dense(cores: Sequence[torch.Tensor]) -> torch.Tensor:
    """The matrix that cores stand for, (outs, ins)."""
    whole = cores[0].squeeze(0)
    for core in cores[1:]:
        whole = torch.einsum("oia,apjb->opijb", whole, core)
        whole = whole.flatten(0, 1).flatten(1, 2)
    return whole.squeeze(-1)


def apply_train(cores: Sequence[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """``x W'`` core by core, without the matrix; ``x`` is (..., ins), the result (..., outs)."""
    lead = x.shape[:-1]
    ins = [int(core.shape[2]) for core in cores]
    state = x.reshape(-1, 1, 1, prod(ins))  # rows, outputs so far, bond, inputs to come
    for core, extent in zip(cores, ins, strict=True):
        state = state.unflatten(-1, (extent, -1))
        state = torch.einsum("moaij,apib->mopbj", state, core).flatten(1, 2)
    return state.reshape(*lead, -1)


def input_factors(
    moment: torch.Tensor, in_modes: Sequence[int], damping: float = 1e-6
) -> list[torch.Tensor]:
    """Per leg of the inputs its own second moment, scaled so that their product has the same trace.

    Args:
        moment: Mean of ``x x'``, (ins, ins), positive semidefinite.
        in_modes: Extents of the legs.
        damping: Added to the diagonal of each, relative to its mean.

    Returns:
        Partial traces, (i_k, i_k) float64, positive definite. For a moment that is a Kronecker
        product they are its factors.
    """
    ins = tuple(in_modes)
    legs = moment.double().reshape(*ins, *ins)
    count = len(ins)
    total = float(moment.double().diagonal().sum())
    if not total > 0:
        # Nothing varies, for instance since all samples are the same: no direction is preferred.
        return [torch.eye(extent, dtype=torch.float64, device=moment.device) for extent in ins]
    found = []
    for site, extent in enumerate(ins):
        order = [site, count + site]
        others = [leg for leg in range(count) if leg != site]
        moved = legs.permute(*order, *others, *(count + leg for leg in others))
        size = prod(ins) // extent
        moved = moved.reshape(extent, extent, size, size)
        factor = moved.diagonal(dim1=2, dim2=3).sum(-1)
        factor = (factor + factor.T) / 2
        # Traces multiply, so that each takes the n-th root of the whole.
        factor = factor * (total ** (1 / count) / total)
        level = float(factor.diagonal().mean())
        factor.diagonal().add_(max(damping, 1e-12) * level + 1e-300)
        found.append(factor)
    return found


def roots_of(factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The symmetric square root, and its inverse."""
    values, vectors = torch.linalg.eigh((factor + factor.T) / 2)
    values = values.clamp_min(1e-14 * float(values.max()) + 1e-300).sqrt()
    return (vectors * values) @ vectors.T, (vectors / values) @ vectors.T


def _interleaved(matrix: torch.Tensor, outs: Sequence[int], ins: Sequence[int]) -> torch.Tensor:
    """The legs in the order of the sites: (o_1, i_1, ..., o_n, i_n)."""
    count = len(outs)
    order = [leg for site in range(count) for leg in (site, count + site)]
    return matrix.reshape(*outs, *ins).permute(order).contiguous()


def _along_inputs(tensor: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Each input leg times its matrix; legs as `_interleaved` orders them."""
    for site, matrix in enumerate(matrices):
        axis = 2 * site + 1
        tensor = (tensor.movedim(axis, -1) @ matrix.to(tensor)).movedim(-1, axis)
    return tensor


def _cut(
    matrix: torch.Tensor, most: int | None, allowed: float | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Orthonormal columns, the rest, and the square of what is lost."""
    rank = min(matrix.shape) if most is None else min(most, *matrix.shape)
    if allowed is not None:
        values = spectrum(matrix)
        tails = values.flip(0).cumsum(0).flip(0)
        rank = max(1, min(rank, int((tails > allowed).sum())))
    found = split(matrix, rank, seed=seed)
    sizes = found.up.norm(dim=0)
    basis = found.up / torch.where(sizes > 0, sizes, 1.0)
    return basis, found.down * sizes[:, None], found.error


def balanced(cores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same train with the norms shared out: at every bond both neighbours have the same.

    Training moves cores of like size alike, and low-bit cores get scales that fit.
    """
    done = list(cores)
    for site in range(len(done) - 1):
        left, right = done[site], done[site + 1]
        sizes = left.flatten(0, 2).norm(dim=0), right.flatten(1).norm(dim=1)
        both = (sizes[0] > 0) & (sizes[1] > 0)
        scale = torch.where(both, (sizes[1] / sizes[0]).sqrt(), 0.0)
        done[site] = left * scale
        inverse = torch.where(both, 1 / torch.where(both, scale, 1.0), 0.0)
        done[site + 1] = right * inverse[:, None, None, None]
    return done
