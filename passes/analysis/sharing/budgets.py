"""Colourings of several types of layers under one budget of parameters.

With a price per parameter each type is a problem of its own: the partition whose classes cost
least, each at its best offer. Raising the price from zero makes the whole smaller, and the price
at which it fits gives the colouring. What is left of the budget buys the offers that lower the
cost most per parameter. The price is a Lagrange multiplier, so the same solution tells how far
from the optimum it can be at most.

Source: own (Lagrangian relaxation of a multiple-choice knapsack).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torchlathe.passes.analysis.sharing.costs import ClassCosts, TiedCosts
from torchlathe.passes.analysis.sharing.partitions import (
    EXACT_LIMIT,
    ClassCost,
    Classes,
    Partition,
    agglomerate,
    best_partition,
    best_partitions,
    color_conflicts,
    ordered,
    partition_cost,
    refine,
)

__all__ = ["Colored", "Solution", "Solver", "color_by_budget", "color_by_count"]

Solver = Literal["auto", "exact", "ward", "dsatur"]

_HALVINGS = 40


@dataclass(frozen=True)
class Colored:
    """The classes of one type.

    Attributes:
        classes: Members by their place in the type.
        picks: Which offer each class takes.
        cost: Predicted loss.
        parameters: Stored.
    """

    classes: Partition
    picks: tuple[int, ...]
    cost: float
    parameters: int


@dataclass(frozen=True)
class Solution:
    """The classes of all types.

    Attributes:
        types: One for each type.
        bound: A cost that no colouring within the budget can be below; None if it is not known.
    """

    types: tuple[Colored, ...]
    bound: float | None = None

    @property
    def cost(self) -> float:
        """The sum over the types."""
        return math.fsum(part.cost for part in self.types)

    @property
    def parameters(self) -> int:
        """The sum over the types."""
        return sum(part.parameters for part in self.types)

    @property
    def gap(self) -> float | None:
        """How much of the cost could be saved at most, as a share; None if it is not known."""
        if self.bound is None:
            return None
        return max(0.0, 1 - self.bound / self.cost) if self.cost > 0 else 0.0


def is_exact(solver: Solver, count: int) -> bool:
    """Whether every partition is looked at."""
    return solver == "exact" or (solver == "auto" and count <= EXACT_LIMIT)


def partitions_by_count(costs: ClassCosts, solver: Solver = "auto") -> dict[int, Partition]:
    """The cheapest partition for each number of classes, as far as the limits allow it.

    Args:
        costs: Of one type; the cheapest offer of each class counts.
        solver: "exact", "ward" (agglomeration, then refinement), "dsatur" (the first limit of the
            costs of pairs that leaves so few classes, then refinement), or "auto" for what the
            number of layers allows.
    """

    def cost(members: Classes) -> float:
        return float(costs.offers(members).costs.min())

    count = len(costs.layers)
    if is_exact(solver, count):
        return best_partitions(count, cost)
    if solver == "dsatur":
        pairs = costs.pair_costs()
        found = {count: ordered([i] for i in range(count))}
        for limit in sorted(pairs.values()):
            partition = color_conflicts(pairs, count, limit)
            if partition_cost(partition, cost) < math.inf:
                found.setdefault(len(partition), partition)
    else:
        found = agglomerate(count, cost)
    return {number: refine(partition, cost) for number, partition in found.items()}


def color_by_count(costs: ClassCosts, classes: int, solver: Solver = "auto") -> Partition:
    """The cheapest partition into so many classes, or the next more that the limits allow.

    Args:
        costs: Of one type.
        classes: How many; of fewer layers each is a class of its own.
        solver: As in `partitions_by_count`.
    """
    found = partitions_by_count(costs, solver)
    return found[min(number for number in found if number >= min(classes, len(costs.layers)))]


class _Priced:
    """Solutions for one price, warm where they are not exact."""

    def __init__(
        self,
        types: Sequence[ClassCosts],
        classes: int | None,
        solver: Solver,
        fixed: Sequence[Partition] | None,
    ) -> None:
        self.types, self.classes, self.solver, self.fixed = tuple(types), classes, solver, fixed
        self.last: dict[int, Partition] = {}

    def exact(self) -> bool:
        return self.fixed is not None or all(
            is_exact(self.solver, len(costs.layers)) for costs in self.types
        )

    def solve(self, price: float) -> Solution:
        parts = []
        for index, costs in enumerate(self.types):
            found = self._partition(index, costs, price)
            picks = [costs.offers(members).best(price) for members in found]
            parts.append(colored(costs, found, picks))
        return Solution(tuple(parts))

    def _partition(self, index: int, costs: ClassCosts, price: float) -> Partition:
        def value(members: Classes) -> float:
            return costs.offers(members).value(price)

        if self.fixed is not None:
            return self.fixed[index]
        count = len(costs.layers)
        if is_exact(self.solver, count):
            if self.classes is None:
                return best_partition(count, value)
            found = best_partitions(count, value)
            return found[min(n for n in found if n >= min(self.classes, count))]
        starts = [agglomerate(count, value)]
        if index in self.last:
            starts.append({len(self.last[index]): self.last[index]})
        tried = [
            refine(partition, value, keep_count=self.classes is not None)
            for start in starts
            for partition in _promising(start, value, self.classes)
        ]
        self.last[index] = min(tried, key=lambda found: partition_cost(found, value))
        return self.last[index]


def _promising(
    found: dict[int, Partition], value: ClassCost, classes: int | None
) -> list[Partition]:
    if classes is not None:
        return [found[min((n for n in found if n >= classes), default=max(found))]]
    return [min(found.values(), key=lambda p: partition_cost(p, value))]


def colored(costs: ClassCosts, classes: Partition, picks: Sequence[int]) -> Colored:
    """A partition with its offers, added up."""
    pairs = [(costs.offers(members), pick) for members, pick in zip(classes, picks, strict=True)]
    cost = math.fsum(float(offers.costs[pick]) for offers, pick in pairs)
    parameters = sum(int(offers.parameters[pick]) for offers, pick in pairs)
    return Colored(classes, tuple(picks), cost, parameters)


def color_by_budget(
    types: Sequence[ClassCosts],
    budget: float,
    *,
    classes: int | None = None,
    solver: Solver = "auto",
    fixed: Sequence[Partition] | None = None,
) -> Solution | None:
    """The cheapest colouring of all types within a number of parameters.

    Args:
        types: Costs of each.
        budget: The most parameters of all layers together.
        classes: Exactly so many of each type, if given.
        solver: How partitions are found.
        fixed: The partition of each type, if just their offers are to be chosen.

    Returns:
        None if even the smallest colouring is larger.
    """
    if classes is None and fixed is None and all(type(costs) is TiedCosts for costs in types):
        return _by_fronts(types, budget, solver)
    priced = _Priced(types, classes, solver, fixed)
    free = priced.solve(0.0)
    if free.parameters <= budget:
        return Solution(free.types, free.cost if priced.exact() else None)
    low, high = 0.0, _high_price(types)
    best = priced.solve(high)
    if best.parameters > budget:
        return None
    bound = -math.inf
    for _ in range(_HALVINGS):
        # Prices spread over many orders of magnitude.
        middle = math.sqrt(low * high) if low else high * 1e-3
        found = priced.solve(middle)
        bound = max(bound, found.cost + middle * (found.parameters - budget))
        if found.parameters <= budget:
            high = middle
            best = found if found.cost <= best.cost else best
        else:
            low = middle
        if low and high / low < 1 + 1e-6:
            break
    spent = _spend(types, best, budget)
    return Solution(spent.types, bound if priced.exact() else None)


def _high_price(types: Sequence[ClassCosts]) -> float:
    """At which everything is as small as it can be."""
    whole = sum(layer.energy for costs in types for layer in costs.layers)
    return max(whole, 1e-300) * 1e3


def _spend(types: Sequence[ClassCosts], solution: Solution, budget: float) -> Solution:
    """Better offers for what is left of a budget, by what they save per parameter."""
    picks = [list(part.picks) for part in solution.types]
    left = budget - solution.parameters
    while True:
        best, chosen = 0.0, None
        for i, (costs, part) in enumerate(zip(types, solution.types, strict=True)):
            for j, members in enumerate(part.classes):
                offers, now = costs.offers(members), picks[i][j]
                more = offers.parameters - offers.parameters[now]
                less = offers.costs[now] - offers.costs
                gain = (less / more.clamp_min(1)).where(
                    (more > 0) & (more <= left), less.new_zeros(())
                )
                place = int(gain.argmax())
                if float(gain[place]) > best:
                    best, chosen = float(gain[place]), (i, j, place, float(more[place]))
        if chosen is None:
            break
        i, j, place, used = chosen
        picks[i][j] = place
        left -= used
    parts = zip(types, solution.types, picks, strict=True)
    return Solution(tuple(colored(costs, part.classes, pick) for costs, part, pick in parts))


def _by_fronts(types: Sequence[ClassCosts], budget: float, solver: Solver) -> Solution | None:
    """Exact over numbers of classes: all sums of types' sizes, without those that others beat."""
    # (parameters, cost, number of classes of each type so far)
    front: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
    tables = []
    for costs in types:
        table = {
            number: colored(costs, found, [0] * len(found))
            for number, found in partitions_by_count(costs, solver).items()
        }
        tables.append(table)
        sums = sorted(
            (size + part.parameters, cost + part.cost, (*numbers, number))
            for size, cost, numbers in front
            for number, part in table.items()
            if size + part.parameters <= budget and part.cost < math.inf
        )
        front = []
        for entry in sums:
            if not front or entry[1] < front[-1][1]:
                front.append(entry)
    if not front:
        return None
    _, cost, numbers = front[-1]
    exact = all(is_exact(solver, len(costs.layers)) for costs in types)
    parts = tuple(table[number] for table, number in zip(tables, numbers, strict=True))
    return Solution(parts, cost if exact else None)
