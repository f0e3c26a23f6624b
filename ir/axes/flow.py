"""Following what the erased indices of one atom hold through the graph.

The lattice has three levels: zero (or another known constant), and unknown. A family can be
erased exactly if every tensor in which the indices disappear (a contraction, a mean, a norm)
holds zeros there, or if what it holds can be made up for by a correction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from torch import fx

from torchlathe.ir.axes.inference import AxisMap
from torchlathe.ir.axes.rule import SINGULAR, UNKNOWN, Layout, Value, Values, join
from torchlathe.ir.axes.table import rule_of
from torchlathe.ir.axes.terms import Atom

__all__ = ["AtomIndex", "Flow"]

# Inputs of a node that are looked through one by one; of more, a table is made.
_FEW = 8


class AtomIndex:
    """Which nodes and axes carry which atom; built once for all flows of a program."""

    def __init__(self, axis_map: AxisMap, graph: fx.Graph) -> None:
        self.axis_map = axis_map
        # Per node and result: the atoms (by number) of each axis.
        self._axes: dict[fx.Node, list[list[frozenset[int]]]] = {}
        self.touching: dict[int, list[fx.Node]] = {}
        self._letters: dict[fx.Node, dict[str, frozenset[int]]] = {}
        self._atoms: dict[fx.Node, set[int]] = {}
        self._carriers: dict[fx.Node, dict[int, list[fx.Node]]] = {}
        cache: dict[int, frozenset[int]] = {}
        for node in graph.nodes:
            axes = []
            here: set[int] = set()
            for result in axis_map.results(node):
                row = []
                for term in result or ():
                    atoms = cache.get(id(term))
                    if atoms is None:
                        atoms = frozenset(a.number for a in axis_map.atoms_of(term))
                        cache[id(term)] = atoms
                    row.append(atoms)
                    here |= atoms
                axes.append(row)
            self._axes[node] = axes
            self._atoms[node] = here
            here = here.union(*(self._atoms[used] for used in node.all_input_nodes))
            if not axis_map.has(node):
                continue  # sizes, checks and the output have no axes to follow
            for number in here:
                self.touching.setdefault(number, []).append(node)

    def letters(self, node: fx.Node) -> dict[str, frozenset[int]]:
        """Atoms of each letter of a contraction."""
        if node not in self._letters:
            self._letters[node] = {
                name: frozenset(a.number for a in self.axis_map.atoms_of(term))
                for name, term in self.axis_map.layouts[node].letters.items()
            }
        return self._letters[node]

    def carriers(self, node: fx.Node, number: int) -> Sequence[fx.Node]:
        """The inputs of a node that carry an atom; of a concatenation mostly one of many."""
        found = self._carriers.get(node)
        if found is None:
            inputs = node.all_input_nodes
            if len(inputs) <= _FEW:
                return [used for used in inputs if number in self._atoms[used]]
            found = self._carriers[node] = {}
            for used in inputs:
                for atom in self._atoms[used]:
                    found.setdefault(atom, []).append(used)
        return found.get(number, ())

    def axes(self, node: fx.Node, result: int = 0) -> list[frozenset[int]]:
        """Atoms on each axis of one result."""
        rows = self._axes[node]
        return rows[result] if result < len(rows) else []

    def results(self, node: fx.Node) -> list[list[frozenset[int]]]:
        """Atoms on each axis of every result."""
        return self._axes[node]


@dataclass
class Flow:
    """One atom's walk through the graph, and what rules call on the way.

    Attributes:
        atom: The atom whose indices are left out.
        corrections: What has to be corrected, by node.
        folds: The constant that the erased indices hold where a contraction reads them, by node.
        losses: Why leaving the indices out changes what is computed elsewhere, by node.
        constant: Nodes that depend on the program's tensors alone, and so can be frozen: what they
            are in the full-size model is known, whatever they lose.
        frozen: Those of them that would lose something.
    """

    index: AtomIndex
    atom: Atom
    corrections: dict[fx.Node, str] = field(default_factory=dict)
    folds: dict[fx.Node, float] = field(default_factory=dict)
    losses: dict[fx.Node, str] = field(default_factory=dict)
    constant: AbstractSet[fx.Node] = frozenset()
    frozen: set[fx.Node] = field(default_factory=set)
    _values: dict[fx.Node, Values] = field(default_factory=dict)

    def run(self, start: Mapping[fx.Node, Sequence[Value | None]]) -> None:
        """Visit every node that the atom touches.

        Args:
            start: Values of the placeholders, per dimension.
        """
        for node in self.index.touching.get(self.atom.number, ()):
            if node.op == "placeholder":
                self._values[node] = tuple(start[node])
            elif node.op == "call_function":
                rule = rule_of(node)
                # Without a rule the atom would be pinned, and nobody would ask.
                assert rule is not None, node
                values = rule.flow(node, self)
                if node in self.constant and self.losses.pop(node, None) is not None:
                    self.correct(node, "it keeps the value that its parameters gave it")
                    self.frozen.add(node)
                inputs = self.index.carriers(node, self.atom.number)
                if any(v.singular for used in inputs for v in self.values(used)):
                    values = self._all(node, SINGULAR)
                self._values[node] = values

    # -- what rules call ---------------------------------------------------------------------

    def on(self, node: fx.Node, axis: int, result: int = 0) -> bool:
        """Whether the atom is on this axis of a node's result."""
        return self.atom.number in self.index.axes(node, result)[axis]

    def letters(self, node: fx.Node) -> set[str]:
        """Letters of a contraction that carry the atom."""
        number = self.atom.number
        return {name for name, atoms in self.index.letters(node).items() if number in atoms}

    def rank(self, node: fx.Node) -> int:
        """Number of axes of a node's (only) result."""
        return len(self.index.axes(node))

    def value(self, node: fx.Node, axis: int) -> Value | None:
        """The value of a tensor at the erased indices of an axis; None without the atom."""
        if not self.on(node, axis):
            return None
        found = self._values.get(node)
        return found[axis] if isinstance(found, tuple) else UNKNOWN

    def values(self, node: fx.Node) -> list[Value]:
        """The values of all axes of a node that carry the atom."""
        if node not in self._values:
            return []  # it does not carry the atom, or it would have been visited
        axes = range(self.rank(node))
        return [v for axis in axes if (v := self.value(node, axis)) is not None]

    def result_values(self, node: fx.Node, result: int) -> tuple[Value | None, ...]:
        """The values of one result of an op with several."""
        found = self._values.get(node)
        if isinstance(found, list):
            return found[result]
        return tuple(None for _ in self.index.axes(node, result))

    def layout(self, node: fx.Node) -> Layout:
        """The letters of a contraction."""
        return self.index.axis_map.layouts[node]

    def structural(self, node: fx.Node) -> Values:
        """The values where elements are only moved: each axis has those of where it came from."""
        inputs = self.index.carriers(node, self.atom.number)
        found = [v for used in inputs for v in self.values(used)]
        return self._all(node, join(found) if found else UNKNOWN)

    def unknown(self, node: fx.Node) -> Values:
        """Nothing known on every axis that carries the atom."""
        return self._all(node, UNKNOWN)

    def _all(self, node: fx.Node, value: Value) -> Values:
        rows = [
            tuple(value if self.atom.number in axis else None for axis in row)
            for row in self.index.results(node)
        ]
        return rows if isinstance(node.meta["val"], list | tuple) else rows[0]

    def correct(self, node: fx.Node, how: str) -> None:
        """Note that ``Rule.resize`` has to correct this node."""
        self.corrections[node] = how

    def fold(self, node: fx.Node, constant: float) -> None:
        """Note that the indices hold a constant that moves into this node's bias."""
        self.folds[node] = constant

    def lose(self, node: fx.Node, reason: str) -> None:
        """Note that leaving the indices out changes what this node computes."""
        self.losses[node] = reason
