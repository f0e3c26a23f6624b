"""Bringing layers to one gauge before they are compared: permutations of hidden units and heads.

A family of the axis terms that nothing pins is a symmetry: its units can be put in any order, in
all tensors that own slices of it at once, and the model computes the same. Families that own the
same slices of corresponding layers (their tensors' names are equal but for numbers) are aligned
with each other: the pair of layers that agrees best first, along a maximum spanning tree, so that
copies of one template meet each other and not a third layer.

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
from torchlathe.passes.analysis.gauge import balanced_scales, match_units
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


def align_layers(program: Program, weights: Sequence[str], *, scales: bool = True) -> Gauge:
    """Align all corresponding families of some layers.

    Args:
        program: The program; it is only read.
        weights: Names of the layers' weights.
        scales: Whether to balance the scales of ReLU units first.
    """
    families = program.analysis(ZeroInvariantGroups)
    groups = list(corresponding_families(program, families, weights))
    work = _Work(program, families)
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

    def __init__(self, program: Program, families: Families) -> None:
        self.program = program
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

    def units(self, family: Family) -> list[torch.Tensor]:
        """What each unit owns of each parameter: (units, elements), parameters by role."""
        found = []
        for part in sorted(family.slices, key=lambda p: (role_of(p.name), p.axis)):
            if part.kind is TensorKind.PARAMETER:
                rows = self.get(part.name).movedim(part.axis, 0)
                places = self._places(family, part.name, part.axis)
                found.append(rows[places].reshape(family.extent, -1).double())
        return found

    def balance(self, family: Family) -> None:
        """Give writers and readers of each unit one length."""
        writers = [self._rows(p.name, p.axis) for p in family.writers]
        readers = [self._rows(p.name, p.axis) for p in family.readers]
        scales = balanced_scales(writers, readers)
        for part in family.slices:
            tensor = self.get(part.name)
            shape = [-1 if axis == part.axis else 1 for axis in range(tensor.dim())]
            factor = scales if part.writes else 1 / scales
            self.tensors[part.name] = (tensor.double() * factor.reshape(shape)).to(tensor.dtype)
        self.scaled.append(family.name)

    def align(self, group: Sequence[Family]) -> bool:
        """Permute every family but one of a group; whether anything moved."""
        owned = [self.units(family) for family in group]
        scale = [
            max(float(t.square().mean()) for t in tensors) ** 0.5 or 1.0
            for tensors in zip(*owned, strict=True)
        ]
        # Without this, the tensor of the largest numbers would decide alone.
        owned = [[t / s for t, s in zip(tensors, scale, strict=True)] for tensors in owned]
        moved = False
        key = group[0].name
        if key not in self.trees:  # finding it takes a match for every pair
            self.trees[key] = _tree(owned)
        for parent, child in self.trees[key]:
            order = match_units(owned[parent], owned[child])
            if torch.equal(order, torch.arange(len(order))):
                continue
            owned[child] = [tensor[order] for tensor in owned[child]]
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
        before = self.orders.get(family.name, torch.arange(len(order)))
        self.orders[family.name] = before[order]

    def _rows(self, name: str, axis: int) -> torch.Tensor:
        return self.get(name).movedim(axis, 0)

    def _places(self, family: Family, name: str, axis: int) -> torch.Tensor:
        term = self.terms.terms(self.nodes[name])[axis]
        return unit_places(term, family.atom.number, family.extent)


def _tree(owned: Sequence[Sequence[torch.Tensor]]) -> list[tuple[int, int]]:
    """(parent, child) along the maximum spanning tree of agreement, grown from the best pair."""
    count = len(owned)
    norms = [float(sum(t.square().sum() for t in tensors)) ** 0.5 or 1.0 for tensors in owned]
    agreement = torch.full((count, count), -torch.inf, dtype=torch.float64)
    for i in range(count):
        for j in range(i + 1, count):
            order = match_units(owned[i], owned[j])
            pairs = zip(owned[i], owned[j], strict=True)
            inner = sum(float((a * b[order]).sum()) for a, b in pairs)
            agreement[i, j] = agreement[j, i] = inner / (norms[i] * norms[j])
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
