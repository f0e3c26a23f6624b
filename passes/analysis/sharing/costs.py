"""What a class of layers costs, and how many parameters it stores, in each way of sharing.

A class has a list of *offers*: numbers of parameters with the predicted loss that each of them
costs. Tied weights make one offer; a shared basis makes one for every rank.

Source: own; the parallel sums and bases are described where they are computed. Leakage and trust
region are a reconstruction of the low-curvature projection of Geo-Sharing (arXiv 2511.06786).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from torchlathe.passes.analysis.sharing.bases import BasisLayer, dense_rank, shared_costs
from torchlathe.passes.analysis.sharing.curvature import (
    Curvature,
    DiagonalCurvature,
    InputCurvature,
    KroneckerCurvature,
    merge_cost,
    merged_cost,
    merged_mean,
)
from torchlathe.passes.analysis.sharing.partitions import Classes

__all__ = [
    "BaseCosts",
    "BasisCosts",
    "ClassCosts",
    "Limits",
    "Offers",
    "TiedCosts",
    "WeighedLayer",
    "corrected",
    "leakage",
]

# The sharp directions are those that hold so much of the trace of the curvature.
_SHARP = 0.5
_CORRECTION_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class WeighedLayer:
    """A layer's weight with its curvature.

    Attributes:
        weight: (outs, features) float64.
        curvature: Form on the weight.
        basis: The same for a shared basis, where the curvature has such a form.
        outputs: Curvature of what is added to each result, (outs,) float64; None if not known.
        mean: Of the inputs, (features,) float64; None if not known.
    """

    weight: torch.Tensor
    curvature: Curvature
    basis: BasisLayer | None = None
    outputs: torch.Tensor | None = None
    mean: torch.Tensor | None = None

    @property
    def size(self) -> int:
        """Elements of the weight."""
        return self.weight.numel()

    @property
    def energy(self) -> float:
        """``1/2 <W, H W>``."""
        return 0.5 * self.curvature.quadratic(self.weight)


@dataclass(frozen=True, eq=False)
class Offers:
    """What a class can be had for.

    Attributes:
        parameters: Of each offer, rising, (offers,) float64.
        costs: Of each offer, (offers,) float64.
        ranks: Of each offer; 0 for weights that are stored in full.
    """

    parameters: torch.Tensor
    costs: torch.Tensor
    ranks: torch.Tensor

    @classmethod
    def one(cls, parameters: float, cost: float, rank: int = 0) -> Offers:
        """A single offer."""
        numbers = torch.tensor([[parameters], [cost]], dtype=torch.float64)
        return cls(numbers[0], numbers[1], torch.tensor([rank]))

    def best(self, price: float) -> int:
        """The offer with the least cost plus price times parameters."""
        return int((self.costs + price * self.parameters).argmin())

    def value(self, price: float) -> float:
        """The least cost plus price times parameters."""
        return float((self.costs + price * self.parameters).min())


@dataclass(frozen=True)
class Limits:
    """What the perturbation of a layer must hold to.

    Attributes:
        leakage: The most of ``|D|^2`` that may lie in the sharp directions; None for any.
        trust: The most that ``<D, H D>`` may be of ``<W, H W>``; None for any.
    """

    leakage: float | None = None
    trust: float | None = None

    def allow(self, layer: WeighedLayer, change: torch.Tensor) -> bool:
        """Whether a layer's weight may change by this."""
        if self.trust is not None:
            whole = layer.curvature.quadratic(layer.weight)
            if layer.curvature.quadratic(change) > self.trust * whole:
                return False
        return self.leakage is None or leakage(layer.curvature, change) <= self.leakage


class ClassCosts(ABC):
    """Offers of classes of one type of layers, each computed once.

    Args:
        layers: Of one type.
    """

    def __init__(self, layers: Sequence[WeighedLayer]) -> None:
        self.layers = tuple(layers)
        self._found: dict[Classes, Offers] = {}

    def offers(self, members: Classes) -> Offers:
        """What a class can be had for; an infinite cost for what is not allowed."""
        if members not in self._found:
            self._found[members] = self._offers([self.layers[i] for i in sorted(members)])
        return self._found[members]

    @abstractmethod
    def _offers(self, layers: list[WeighedLayer]) -> Offers: ...

    def pair_costs(self) -> dict[tuple[int, int], float]:
        """What each pair would cost with one weight."""
        return {
            (i, j): merge_cost(
                self.layers[i].curvature,
                self.layers[i].weight,
                self.layers[j].curvature,
                self.layers[j].weight,
            )
            if self.layers[i].weight.shape == self.layers[j].weight.shape
            else math.inf
            for j in range(len(self.layers))
            for i in range(j)
        }


class TiedCosts(ClassCosts):
    """One weight for the class.

    Args:
        layers: Of one shape.
        limits: What every layer's change must hold to.
    """

    def __init__(self, layers: Sequence[WeighedLayer], limits: Limits | None = None) -> None:
        super().__init__(layers)
        self.limits = limits or Limits()

    def _offers(self, layers: list[WeighedLayer]) -> Offers:
        size = layers[0].size
        if len(layers) == 1:
            return Offers.one(size, 0.0)
        forms, weights = _parts(layers)
        if self.limits != Limits():
            common = merged_mean(forms, weights)
            if not all(self.limits.allow(layer, common - layer.weight) for layer in layers):
                return Offers.one(size, math.inf)
        if len(layers) == 2:
            return Offers.one(size, merge_cost(forms[0], weights[0], forms[1], weights[1]))
        return Offers.one(size, merged_cost(forms, weights))


class BaseCosts(TiedCosts):
    """One weight for the class, and a private correction of low rank for each layer.

    Args:
        layers: Of one shape.
        rank: Of the corrections.
        limits: What is left after the corrections must hold to.
    """

    def __init__(
        self, layers: Sequence[WeighedLayer], rank: int, limits: Limits | None = None
    ) -> None:
        super().__init__(layers, limits)
        self.rank = rank

    def _offers(self, layers: list[WeighedLayer]) -> Offers:
        if len(layers) == 1:
            return Offers.one(layers[0].size, 0.0)
        outs, features = layers[0].weight.shape
        size = layers[0].size + len(layers) * self.rank * (outs + features)
        common, factors = corrected(layers, self.rank)
        cost = 0.0
        for layer, (left, right) in zip(layers, factors, strict=True):
            change = common + left @ right - layer.weight
            if not self.limits.allow(layer, change):
                return Offers.one(size, math.inf, self.rank)
            cost += 0.5 * layer.curvature.quadratic(change)
        return Offers.one(size, cost, self.rank)


class BasisCosts(ClassCosts):
    """One input basis for the class, of any rank that saves something; or a weight as it is.

    Args:
        layers: Of equally many features.
        report: Called with a line of text about what is being done.
    """

    def __init__(
        self, layers: Sequence[WeighedLayer], report: Callable[[str], object] | None = None
    ) -> None:
        super().__init__(layers)
        self._report = report

    def _offers(self, layers: list[WeighedLayer]) -> Offers:
        parts = [layer.basis for layer in layers if layer.basis is not None]
        assert len(parts) == len(layers), "this curvature has no form for a basis"
        if self._report is not None and len(self._found) % 10 == 9:
            self._report(f"sharing: costs of {len(self._found) + 1} classes")
        limit = dense_rank(parts) - 1
        costs = shared_costs(parts, limit)[1:]
        outs, features = sum(len(p.weight) for p in parts), parts[0].weight.shape[1]
        ranks = torch.arange(1, limit + 1)
        parameters = (ranks * (outs + features)).double()
        if len(layers) == 1:
            size = torch.tensor([float(layers[0].size)], dtype=torch.float64)
            parameters = torch.cat([parameters, size])
            costs = torch.cat([costs, torch.zeros(1, dtype=torch.float64)])
            ranks = torch.cat([ranks, torch.zeros(1, dtype=torch.int64)])
        return Offers(parameters, costs, ranks)


def corrected(
    layers: Sequence[WeighedLayer], rank: int
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A common weight with a correction ``U V`` of low rank for each layer, in turn.

    The correction takes the directions that the curvature weighs most: it is the truncated SVD of
    ``G^1/2 (W - W_c) A^1/2``. The common weight is the merged mean of what the corrections leave.

    Args:
        layers: Of one shape.
        rank: Of the corrections.

    Returns:
        The common weight, and U (outs, rank) and V (rank, features) for each layer.
    """
    forms, weights = _parts(layers)
    common = merged_mean(forms, weights)
    factors: list[tuple[torch.Tensor, torch.Tensor]] = []
    roots = [_roots(form) for form in forms]
    for step in range(_CORRECTION_ROUNDS):
        factors = [
            _low_rank(weight - common, root, rank)
            for weight, root in zip(weights, roots, strict=True)
        ]
        if step < _CORRECTION_ROUNDS - 1:
            left = [w - u @ v for w, (u, v) in zip(weights, factors, strict=True)]
            common = merged_mean(forms, left)
    return common, factors


def leakage(form: Curvature, change: torch.Tensor) -> float:
    """The share of ``|D|^2`` in the sharp directions: the fewest that hold half of the trace.

    Args:
        form: Curvature of one layer.
        change: D, (outs, features).
    """
    if isinstance(form, DiagonalCurvature):
        values, inside = form.values, change
    elif isinstance(form, InputCurvature):
        values_a, vectors = torch.linalg.eigh(form.inputs)
        values, inside = values_a.expand(change.shape), change @ vectors
    else:
        assert isinstance(form, KroneckerCurvature)
        ((outputs, inputs),) = form.terms
        values_g, vectors_g = torch.linalg.eigh(outputs)
        values_a, vectors_a = torch.linalg.eigh(inputs)
        values = values_g[:, None] * values_a[None, :]
        inside = vectors_g.T @ change @ vectors_a
    falling, order = values.flatten().clamp_min(0).sort(descending=True)
    held = falling.cumsum(0) - falling
    sharp = order[held < _SHARP * falling.sum()]
    squares = inside.flatten().square()
    whole = float(squares.sum())
    return float(squares[sharp].sum()) / whole if whole else 0.0


def _parts(layers: Sequence[WeighedLayer]) -> tuple[list[Curvature], list[torch.Tensor]]:
    return [layer.curvature for layer in layers], [layer.weight for layer in layers]


Roots = tuple[torch.Tensor | None, torch.Tensor | None]


def _roots(form: Curvature) -> Roots:
    """Cholesky factors of G and A; of a diagonal form, that of its rows' and columns' means."""
    if isinstance(form, InputCurvature):
        return None, _factor(form.inputs)
    if isinstance(form, KroneckerCurvature):
        ((outputs, inputs),) = form.terms
        return _factor(outputs), _factor(inputs)
    assert isinstance(form, DiagonalCurvature)
    rows, columns = form.values.mean(1), form.values.mean(0)
    return _factor(rows.diag()), _factor(columns.diag())


def _factor(matrix: torch.Tensor) -> torch.Tensor:
    # Directions without curvature would have to be divided by zero on the way back. Where there is
    # none at all, as in a layer that nothing reaches, all count the same.
    scale = float(matrix.diagonal().mean())
    if scale <= torch.finfo(torch.float64).tiny:
        return torch.eye(len(matrix), dtype=matrix.dtype)
    found: torch.Tensor = torch.linalg.cholesky(
        matrix + 1e-8 * scale * torch.eye(len(matrix), dtype=matrix.dtype)
    )
    return found


def _low_rank(change: torch.Tensor, roots: Roots, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U, V of the best approximation of a rank under the curvature."""
    left, right = roots
    inside = change if left is None else left.T @ change
    inside = inside if right is None else inside @ right
    u, s, v = torch.linalg.svd(inside, full_matrices=False)
    rank = min(rank, len(s))
    u, v = u[:, :rank] * s[:rank], v[:rank]
    if left is not None:
        u = torch.linalg.solve_triangular(left.T, u, upper=True)
    if right is not None:
        v = torch.linalg.solve_triangular(right, v, upper=False, left=False)
    return u, v
