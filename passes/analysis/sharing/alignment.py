"""Bringing layers to one gauge before they are compared: permutations of hidden units and heads.

A family of the axis terms that nothing pins is a symmetry: its units can be put in any order, in
all tensors that own slices of it at once, and the model computes the same. Families that own the
same slices of corresponding layers (their tensors' names are equal but for numbers) are aligned
with each other: the pair of layers that agrees best first, along a maximum spanning tree, so that
copies of one template meet each other and not a third layer.

Where the curvature is known, units are matched by what it costs to merge them.

Source: own; each match is that of Git Re-Basin (arXiv 2209.04836), see
`torchlathe.passes.analysis.gauge`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from torchlathe.ir import Program, TensorKind
from torchlathe.ir.axes import AxisTerms, Term
from torchlathe.passes.analysis.families import Families, Family, ZeroInvariantGroups
from torchlathe.passes.analysis.gauge import balanced_scales, match_units, merging_costs
from torchlathe.passes.analysis.sharing.candidates import role_of
from torchlathe.passes.rewrite.erasing.units import unit_indices

__all__ = ["Gauge", "align_layers", "corresponding_families", "unit_places"]

# Families of one tensor (heads, and dimensions in them) depend on each other's order.
_ROUNDS = 3

aten = torch.ops.aten
# Through these a positive factor of a unit passes unchanged.
_HOMOGENEOUS = frozenset(
    {
        aten.relu.default,
        aten.leaky_relu.default,
        aten.dropout.default,
        aten.view.default,
        aten.reshape.default,
        aten.permute.default,
        aten.transpose.int,
        aten.contiguous.default,
        aten.clone.default,
    }
)
_LAYERS = frozenset({aten.linear.default, aten.conv1d.default, aten.conv2d.default})


@dataclass(frozen=True, eq=False)
class Gauge:
    """Tensors in another gauge, in which the model computes what it did.

    Attributes:
        tensors: The tensors that changed, by name.
        permuted: Per family whose units changed places, the permutation.
        scaled: Families whose units were scaled.
    """

    tensors: Mapping[str, torch.Tensor]
    permuted: Mapping[str, torch.Tensor]
    scaled: tuple[str, ...] = ()

    def get(self, program: Program, name: str) -> torch.Tensor:
        """A tensor in this gauge."""
        found = self.tensors.get(name)
        return program.tensor(name) if found is None else found


def unit_places(term: Term, number: int, extent: int) -> torch.Tensor:
    """Where each unit of an atom is on an axis.

    Args:
        term: Of the axis.
        number: Of the atom.
        extent: How many units it has.

    Returns:
        Shape (units, indices per unit) int64.
    """
    owner = unit_indices(term, number)
    order = torch.argsort(owner, stable=True)
    order = order[int((owner < 0).sum()) :]
    return order.reshape(extent, -1)


def corresponding_families(
    program: Program, families: Families, weights: Sequence[str]
) -> Iterator[tuple[Family, ...]]:
    """Groups of free families that own the same slices of corresponding layers.

    Args:
        program: The program.
        families: Its families.
        weights: Only families that own slices of these are of interest.
    """
    wanted = set(weights)
    groups: dict[tuple[object, ...], list[Family]] = {}
    for family in families.prunable:
        owned = {part.name for part in family.slices}
        if not owned & wanted:
            continue
        # Layers that share one family already have one gauge.
        if len({role_of(name) for name in owned}) < len(owned):
            continue
        parts = sorted(
            (role_of(p.name), p.axis, p.repeat, p.writes, tuple(program.tensor(p.name).shape))
            for p in family.slices
        )
        groups.setdefault((family.extent, *parts), []).append(family)
    for members in groups.values():
        if len(members) > 1:
            yield tuple(members)


def align_layers(
    program: Program,
    weights: Sequence[str],
    *,
    scales: bool = True,
    curvature: Mapping[str, torch.Tensor] | None = None,
) -> Gauge:
    """Align all corresponding families of some layers.

    Args:
        program: The program; it is only read.
        weights: Names of the layers' weights.
        scales: Whether to balance the scales of ReLU units first.
        curvature: Of some tensors, by name and element, to weigh distances by; by default all
            tensors count the same.
    """
    families = program.analysis(ZeroInvariantGroups)
    groups = list(corresponding_families(program, families, weights))
    work = _Work(program, families, curvature or {})
    if scales:
        for group in groups:
            if all(_homogeneous(program, families, family) for family in group):
                for family in group:
                    work.balance(family)
    for _ in range(_ROUNDS):
        if not any([work.align(group) for group in groups]):
            break
    return work.gauge()


def _homogeneous(program: Program, families: Families, family: Family) -> bool:
    """Whether units of a family are only written by layers, passed through ReLU, and read."""
    if any(part.kind is not TensorKind.PARAMETER for part in family.slices):
        return False
    if any(part.repeat != 1 for part in family.slices) or not family.readers:
        return False
    nodes: list[fx.Node] = families.index.touching.get(family.atom.number, [])
    calls = [node for node in nodes if node.op == "call_function"]
    passing = [node for node in calls if node.target not in _LAYERS]
    relus = [node for node in passing if node.target is not aten.relu.default]
    return len(relus) < len(passing) and all(node.target in _HOMOGENEOUS for node in passing)


class _Work:
    """Tensors on their way to one gauge."""

    def __init__(
        self, program: Program, families: Families, curvature: Mapping[str, torch.Tensor]
    ) -> None:
        self.program = program
        self.curvature = dict(curvature)
        self.terms = program.analysis(AxisTerms)
        self.nodes = program.tensor_nodes
        self.families = families
        self.tensors: dict[str, torch.Tensor] = {}
        self.orders: dict[str, torch.Tensor] = {}
        self.scaled: list[str] = []
        self.trees: dict[str, list[tuple[int, int]]] = {}

    def gauge(self) -> Gauge:
        """What came of it."""
        moved = {
            name: order
            for name, order in self.orders.items()
            if not torch.equal(order, torch.arange(len(order)))
        }
        return Gauge(self.tensors, moved, tuple(self.scaled))

    def get(self, name: str) -> torch.Tensor:
        """A tensor as it is by now."""
        found = self.tensors.get(name)
        return self.program.tensor(name).detach() if found is None else found

    def units(self, family: Family) -> _Units:
        """What each unit owns of each parameter, parameters by role."""
        tensors: list[torch.Tensor] = []
        curvatures: list[torch.Tensor | None] = []
        for part in sorted(family.slices, key=lambda p: (role_of(p.name), p.axis)):
            if part.kind is TensorKind.PARAMETER:
                places = self._places(family, part.name, part.axis)
                tensors.append(_by_unit(self.get(part.name), part.axis, places))
                known = self.curvature.get(part.name)
                curvatures.append(None if known is None else _by_unit(known, part.axis, places))
        return _Units(tensors, curvatures)

    def balance(self, family: Family) -> None:
        """Give writers and readers of each unit one length."""
        writers = [self._rows(p.name, p.axis) for p in family.writers]
        readers = [self._rows(p.name, p.axis) for p in family.readers]
        scales = balanced_scales(writers, readers)
        for part in family.slices:
            tensor = self.get(part.name)
            shape = [-1 if axis == part.axis else 1 for axis in range(tensor.dim())]
            factor = scales if part.writes else 1 / scales
            factor = factor.reshape(shape)
            self.tensors[part.name] = (tensor.double() * factor).to(tensor.dtype)
            if part.name in self.curvature:
                self.curvature[part.name] = self.curvature[part.name] / factor.square()
        self.scaled.append(family.name)

    def align(self, group: Sequence[Family]) -> bool:
        """Permute every family but one of a group; whether anything moved."""
        owned = [self.units(family) for family in group]
        for each in owned:
            each.weigh(owned)
        moved = False
        key = group[0].name
        if key not in self.trees:  # finding it takes a match for every pair
            self.trees[key] = _tree(owned)
        for parent, child in self.trees[key]:
            order = owned[parent].match(owned[child])
            if torch.equal(order, torch.arange(len(order))):
                continue
            owned[child].permute(order)
            self.permute(group[child], order)
            moved = True
        return moved

    def permute(self, family: Family, order: torch.Tensor) -> None:
        """Put unit ``order[i]`` in the place of unit i, wherever the family has slices."""
        for part in family.slices:
            places = self._places(family, part.name, part.axis)
            tensor = self.get(part.name)
            index = torch.arange(tensor.shape[part.axis])
            index[places.flatten()] = places[order].flatten()
            self.tensors[part.name] = tensor.index_select(part.axis, index.to(tensor.device))
            if part.name in self.curvature:
                known = self.curvature[part.name]
                self.curvature[part.name] = known.index_select(part.axis, index.to(known.device))
        before = self.orders.get(family.name, torch.arange(len(order)))
        self.orders[family.name] = before[order]

    def _rows(self, name: str, axis: int) -> torch.Tensor:
        return self.get(name).movedim(axis, 0)

    def _places(self, family: Family, name: str, axis: int) -> torch.Tensor:
        term = self.terms.terms(self.nodes[name])[axis]
        return unit_places(term, family.atom.number, family.extent)


def _by_unit(tensor: torch.Tensor, axis: int, places: torch.Tensor) -> torch.Tensor:
    """Shape (units, elements) float64."""
    return tensor.movedim(axis, 0)[places].reshape(len(places), -1).double()


class _Units:
    """What each unit of a family owns, and its curvature.

    Args:
        tensors: Per parameter, (units, elements) float64.
        known: Their curvature in the same shapes, where it is known.
    """

    def __init__(self, tensors: list[torch.Tensor], known: Sequence[torch.Tensor | None]) -> None:
        self.tensors = tensors
        self.known = known
        self.curvatures: list[torch.Tensor] = []

    def weigh(self, group: Sequence[_Units]) -> None:
        """Fill in what is not known, alike in all families of a group.

        A parameter without curvature counts as much as one with it does on average; without this,
        the tensor of the largest numbers would decide alone.
        """
        sizes = [
            max(float(each.tensors[i].square().mean()) for each in group) or 1.0
            for i in range(len(self.tensors))
        ]
        kept = [i for i in range(len(sizes)) if all(e.known[i] is not None for e in group)]
        costs = [
            float((each.known[i] * each.tensors[i].square()).sum())  # type: ignore[operator]
            for i in kept
            for each in group
        ]
        each_cost = sum(costs) / len(costs) if costs else 1.0
        self.curvatures = []
        for i, (tensor, known) in enumerate(zip(self.tensors, self.known, strict=True)):
            if i in kept:
                assert known is not None
                self.curvatures.append(known.to(tensor))
            else:
                plain = (each_cost or 1.0) / (sizes[i] * tensor.numel())
                self.curvatures.append(torch.full_like(tensor, plain))

    def match(self, other: _Units) -> torch.Tensor:
        """The order of the other's units that costs least."""
        return match_units(self.tensors, other.tensors, (self.curvatures, other.curvatures))

    def permute(self, order: torch.Tensor) -> None:
        """Put unit ``order[i]`` in the place of unit i."""
        self.tensors = [tensor[order] for tensor in self.tensors]
        self.curvatures = [tensor[order] for tensor in self.curvatures]

    def cost(self, other: _Units, order: torch.Tensor) -> float:
        """Of merging with the other in an order, relative to leaving both out."""
        pairs = merging_costs(self.tensors, other.tensors, (self.curvatures, other.curvatures))
        return float(pairs[torch.arange(len(order)), order].sum()) / (self._size + other._size)

    @property
    def _size(self) -> float:
        both = zip(self.tensors, self.curvatures, strict=True)
        return sum(float((h * t.square()).sum()) for t, h in both) or 1.0


def _tree(owned: Sequence[_Units]) -> list[tuple[int, int]]:
    """(parent, child) along the tree of the least costs of merging, grown from the best pair."""
    count = len(owned)
    agreement = torch.full((count, count), -torch.inf, dtype=torch.float64)
    for i in range(count):
        for j in range(i + 1, count):
            order = owned[i].match(owned[j])
            agreement[i, j] = agreement[j, i] = -owned[i].cost(owned[j], order)
    edges: list[tuple[int, int]] = []
    # The first of the best pair is the reference of all.
    reached = [int(agreement.max(dim=1).values.argmax())]
    while len(reached) < count:
        left = [i for i in range(count) if i not in reached]
        part = agreement[reached][:, left]
        place = int(part.argmax())
        parent, child = reached[place // len(left)], left[place % len(left)]
        edges.append((parent, child))
        reached.append(child)
    return edges
