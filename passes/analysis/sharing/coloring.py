"""Which layers share a parameter: a colouring of the layers of a program, of least cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from torchlathe.ir import PreconditionError, Program
from torchlathe.passes.analysis.sharing.alignment import Gauge, align_layers
from torchlathe.passes.analysis.sharing.bases import BasisLayer, stacked
from torchlathe.passes.analysis.sharing.budgets import (
    Colored,
    Solution,
    color_by_budget,
    color_by_count,
    colored,
    is_exact,
    partitions_by_count,
)
from torchlathe.passes.analysis.sharing.candidates import (
    LayerType,
    find_candidates,
    fused_types,
    layer_types,
)
from torchlathe.passes.analysis.sharing.costs import (
    BaseCosts,
    BasisCosts,
    ClassCosts,
    TiedCosts,
    WeighedLayer,
)
from torchlathe.passes.analysis.sharing.curvature import (
    Curvature,
    InputCurvature,
    KroneckerCurvature,
)
from torchlathe.passes.analysis.sharing.options import SharingOptions
from torchlathe.passes.analysis.sharing.partitions import (
    EXACT_LIMIT,
    Classes,
    Partition,
    best_partitions,
    color_conflicts,
    ordered,
)
from torchlathe.passes.analysis.sharing.weighing import (
    OF_THE_LOSS,
    element_curvature,
    loss_analysis,
    weigh_layers,
)
from torchlathe.passes.base import DataAnalysis, PassContext
from torchlathe.passes.statistics.running import need_data

if TYPE_CHECKING:
    import networkx

__all__ = ["ColoredType", "Coloring", "SharedClass", "SharingColoring", "class_costs", "form_of"]


# Layers of one type, 3^16 = 43 million steps: some minutes for each number of classes.
_TOO_MANY = 16


@dataclass(frozen=True)
class SharedClass:
    """Layers that share.

    Attributes:
        layers: Names of their weights; a single one shares with nobody.
        rank: Of the basis, or of the private corrections; 0 for weights in full.
        parameters: What the class stores.
        cost: Predicted loss, in the units of the curvature.
    """

    layers: tuple[str, ...]
    rank: int
    parameters: int
    cost: float


@dataclass(frozen=True, eq=False)
class ColoredType:
    """The classes of one type of layers.

    Attributes:
        name: Of the type.
        layers: Names of all weights.
        classes: By their first layer.
        pair_costs: What one weight for each two layers would cost, (layers, layers) float64,
            infinite on the diagonal and for unequal shapes; None for shared bases.
        gap: How much of the cost another partition into as many classes could save, as a share;
            None where that is not known.
    """

    name: str
    layers: tuple[str, ...]
    classes: tuple[SharedClass, ...]
    pair_costs: torch.Tensor | None
    gap: float | None

    @property
    def cost(self) -> float:
        """Predicted loss."""
        return math.fsum(part.cost for part in self.classes)

    @property
    def parameters(self) -> int:
        """What the type stores."""
        return sum(part.parameters for part in self.classes)


@dataclass(frozen=True, eq=False)
class Coloring:
    """Which layers share what.

    Attributes:
        mode: "tied", "basis" or "base".
        types: Of layers.
        gauge: The order of hidden units and heads in which the layers were compared.
        weighed: Weight (in that gauge) and curvature of each layer, by name.
        before: Parameters of all layers as they are.
        gap: As in `ColoredType`, for the whole, under a budget; None where it is not known.
    """

    mode: str
    types: tuple[ColoredType, ...]
    gauge: Gauge
    weighed: Mapping[str, WeighedLayer]
    before: int
    gap: float | None

    @property
    def cost(self) -> float:
        """Predicted loss."""
        return math.fsum(part.cost for part in self.types)

    @property
    def parameters(self) -> int:
        """What all layers store together."""
        return sum(part.parameters for part in self.types)

    def __iter__(self) -> Any:
        return (one for part in self.types for one in part.classes)

    def class_of(self, name: str) -> SharedClass:
        """The class of a weight.

        Raises:
            KeyError: It is in none.
        """
        for one in self:
            if name in one.layers:
                return one  # type: ignore[no-any-return]
        raise KeyError(name)

    def to_networkx(self) -> networkx.Graph[str]:
        """Layers, with an edge between those that share; nodes have ``type`` and ``color``."""
        import networkx

        graph: networkx.Graph[str] = networkx.Graph()
        for part in self.types:
            for color, one in enumerate(part.classes):
                for i, layer in enumerate(one.layers):
                    graph.add_node(layer, type=part.name, color=color)
                    graph.add_edges_from((layer, other) for other in one.layers[:i])
        return graph

    def to_dict(self) -> dict[str, Any]:
        """Types and classes as JSON takes them."""
        return {
            "mode": self.mode,
            "types": [
                {
                    "name": part.name,
                    "layers": list(part.layers),
                    "classes": [
                        {"layers": list(one.layers), "rank": one.rank, "cost": one.cost}
                        for one in part.classes
                    ],
                }
                for part in self.types
            ],
        }


@dataclass(frozen=True)
class SharingColoring(SharingOptions, DataAnalysis[Coloring]):
    """Finds the classes of layers that lose least by sharing a parameter.

    Source: own reconstruction of the colouring of Geo-Sharing (arXiv 2511.06786): a map from
    layers to classes of least predicted loss, by second-order costs in a common gauge.
    """

    name: ClassVar[str] = "sharing-coloring"

    @classmethod
    def of(cls, options: SharingOptions) -> SharingColoring:
        """With the options of another pass."""
        return cls(**{f.name: getattr(options, f.name) for f in fields(SharingOptions)})

    def check(self, program: Program, ctx: PassContext) -> None:
        """Refuse a curvature of a loss where there is none.

        Raises:
            PreconditionError: No loss was given, and the model has none of its own.
        """
        if self.curvature in OF_THE_LOSS:
            loss_analysis(self.curvature).check(program, ctx)

    def compute_with(self, program: Program, ctx: PassContext) -> Coloring:
        """Align the layers, weigh them, and find the classes."""
        candidates = [c for c in find_candidates(program) if c.splits or self.mode == "tied"]
        types = layer_types(candidates, self.across, self.include, self.exclude, where=self.name)
        names = [layer.name for part in types for layer in part.layers]
        if not names:
            raise PreconditionError(
                "there is no layer whose weight could be shared",
                hint="linear layers and convolutions without groups can share",
            )
        if self.solver == "exact" and max(map(len, types)) > _TOO_MANY:
            raise PreconditionError(
                f"solver=exact looks at every partition, and a type has {max(map(len, types))} "
                f"layers, more than {_TOO_MANY}",
                where=self.name,
                hint="leave the solver out, or let fewer layers share (include, exclude)",
            )
        if self.curvature != "none":
            need_data(ctx, "it says what a change of a weight costs")
        ctx.report("sharing: curvature of the layers")
        layers = [layer for layer in candidates if layer.name in set(names)]
        weighed = weigh_layers(program, ctx, layers, self.curvature)
        gauge = Gauge({}, {})
        if self.align:
            ctx.report("sharing: aligning hidden units and heads")
            shared = [layer.name for part in types if len(part) > 1 for layer in part.layers]
            known = {} if self.curvature == "none" else element_curvature(layers, weighed)
            gauge = align_layers(program, shared, curvature=known)
        if gauge.tensors:
            aligned = in_gauge(program, gauge)
            layers = [layer for layer in find_candidates(aligned) if layer.name in set(names)]
            ctx.report("sharing: curvature of the aligned layers")
            weighed = weigh_layers(aligned, ctx, layers, self.curvature)
        ctx.report("sharing: classes")
        chosen, costs, solution = self._best(program, types, weighed, ctx)
        found = [
            self._type(part, each, one)
            for part, each, one in zip(chosen, costs, solution.types, strict=True)
        ]
        before = sum(layer.size for layer in layers)
        return Coloring(self.mode, tuple(found), gauge, weighed, before, solution.gap)

    def same(self, a: Coloring, b: Coloring) -> bool:
        """The same classes."""
        return a.to_dict() == b.to_dict()

    def statistics(self, result: Coloring) -> dict[str, int | float]:
        """Counts of layers and classes, and what they cost."""
        found: dict[str, int | float] = {
            "types": len(result.types),
            "layers": sum(len(part.layers) for part in result.types),
            "classes": sum(1 for _ in result),
            "layer_parameters": result.before,
            "shared_parameters": result.parameters,
            "cost": result.cost,
        }
        if result.gap is not None:
            found["gap"] = result.gap
        return found

    def _best(
        self,
        program: Program,
        types: Sequence[LayerType],
        weighed: Mapping[str, WeighedLayer],
        ctx: PassContext,
    ) -> tuple[Sequence[LayerType], list[ClassCosts], Solution]:
        """The cheapest colouring, of the layers or with those that read one value as one."""
        choices = [types]
        if self.mode == "basis" and self.across == "role":
            fused = fused_types(types)
            choices += [fused] if len(fused) < len(types) else []
        known: dict[str, ClassCosts] = {}
        tried = []
        for choice in choices:
            for part in choice:
                if part.name not in known:
                    known[part.name] = class_costs(self, part, weighed, ctx.report)
            costs = [known[part.name] for part in choice]
            solution = self._solve(program, costs)
            if solution is not None:
                tried.append((choice, costs, solution))
        if not tried:
            raise PreconditionError(
                f"params={self.params} is less than the layers that may share can do with",
                hint="keep more, or let more layers share (include, across)",
            )
        return min(tried, key=lambda one: one[2].cost)

    def _solve(self, program: Program, costs: Sequence[ClassCosts]) -> Solution | None:
        budget = self.budget
        if budget is None:
            parts = []
            for each in costs:
                if self.theta is not None:
                    found = by_theta(each, self.theta)
                else:
                    found = color_by_count(each, self.classes or 2, self.solver)
                parts.append(colored(each, found, [0] * len(found)))
            return Solution(tuple(parts))
        whole = sum(tensor.numel() for tensor in program.parameters.values())
        layers = sum(layer.size for each in costs for layer in each.layers)
        allowed = budget.of(whole) - (whole - layers)
        return color_by_budget(costs, allowed, classes=self.classes, solver=self.solver)

    def _type(self, part: LayerType, costs: ClassCosts, found: Colored) -> ColoredType:
        names = [[layer.name for layer in member] for member in part.members]
        classes = []
        for members, pick in zip(found.classes, found.picks, strict=True):
            offers = costs.offers(members)
            classes.append(
                SharedClass(
                    tuple(name for i in sorted(members) for name in names[i]),
                    int(offers.ranks[pick]) if len(members) > 1 or self.mode == "basis" else 0,
                    int(offers.parameters[pick]),
                    float(offers.costs[pick]),
                )
            )
        gap, pairs = None, None
        if self.mode != "basis":
            # Under theta the classes of many layers come from the graph of conflicts.
            exact = is_exact("auto" if self.theta is not None else self.solver, len(names))
            gap = 0.0 if exact else known_gap(costs, found.classes)
            pairs = torch.full((len(names), len(names)), math.inf, dtype=torch.float64)
            for (i, j), cost in costs.pair_costs().items():
                pairs[i, j] = pairs[j, i] = cost
        layers = tuple(layer.name for layer in part.layers)
        return ColoredType(part.name, layers, tuple(classes), pairs, gap)


def class_costs(
    options: SharingOptions,
    part: LayerType,
    weighed: Mapping[str, WeighedLayer],
    report: Callable[[str], object] | None = None,
) -> ClassCosts:
    """What classes of one type cost, in the mode of sharing that the options say.

    Args:
        options: The mode, the rank of corrections, and limits.
        part: The type.
        weighed: Weight and curvature of its layers.
        report: Called with a line of text about what is being done.
    """
    layers = [_as_one([weighed[layer.name] for layer in member]) for member in part.members]
    if options.mode == "basis":
        return BasisCosts(layers, report)
    if options.mode == "base":
        return BaseCosts(layers, options.rank, options.limits)
    return TiedCosts(layers, options.limits)


def _as_one(layers: Sequence[WeighedLayer]) -> WeighedLayer:
    """Layers that read one value, for a basis that they share in any case."""
    if len(layers) == 1:
        return layers[0]
    basis = stacked([layer.basis for layer in layers if layer.basis is not None])
    return WeighedLayer(basis.weight, form_of(basis), basis)


def form_of(basis: BasisLayer) -> Curvature:
    """The curvature that a basis is fitted under, as a form on the weight."""
    if basis.outputs is None:
        return InputCurvature(basis.inputs)
    return KroneckerCurvature(((basis.outputs, basis.inputs),))


def in_gauge(program: Program, gauge: Gauge) -> Program:
    """A copy of a program with its tensors in another gauge."""
    if not gauge.tensors:
        return program
    copy = program.copy()
    with copy.edit() as edit:
        for name, tensor in gauge.tensors.items():
            edit.set_tensor(name, tensor)
    return copy


def by_theta(costs: ClassCosts, theta: float) -> Partition:
    """The fewest classes in which no pair costs more than theta; the cheapest of these if few."""
    count = len(costs.layers)
    pairs = costs.pair_costs()
    if count > EXACT_LIMIT:
        return _within_limits(costs, color_conflicts(_allowed(costs, pairs), count, theta))

    def cost(members: Classes) -> float:
        inside = sorted(members)
        if any(pairs[i, j] > theta for n, j in enumerate(inside) for i in inside[:n]):
            return math.inf
        return float(costs.offers(members).costs.min())

    found = best_partitions(count, cost)
    return found[min(found)]


def _allowed(
    costs: ClassCosts, pairs: Mapping[tuple[int, int], float]
) -> dict[tuple[int, int], float]:
    """Costs of pairs, infinite for those that break a limit."""
    return {
        pair: cost if float(costs.offers(frozenset(pair)).costs.min()) < math.inf else math.inf
        for pair, cost in pairs.items()
    }


def _within_limits(costs: ClassCosts, found: Partition) -> Partition:
    """A partition in which the layers of a class that breaks a limit are by themselves."""
    parts: list[Classes] = []
    for members in found:
        fits = float(costs.offers(members).costs.min()) < math.inf
        parts += [members] if fits else [frozenset([i]) for i in members]
    return ordered(parts)


def known_gap(costs: ClassCosts, found: Partition) -> float | None:
    """How much of a partition's cost the best one of as many classes saves."""
    if len(costs.layers) > EXACT_LIMIT:
        return None

    def total(partition: Partition) -> float:
        return math.fsum(float(costs.offers(members).costs.min()) for members in partition)

    best = partitions_by_count(costs, "exact").get(len(found), found)
    mine = total(found)
    return max(0.0, 1 - total(best) / mine) if mine > 0 else 0.0
