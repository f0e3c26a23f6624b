"""Families of coupled slices: what can be erased as a whole, and whether that is exact.

Each free atom of the axis terms is one family; index *i* of the atom is one unit, which stands
for a slice of every parameter (and buffer) that has the atom on an axis. (Zero-invariant groups:
OTO, arXiv 2107.07467; found here by axis terms instead of a graph of module types.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx

from torchlathe.ir import Program, TensorKind, describe
from torchlathe.ir.axes import (
    UNKNOWN,
    ZERO,
    Atom,
    AtomIndex,
    AxisMap,
    AxisTerms,
    Concat,
    Flow,
    Pin,
    Product,
    Term,
)
from torchlathe.passes.analysis.roles import written_axes
from torchlathe.passes.base import AnalysisPass

if TYPE_CHECKING:
    import networkx

__all__ = ["Families", "Family", "ParameterSlice", "ZeroInvariantGroups"]

# Exactness of erasing, from best to worst.
EXACT = "exact"
FOLDED = "exact-after-fold"
CORRECTED = "exact-after-correction"
APPROXIMATE = "approximate"


@dataclass(frozen=True)
class ParameterSlice:
    """What a unit of a family owns of one tensor.

    Attributes:
        name: The parameter or buffer.
        axis: The axis that carries the family's atom.
        repeat: Indices of the axis per unit.
        writes: Whether the indices write to the erased index (and are zero in the equal
            full-size model); otherwise they only read from it.
        kind: Parameter, buffer or constant.
    """

    name: str
    axis: int
    repeat: int
    writes: bool
    kind: TensorKind = TensorKind.PARAMETER


@dataclass(frozen=True, eq=False)
class Family:
    """Slices that can only be erased together.

    Attributes:
        name: ``parameter:axis`` of its first writer, with the place in the axis' term where the
            axis has several parts: ``query.weight:0/0`` are heads, ``query.weight:0/1`` the
            dimensions in a head.
        atom: The atom of the axis terms.
        slices: What it owns, in the order of the program's tensors.
        exactness: "exact", "exact-after-fold", "exact-after-correction" or "approximate".
        reasons: Which corrections, or why only approximate; with node and source line.
        corrected: Nodes that need a correction.
        folds: Nodes whose bias takes the constant that the units hold, with that constant.
        pins: Why its units cannot be erased; empty if they can.
        parameters_per_unit: Parameters that one unit takes along.
    """

    name: str
    atom: Atom
    slices: tuple[ParameterSlice, ...]
    exactness: str
    reasons: tuple[str, ...]
    corrected: frozenset[fx.Node]
    folds: Mapping[fx.Node, float]
    pins: tuple[Pin, ...]
    parameters_per_unit: int

    @property
    def extent(self) -> int:
        """Number of units."""
        return int(self.atom.extent)

    @property
    def writers(self) -> tuple[ParameterSlice, ...]:
        """Slices that write to the unit's index."""
        return tuple(s for s in self.slices if s.writes)

    @property
    def readers(self) -> tuple[ParameterSlice, ...]:
        """Slices that read from it."""
        return tuple(s for s in self.slices if not s.writes)

    @property
    def pinned(self) -> bool:
        """Whether something needs every unit to stay."""
        return bool(self.pins)

    @property
    def prunable(self) -> bool:
        """Whether units can be erased."""
        return not self.pins and bool(self.writers)

    def __str__(self) -> str:
        state = f"pinned: {self.pins[0]}" if self.pins else self.exactness
        return f"{self.name} x {self.extent} ({state})"


@dataclass(frozen=True, eq=False)
class Families:
    """All families of a program, in the order of its tensors.

    Attributes:
        all: Prunable and pinned ones.
        axis_map: The terms that they come from.
        index: Which nodes carry which atom.
    """

    all: tuple[Family, ...]
    axis_map: AxisMap
    index: AtomIndex
    _names: dict[str, Family] = field(default_factory=dict, repr=False)

    def __iter__(self) -> Iterator[Family]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    @cached_property
    def prunable(self) -> tuple[Family, ...]:
        """Families whose units can be erased."""
        return tuple(f for f in self.all if f.prunable)

    @cached_property
    def pinned(self) -> tuple[Family, ...]:
        """Families that something pins."""
        return tuple(f for f in self.all if f.pinned)

    def by_name(self, name: str) -> Family:
        """The family of this name.

        Raises:
            KeyError: There is none.
        """
        for family in self.all:
            if family.name == name:
                return family
        raise KeyError(name)

    def of(self, tensor: str, axis: int | None = None) -> tuple[Family, ...]:
        """Families that own slices of a tensor (along one axis)."""
        return tuple(
            f
            for f in self.all
            if any(s.name == tensor and axis in (None, s.axis) for s in f.slices)
        )

    def to_networkx(self) -> networkx.Graph[str]:
        """Families and tensors as a bipartite graph; an edge has its axis and role."""
        import networkx

        graph: networkx.Graph[str] = networkx.Graph()
        for family in self.all:
            graph.add_node(
                family.name,
                kind="family",
                extent=family.extent,
                exactness=family.exactness,
                pinned=family.pinned,
            )
            for part in family.slices:
                graph.add_node(part.name, kind=part.kind.value)
                role = "writes" if part.writes else "reads"
                graph.add_edge(family.name, part.name, axis=part.axis, role=role)
        return graph


@dataclass(frozen=True)
class ZeroInvariantGroups(AnalysisPass[Families]):
    """Finds the families of coupled slices, who writes and reads them, and what pins them."""

    name: ClassVar[str] = "zero-invariant-groups"

    def compute(self, program: Program) -> Families:
        """Group the tensors' axes by atom, and follow each free atom through the graph."""
        axis_map = program.analysis(AxisTerms)
        index = AtomIndex(axis_map, program.graph)
        return Families(tuple(_Finder(program, axis_map, index).families()), axis_map, index)

    def same(self, a: Families, b: Families) -> bool:
        """The same families with the same slices and verdicts."""

        def rows(families: Families) -> list[Any]:
            return [(f.name, f.extent, f.slices, f.exactness, f.pinned) for f in families]

        return rows(a) == rows(b)

    def statistics(self, result: Families) -> dict[str, int | float]:
        """Counts of families and units."""
        return {
            "families": len(result),
            "prunable": len(result.prunable),
            "pinned": len(result.pinned),
            "units": sum(f.extent for f in result.prunable),
        }


class _Finder:
    """One run of the analysis."""

    def __init__(self, program: Program, axis_map: AxisMap, index: AtomIndex) -> None:
        self.program = program
        self.axis_map = axis_map
        self.index = index
        self.nodes = program.tensor_nodes
        self.written = written_axes(program, index)

    def families(self) -> Iterator[Family]:
        places: dict[int, list[tuple[str, int, Term]]] = {}
        atoms: dict[int, Atom] = {}
        for name, node in self.nodes.items():
            for axis, term in enumerate(self.axis_map.terms(node)):
                for atom in {a.number: a for a in self.axis_map.atoms_of(term)}.values():
                    atoms[atom.number] = atom
                    places.setdefault(atom.number, []).append((name, axis, term))
        for number, found in places.items():
            atom = atoms[number]
            owned = {self.program.entries[name].kind for name, _, _ in found}
            if isinstance(atom.extent, int) and atom.extent and TensorKind.PARAMETER in owned:
                yield self._family(atom, found)

    def _family(self, atom: Atom, places: list[tuple[str, int, Term]]) -> Family:
        slices = []
        for name, axis, term in places:
            entry = self.program.entries[name]
            repeat = _repeat(term, atom)
            parameter = entry.kind is TensorKind.PARAMETER
            writes = parameter and self._writes(name, axis, atom)
            slices.append(ParameterSlice(name, axis, repeat, writes, entry.kind))
        pins = tuple(atom.pins)
        if not pins and any(_crosses(term, atom) for _, _, term in places):
            reason = f"an axis of {places[0][0]} holds pairs of its indices"
            pins = (Pin(reason),)
        flow, slices = (None, slices) if pins else self._flow(atom, slices)
        return Family(
            name=_name(slices, places, atom),
            atom=atom,
            slices=tuple(slices),
            exactness=_exactness(flow),
            reasons=_reasons(flow),
            corrected=frozenset(flow.corrections) if flow else frozenset(),
            folds=flow.folds if flow else {},
            pins=pins,
            parameters_per_unit=self._parameters_per_unit(slices),
        )

    def _writes(self, name: str, axis: int, atom: Atom) -> bool:
        return (0, axis, atom.number) in self.written[self.nodes[name]]

    def _parameters_per_unit(self, slices: list[ParameterSlice]) -> int:
        shapes: dict[str, list[int]] = {}
        for part in slices:
            if part.kind is TensorKind.PARAMETER:
                shape = shapes.setdefault(
                    part.name, list(self.program.entries[part.name].tensor.shape)
                )
                shape[part.axis] -= part.repeat
        entries = self.program.entries
        return sum(entries[n].tensor.numel() - math.prod(s) for n, s in shapes.items())

    def _flow(
        self, atom: Atom, slices: list[ParameterSlice]
    ) -> tuple[Flow | None, list[ParameterSlice]]:
        """Follow the atom with zeroed parameters, and if need be with zeroed buffers too."""
        if not any(s.writes for s in slices):
            return None, slices
        flow = self._run(atom, slices)
        # Not constants: the caller's module has no name under which to zero them.
        buffers = [s for s in slices if s.kind is TensorKind.BUFFER]
        if not flow.losses or not buffers:
            return flow, slices
        # For instance a table of positions that is added to a residual stream.
        zeroed = [
            ParameterSlice(s.name, s.axis, s.repeat, True, s.kind)
            if s in buffers and self._writes(s.name, s.axis, atom)
            else s
            for s in slices
        ]
        again = self._run(atom, zeroed)
        return (again, zeroed) if not again.losses else (flow, slices)

    def _run(self, atom: Atom, slices: list[ParameterSlice]) -> Flow:
        start: dict[fx.Node, list[Any]] = {}
        for part in slices:
            node = self.nodes[part.name]
            row = start.setdefault(node, [None] * len(self.axis_map.terms(node)))
            row[part.axis] = ZERO if part.writes else UNKNOWN
        flow = Flow(self.index, atom)
        flow.run(start)
        return flow


def _exactness(flow: Flow | None) -> str:
    if flow is None or flow.losses:
        return APPROXIMATE
    if flow.corrections:
        return CORRECTED
    return FOLDED if flow.folds else EXACT


def _reasons(flow: Flow | None) -> tuple[str, ...]:
    if flow is None:
        return ()
    folds = {node: f"the constant {c:g} moves into the bias" for node, c in flow.folds.items()}
    notes = flow.losses or {**flow.corrections, **folds}
    # One text stands for all the places where it holds.
    first: dict[str, tuple[fx.Node, int]] = {}
    for node, text in notes.items():
        place, count = first.get(text, (node, 0))
        first[text] = (place, count + 1)
    return tuple(
        f"{text}: {describe(node)}" + (f" and {count - 1} more" if count > 1 else "")
        for text, (node, count) in first.items()
    )


def _repeat(term: Term, atom: Atom) -> int:
    """How many indices of an axis belong to one unit of an atom."""
    if isinstance(term, Atom):
        return int(term is atom)
    if isinstance(term, Concat):
        return sum(_repeat(piece, atom) for piece in term.pieces)
    count = 1
    found = False
    for factor in term.factors:
        inside = _repeat(factor, atom)
        found = found or inside > 0
        count *= inside or factor.extent
    return count if found else 0


def _crosses(term: Term, atom: Atom) -> bool:
    """Whether an atom is in two factors of a product, so that an index has two units."""
    if isinstance(term, Atom):
        return False
    parts = term.factors if isinstance(term, Product) else term.pieces
    if isinstance(term, Product) and sum(_repeat(p, atom) > 0 for p in parts) > 1:
        return True
    return any(_crosses(part, atom) for part in parts)


def _path(term: Term, atom: Atom) -> list[int] | None:
    """Where an atom first stands in a term; empty if it is the term."""
    if isinstance(term, Atom):
        return [] if term is atom else None
    for i, part in enumerate(term.factors if isinstance(term, Product) else term.pieces):
        if (rest := _path(part, atom)) is not None:
            return [i, *rest]
    return None


def _name(slices: list[ParameterSlice], places: list[tuple[str, int, Term]], atom: Atom) -> str:
    chosen = next((i for i, s in enumerate(slices) if s.writes), 0)
    name, axis, term = places[chosen]
    path = _path(term, atom)
    return f"{name}:{axis}" + "".join(f"/{i}" for i in path or ())
