"""One input basis for several layers: ``W_l = M_l B`` with B stored once.

Given B, the best coefficients under the curvature ``G_l (x) A_l`` are
``M_l = W_l A_l B^T (B A_l B^T)^-1``, and G drops out. Given the coefficients, the best basis solves
``sum of (M_l^T G_l M_l) B A_l = sum of M_l^T G_l W_l A_l``. The first basis is that of the stacked,
weighted weights ``G_l^1/2 W_l`` whitened by the mean of the A_l; the two steps then alternate.

What a basis costs at every rank comes from one Cholesky factor: with the rows of B in order and
``L L^T = B A_l B^T``, the leading r rows capture the first r rows of
``|L^-1 B A_l W_l^T G_l^1/2|^2``.

Source: own reconstruction of the shared bases of Geo-Sharing (arXiv 2511.06786) and of Basis
Sharing (arXiv 2410.03765), with each layer's own covariance instead of a common one; for a single
layer it is the whitened SVD of SVD-LLM (arXiv 2403.07378).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from torchlathe.passes.analysis.sharing.curvature import KroneckerCurvature, damped

__all__ = [
    "BasisFit",
    "BasisLayer",
    "dense_rank",
    "fit_basis",
    "shared_basis",
    "shared_costs",
    "stacked",
]

# Steps towards the best basis for the coefficients, in each round.
_STEPS = 4


@dataclass(frozen=True, eq=False)
class BasisLayer:
    """What is known of one layer; all float64.

    Attributes:
        weight: W, (outs, features).
        inputs: A, the second moment of its inputs, (features, features).
        outputs: G, the second moment of the gradients at its outputs, (outs, outs); None for I.
    """

    weight: torch.Tensor
    inputs: torch.Tensor
    outputs: torch.Tensor | None = None

    @cached_property
    def weighted(self) -> torch.Tensor:
        """``G^1/2 W``."""
        if self.outputs is None:
            return self.weight
        values, vectors = torch.linalg.eigh(self.outputs)
        root: torch.Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        return root @ self.weight

    @cached_property
    def moved(self) -> torch.Tensor:
        """``G^1/2 W A``."""
        return self.weighted @ self.inputs

    @cached_property
    def energy(self) -> float:
        """``1/2 <W, (G (x) A) W>``: what it costs to leave the layer out."""
        # Without the root of G, which takes an eigen-decomposition.
        left = self.weight if self.outputs is None else self.outputs @ self.weight
        return 0.5 * float((left * (self.weight @ self.inputs)).sum())


def stacked(layers: Sequence[BasisLayer]) -> BasisLayer:
    """Layers that read the same value as one layer of all their outputs.

    Args:
        layers: With equal second moments of their inputs.
    """
    first = layers[0]
    if len(layers) == 1:
        return first
    outputs = None
    if first.outputs is not None:
        outputs = torch.block_diag(*[one.outputs for one in layers if one.outputs is not None])
    found = BasisLayer(torch.cat([one.weight for one in layers]), first.inputs, outputs)
    # Known already, where the root of the large matrix would take long.
    found.__dict__["weighted"] = torch.cat([one.weighted for one in layers])
    return found


@dataclass(frozen=True, eq=False)
class BasisFit:
    """A basis and its coefficients.

    Attributes:
        basis: B, (rank, features).
        coefficients: M of each layer, (outs, rank).
        cost: ``1/2 sum of <W - M B, (G (x) A) (W - M B)>``.
        steps: The cost at the start, and after each round.
    """

    basis: torch.Tensor
    coefficients: tuple[torch.Tensor, ...]
    cost: float
    steps: tuple[float, ...]


def dense_rank(layers: Sequence[BasisLayer]) -> int:
    """The rank from which on a common basis has as many numbers as the weights."""
    features = layers[0].weight.shape[1]
    outs = sum(layer.weight.shape[0] for layer in layers)
    return -(-outs * features // (outs + features))


def shared_basis(layers: Sequence[BasisLayer], rank: int) -> torch.Tensor:
    """The leading right singular vectors of the stacked weights, whitened by the mean input.

    Args:
        layers: All of the same number of features.
        rank: How many rows; at most as many as there are features.

    Returns:
        (rank, features); the leading r rows are the basis of rank r.
    """
    pooled = torch.stack([layer.inputs for layer in layers]).mean(0)
    factor = torch.linalg.cholesky(damped(pooled))
    stack = torch.cat([layer.weighted for layer in layers]) @ factor
    rank = min(rank, *stack.shape)
    if stack.shape[0] < stack.shape[1]:
        _, left = torch.linalg.eigh(stack @ stack.T)
        right, _ = torch.linalg.qr(stack.T @ left.flip(1)[:, :rank])
        vectors = right.T
    else:
        _, right = torch.linalg.eigh(stack.T @ stack)
        vectors = right.flip(1)[:, :rank].T
    # W F = U S V^T with A = F F^T, so that the rows of V^T F^-1 span what W reads.
    found: torch.Tensor = torch.linalg.solve_triangular(factor, vectors, upper=False, left=False)
    return found


def shared_costs(layers: Sequence[BasisLayer], limit: int | None = None) -> torch.Tensor:
    """What a common basis costs at each rank, coefficients refitted; not yet alternated.

    Args:
        layers: All of the same number of features.
        limit: The largest rank; by default that below which there is something to save.

    Returns:
        (limit + 1,) float64; the first is that of rank 0.
    """
    limit = dense_rank(layers) if limit is None else limit
    basis = shared_basis(layers, limit)
    captured = torch.zeros(len(basis) + 1, dtype=torch.float64)
    for layer in layers:
        inside = basis @ layer.inputs @ basis.T
        factor = torch.linalg.cholesky(damped(inside))
        half = torch.linalg.solve_triangular(factor, basis @ layer.moved.T, upper=False)
        captured[1:] += half.square().sum(1).cumsum(0)
    total = sum(layer.energy for layer in layers)
    costs = (total - 0.5 * captured).clamp_min(0)
    if len(costs) <= limit:
        costs = torch.cat([costs, costs[-1:].expand(limit + 1 - len(costs))])
    return costs


def fit_basis(layers: Sequence[BasisLayer], rank: int, rounds: int = 3) -> BasisFit:
    """A common basis of one rank: coefficients and basis in turn, each the best for the other.

    Args:
        layers: All of the same number of features.
        rank: Of the basis.
        rounds: How often the basis is fitted again; one layer's is the best at once.
    """
    basis = shared_basis(layers, rank)
    found = _with_coefficients(layers, basis)
    steps = [found.cost]
    for _ in range(rounds if len(layers) > 1 else 0):
        better = _with_coefficients(layers, _refitted(layers, found))
        if not better.cost < found.cost:
            break
        found = better
        steps.append(found.cost)
    return BasisFit(found.basis, found.coefficients, found.cost, tuple(steps))


def _with_coefficients(layers: Sequence[BasisLayer], basis: torch.Tensor) -> BasisFit:
    coefficients = []
    cost = 0.0
    for layer in layers:
        inside = damped(basis @ layer.inputs @ basis.T)
        factor = torch.linalg.cholesky(inside)
        right = basis @ layer.inputs @ layer.weight.T
        found = torch.cholesky_solve(right, factor).T
        coefficients.append(found)
        left = BasisLayer(layer.weight - found @ basis, layer.inputs, layer.outputs)
        cost += left.energy
    return BasisFit(basis, tuple(coefficients), cost, (cost,))


def _refitted(layers: Sequence[BasisLayer], fit: BasisFit) -> torch.Tensor:
    """The basis that is best for the coefficients, with orthonormal rows."""
    terms = []
    right = torch.zeros_like(fit.basis)
    for layer, found in zip(layers, fit.coefficients, strict=True):
        weighted = found if layer.outputs is None else layer.outputs @ found
        terms.append((found.T @ weighted, layer.inputs))
        right += weighted.T @ layer.weight @ layer.inputs
    basis = KroneckerCurvature(tuple(terms)).approach(right, fit.basis, _STEPS)
    orthonormal: torch.Tensor = torch.linalg.qr(basis.T)[0]
    return orthonormal.T
