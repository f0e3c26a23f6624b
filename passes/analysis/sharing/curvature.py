"""Curvature of a layer's weight as a quadratic form, and what it costs to merge two layers.

At a minimum of the loss, changing a weight by D costs ``1/2 <D, H D>``. If two layers a, b are to
have one weight, the best one is the weighted mean ``(H_a + H_b)^-1 (H_a W_a + H_b W_b)``, and it
costs ``1/2 <D, (H_a : H_b) D>`` with ``D = W_a - W_b`` and the parallel sum
``H_a : H_b = H_a (H_a + H_b)^-1 H_b``. The merged layer has the curvature ``H_a + H_b`` and the
weighted mean, so that merging goes on from there, and its order does not matter.

Three forms of H for a weight of shape (outs, features): a number per element (the diagonal of the
Fisher matrix), ``I (x) A`` with the second moment A of the inputs, and sums of ``G (x) A`` with
the second moment G of the gradients at the outputs (K-FAC, arXiv 1503.05671).

Source: own; the parallel sum is that of Anderson and Duffin (1969). A reconstruction of the cost
in Geo-Sharing (arXiv 2511.06786), whose text was not to be had.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch

__all__ = [
    "Curvature",
    "DiagonalCurvature",
    "InputCurvature",
    "KroneckerCurvature",
    "damped",
    "kronecker_parallel",
    "merge_cost",
    "merged_cost",
    "merged_mean",
]

# Relative to the mean of the diagonal: where no layer has any curvature, the plain mean is taken.
_RIDGE = 1e-10
_CG_STEPS, _CG_TOLERANCE = 400, 1e-12

C = TypeVar("C", bound="Curvature")


class Curvature(ABC):
    """A positive semi-definite form on weights of shape (outs, features); all in float64."""

    @abstractmethod
    def plus(self, other: Self) -> Self:
        """The sum of both forms."""

    @abstractmethod
    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """``H D``, of the shape of D."""

    @abstractmethod
    def solve(self, matrix: torch.Tensor) -> torch.Tensor:
        """``H^-1 D``; zero or small along directions without curvature, if D is."""

    @abstractmethod
    def diagonal(self, shape: torch.Size) -> torch.Tensor:
        """A number per element of weights of this shape."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """The form times a number."""

    def quadratic(self, matrix: torch.Tensor) -> float:
        """``<D, H D>``."""
        return float((matrix * self.times(matrix)).sum())

    def parallel(self, other: Self, difference: torch.Tensor) -> float:
        """``<D, (H : H') D>``."""
        mine, theirs = self.times(difference), other.times(difference)
        return max(0.0, float((mine * self.plus(other).solve(theirs)).sum()))


@dataclass(frozen=True, eq=False)
class DiagonalCurvature(Curvature):
    """A number per element.

    Attributes:
        values: Shape (outs, features) float64, not negative.
    """

    values: torch.Tensor

    def plus(self, other: DiagonalCurvature) -> DiagonalCurvature:
        """Element by element."""
        return DiagonalCurvature(self.values + other.values)

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """Element by element."""
        return self.values * matrix

    def solve(self, matrix: torch.Tensor) -> torch.Tensor:
        """Element by element; zero where there is no curvature."""
        alive = self.values > 0
        return torch.where(alive, matrix / self.values.where(alive, self.values.new_ones(())), 0.0)

    def diagonal(self, shape: torch.Size) -> torch.Tensor:
        """The numbers."""
        return self.values

    def scaled(self, factor: float) -> DiagonalCurvature:
        """Every element times the factor."""
        return DiagonalCurvature(self.values * factor)


@dataclass(frozen=True, eq=False)
class InputCurvature(Curvature):
    """``I (x) A``: the squared error of the layer's result, exactly.

    Attributes:
        inputs: A, shape (features, features) float64, symmetric and positive semi-definite.
    """

    inputs: torch.Tensor

    def plus(self, other: InputCurvature) -> InputCurvature:
        """The sum of both A."""
        return InputCurvature(self.inputs + other.inputs)

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """``D A``."""
        return matrix @ self.inputs

    def solve(self, matrix: torch.Tensor) -> torch.Tensor:
        """``D A^-1``, damped by a hair."""
        return _solve(self.inputs, matrix.T).T

    def diagonal(self, shape: torch.Size) -> torch.Tensor:
        """That of A in each row."""
        return self.inputs.diagonal().expand(shape)

    def scaled(self, factor: float) -> InputCurvature:
        """A times the factor."""
        return InputCurvature(self.inputs * factor)


@dataclass(frozen=True, eq=False)
class KroneckerCurvature(Curvature):
    """A sum of ``G (x) A``; one of them for a layer, several for layers that were merged.

    Attributes:
        terms: Pairs of G, (outs, outs), and A, (features, features); float64.
    """

    terms: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    def plus(self, other: KroneckerCurvature) -> KroneckerCurvature:
        """The terms of both."""
        return KroneckerCurvature((*self.terms, *other.terms))

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """``sum of G D A``."""
        total = torch.zeros_like(matrix)
        for outputs, inputs in self.terms:
            total += outputs @ matrix @ inputs
        return total

    def solve(self, matrix: torch.Tensor) -> torch.Tensor:
        """Exact for up to two terms, by conjugate gradients to 1e-12 for more."""
        # A layer that nothing reaches has no curvature at all, and cannot be divided by.
        terms = tuple(term for term in self.terms if _bends(term))
        if not terms:
            return torch.zeros_like(matrix)
        if len(terms) == 1:
            outputs, inputs = terms[0]
            return _solve(outputs, _solve(inputs, matrix.T).T)
        if len(terms) == 2:
            return _solve_pair(*terms, matrix)
        return KroneckerCurvature(terms).approach(matrix)

    def diagonal(self, shape: torch.Size) -> torch.Tensor:
        """Products of those of G and A."""
        found = [g.diagonal()[:, None] * a.diagonal()[None, :] for g, a in self.terms]
        return torch.stack(found).sum(0)

    def scaled(self, factor: float) -> KroneckerCurvature:
        """Every G times the factor."""
        return KroneckerCurvature(tuple((g * factor, a) for g, a in self.terms))

    def parallel(self, other: Curvature, difference: torch.Tensor) -> float:
        """By the generalised eigen-decomposition for two layers, else by solving."""
        assert isinstance(other, KroneckerCurvature)
        if len(self.terms) == len(other.terms) == 1:
            if not (_bends(self.terms[0]) and _bends(other.terms[0])):
                return 0.0
            return kronecker_parallel(self.terms[0], other.terms[0], difference)
        return super().parallel(other, difference)

    def approach(
        self, matrix: torch.Tensor, start: torch.Tensor | None = None, steps: int = _CG_STEPS
    ) -> torch.Tensor:
        """``H^-1 D`` by preconditioned conjugate gradients, to 1e-12 or so many steps.

        Args:
            matrix: D.
            start: Where to begin; by default at what the mean factors give.
            steps: The most steps.
        """
        count = len(self.terms)
        outputs, inputs = (
            torch.stack([term[i] for term in self.terms]).sum(0) / count for i in (0, 1)
        )
        # The means of the factors are near enough to the sum to precondition with.
        near = _solver(outputs * count), _solver(inputs)

        def precondition(residual: torch.Tensor) -> torch.Tensor:
            return near[0](near[1](residual.T).T)

        found = precondition(matrix) if start is None else start
        residual = matrix - self.times(found)
        step = ready = precondition(residual)
        gain = (residual * ready).sum()
        for _ in range(steps):
            if float(residual.norm()) <= _CG_TOLERANCE * float(matrix.norm()):
                break
            moved = self.times(step)
            length = gain / (step * moved).sum().clamp_min(torch.finfo(torch.float64).tiny)
            found = found + length * step
            residual = residual - length * moved
            ready = precondition(residual)
            before, gain = gain, (residual * ready).sum()
            step = ready + (gain / before) * step
        return found


def _bends(term: tuple[torch.Tensor, torch.Tensor]) -> bool:
    """Whether ``G (x) A`` is not zero."""
    return all(bool(factor.any()) for factor in term)


def kronecker_parallel(
    one: tuple[torch.Tensor, torch.Tensor],
    other: tuple[torch.Tensor, torch.Tensor],
    difference: torch.Tensor,
) -> float:
    """``<D, (G (x) A : G' (x) A') D>``.

    With ``A = X diag(a) X^T``, ``A' = X X^T``, ``G = Y diag(g) Y^T`` and ``G' = Y Y^T`` (two
    generalised eigen-problems) both forms are diagonal in ``E = Y^T D X``, so that the sum is
    ``sum over i, j of E_ij^2 g_i a_j / (1 + g_i a_j)``.

    Args:
        one: G (outs, outs) and A (features, features).
        other: G' and A'.
        difference: D, (outs, features).
    """
    values_g, basis_g = _simultaneous(one[0], other[0])
    values_a, basis_a = _simultaneous(one[1], other[1])
    inside = basis_g.T @ difference @ basis_a
    product = values_g[:, None] * values_a[None, :]
    return float((inside.square() * product / (1 + product)).sum())


def merge_cost(one: C, weight: torch.Tensor, other: C, other_weight: torch.Tensor) -> float:
    """What it costs to give two layers the best common weight: ``1/2 <D, (H : H') D>``.

    Args:
        one: Curvature of the first layer, or of a class.
        weight: Its weight (the class's mean), (outs, features) float64.
        other: Curvature of the second.
        other_weight: Its weight.
    """
    return 0.5 * one.parallel(other, weight - other_weight)


def merged_mean(forms: Sequence[C], weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """The common weight of least cost, ``(sum H)^-1 sum H W``; the plain mean for equal curvature.

    Args:
        forms: Curvature of each layer.
        weights: Weight of each, (outs, features) float64.
    """
    plain = torch.stack(list(weights)).mean(0)
    total = forms[0]
    for form in forms[1:]:
        total = total.plus(form)
    pull = torch.zeros_like(plain)
    for form, weight in zip(forms, weights, strict=True):
        pull += form.times(weight - plain)
    return plain + total.solve(pull)


def merged_cost(forms: Sequence[C], weights: Sequence[torch.Tensor]) -> float:
    """What the best common weight of several layers costs: ``1/2 sum <W_c - W, H (W_c - W)>``."""
    if len(weights) < 2:
        return 0.0
    common = merged_mean(forms, weights)
    pairs = zip(forms, weights, strict=True)
    return 0.5 * sum(form.quadratic(common - weight) for form, weight in pairs)


def damped(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with 1e-10 of its mean diagonal added to the diagonal."""
    scale = float(matrix.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny))
    return matrix + _RIDGE * scale * torch.eye(len(matrix), dtype=matrix.dtype)


def _solve(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``M^-1 R`` for a positive semi-definite M."""
    return _solver(matrix)(right)


def _solver(matrix: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """``R -> M^-1 R`` for a positive semi-definite M, factored once."""
    factor, failed = torch.linalg.cholesky_ex(damped(matrix))
    if not int(failed):
        return lambda right: torch.cholesky_solve(right, factor)
    values, vectors = torch.linalg.eigh(matrix)
    alive = values > _RIDGE * values[-1].clamp_min(torch.finfo(torch.float64).tiny)
    inverse = torch.where(alive, 1 / values.where(alive, values.new_ones(())), 0.0)
    root = vectors * inverse.sqrt()
    return lambda right: root @ (root.T @ right)


def _simultaneous(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(v, X) with ``one = X diag(v) X^T`` and ``other = X X^T`` (damped by a hair)."""
    factor = torch.linalg.cholesky(damped(other))
    half = torch.linalg.solve_triangular(factor, one, upper=False)
    inside = torch.linalg.solve_triangular(factor, half.T, upper=False)
    values, vectors = torch.linalg.eigh((inside + inside.T) / 2)
    return values.clamp_min(0), factor @ vectors


def _solve_pair(
    one: tuple[torch.Tensor, torch.Tensor],
    other: tuple[torch.Tensor, torch.Tensor],
    right: torch.Tensor,
) -> torch.Tensor:
    """``(G (x) A + G' (x) A')^-1 R``: both are diagonal in one pair of bases."""
    values_g, basis_g = _simultaneous(one[0], other[0])
    values_a, basis_a = _simultaneous(one[1], other[1])
    # R = Y E (1 + g a) X^T with E what is looked for in the same bases, up to their inverses.
    left = torch.linalg.solve(basis_g, right)
    inside = torch.linalg.solve(basis_a, left.T).T
    inside = inside / (1 + values_g[:, None] * values_a[None, :])
    back = torch.linalg.solve(basis_g.T, inside)
    solved: torch.Tensor = torch.linalg.solve(basis_a.T, back.T).T
    return solved
