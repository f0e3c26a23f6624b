"""Scales of hidden units that an expert takes back itself, brought to one size.

If the value rows of a gated expert are times s and its down columns by s, it computes the same;
so does a ReLU expert whose rows and biases are times s > 0. A permutation alone cannot tell that
two experts differ in no more than that. Which slices may be scaled is read off the graph: each
slice of what writes the units is given a degree of homogeneity, 1 or 0, degrees are followed
through the ops of the expert, and what reads the units has to see degree 1. Source: own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.ir.axes import AxisMap, AxisTerms
from torchlathe.passes.analysis.constants import op_name
from torchlathe.passes.analysis.expert_ops import CONTRACTING, GROUPED
from torchlathe.passes.analysis.experts import ExpertLayer, HiddenUnits
from torchlathe.passes.rewrite.erasing.units import unit_indices

__all__ = ["Slot", "reading_tensors", "scalable_slots"]

# A tensor of an expert, and which of the copies of the units on its axis: gate rows, value rows.
Slot: TypeAlias = tuple[str, int]
_Degrees: TypeAlias = tuple[int, ...]

_MOVING = frozenset(
    (
        *("view", "reshape", "squeeze", "unsqueeze", "to", "_to_copy", "contiguous", "clone"),
        *("alias", "detach", "transpose", "permute", "index", "chunk", "split"),
        *("split_with_sizes", "dropout"),
    )
)
# f(s x) = s f(x) for s > 0
_HOMOGENEOUS = frozenset({"relu", "leaky_relu", "abs", "neg"})
_MOST_SLOTS = 6


def reading_tensors(axis_map: AxisMap, layer: ExpertLayer, hidden: HiddenUnits) -> frozenset[str]:
    """Tensors of which a product sums over the units; the others write them."""
    found = set()
    for read in layer.reads:
        node = read.node
        while op_name(node) not in CONTRACTING | GROUPED and len(node.users) == 1:
            node = next(iter(node.users))
        left = {a.number for t in axis_map.terms(node) for a in axis_map.atoms_of(t)}
        if op_name(node) in CONTRACTING | GROUPED and hidden.atom.number not in left:
            found.add(read.tensor)
    # A bias is added to a product, and the product that comes next sums over its units too.
    return frozenset(name for name in found if _matrix(layer, name))


def _matrix(layer: ExpertLayer, name: str) -> bool:
    return any(
        r.tensor == name and (r.grouped or r.node.meta["val"].dim() >= 3) for r in layer.reads
    )


def scalable_slots(
    program: Program, layer: ExpertLayer, hidden: HiddenUnits, readers: Iterable[str]
) -> frozenset[Slot] | None:
    """What may be scaled by a positive number per unit if its readers are divided by it.

    Args:
        program: Of the layer.
        layer: Whose experts have the units.
        hidden: The units.
        readers: The tensors that read the units; the others write them.

    Returns:
        The smallest set of slices, or None if there is none that the graph shows.
    """
    walk = _Walk(program.analysis(AxisTerms), program, layer, hidden, frozenset(readers))
    slots = [
        (name, copy)
        for name, _ in hidden.places
        if name not in walk.readers
        for copy in range(walk.copies(program.tensor_nodes[name]))
    ]
    if len(slots) > _MOST_SLOTS:
        return None
    for count in range(1, len(slots) + 1):
        for chosen in itertools.combinations(slots, count):
            if walk.fits(frozenset(chosen)):
                return frozenset(chosen)
    return None


@dataclass(frozen=True)
class _Walk:
    """Degrees of what lies between the writers and the readers of units."""

    axis_map: AxisMap
    program: Program
    layer: ExpertLayer
    hidden: HiddenUnits
    readers: frozenset[str]

    def copies(self, node: fx.Node, result: int = 0) -> int:
        """How often the units lie end to end on an axis of a node; 0 if they lie otherwise."""
        units = int(self.hidden.atom.extent)
        number = self.hidden.atom.number
        for term in self.axis_map.results(node)[result] or ():
            if any(a.number == number for a in self.axis_map.atoms_of(term)):
                owner = unit_indices(term, number)
                blocks = owner.reshape(-1, units) if len(owner) % units == 0 else owner[:0, None]
                if len(blocks) and bool((blocks == torch.arange(units)).all()):
                    return len(blocks)
                return 0
        return 0

    def fits(self, chosen: frozenset[Slot]) -> bool:
        """Whether the readers see every unit at degree 1 if these slices have degree 1."""
        reads = {read.node: read.tensor for read in self.layer.reads}
        known: dict[fx.Node, _Degrees] = {}
        reading: set[fx.Node] = set()
        seen = False
        for node in self.program.graph.nodes:
            inputs = [known[used] for used in node.all_input_nodes if used in known]
            reads_units = reads.get(node) in self.readers or any(
                used in reading for used in node.all_input_nodes
            )
            if reads_units and not inputs:
                if op_name(node) in _MOVING:
                    reading.add(node)
                continue
            if reads_units:
                if any(degree != 1 for degrees in inputs for degree in degrees):
                    return False
                seen = True
                continue
            if node in reads and reads[node] not in self.readers:
                name = reads[node]
                copies = self.copies(self.program.tensor_nodes[name])
                if copies:
                    known[node] = tuple(int((name, c) in chosen) for c in range(copies))
            elif inputs:
                found = self._degrees(node, inputs)
                if found is None:
                    return False
                known[node] = found
        return seen

    def _degrees(self, node: fx.Node, inputs: Sequence[_Degrees]) -> _Degrees | None:
        """Degrees of what an op gives; None if it has none."""
        name = op_name(node)
        first = inputs[0]
        if name == "getitem":
            return self._piece(node, first)
        if name in _MOVING | _HOMOGENEOUS | GROUPED | CONTRACTING and len(inputs) == 1:
            kept = name in ("chunk", "split", "split_with_sizes")
            return first if kept or self.copies(node) == len(first) else None
        if any(len(degrees) != len(first) for degrees in inputs):
            return None
        if name == "mul":
            twice = len(inputs) == 1 and len([a for a in node.args if a is node.args[0]]) == 2
            return tuple(map(sum, zip(*inputs, *(inputs if twice else ()), strict=True)))
        others = [a for a in node.args[:2] if not isinstance(a, fx.Node)]
        if name in ("add", "sub") and len(inputs) == 2 and not others and len(set(inputs)) == 1:
            return first
        if any(degree for degrees in inputs for degree in degrees):
            return None
        return first

    def _piece(self, node: fx.Node, degrees: _Degrees) -> _Degrees | None:
        """Of a node with several results that cut the copies evenly."""
        source = node.args[0]
        place = node.args[1]
        assert isinstance(source, fx.Node)
        assert isinstance(place, int)
        value = source.meta["val"]
        each = [self.copies(source, i) for i in range(len(value))]
        if sum(each) != len(degrees) or not all(each):
            return None
        start = sum(each[:place])
        return degrees[start : start + each[place]]
