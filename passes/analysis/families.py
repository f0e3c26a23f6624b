"""Families of coupled slices: what can be erased as a whole, and whether that is exact.

Each free atom of the axis terms is one family; index *i* of the atom is one unit, which stands
for a slice of every parameter (and buffer) that has the atom on an axis. (Zero-invariant groups:
OTO, arXiv 2107.07467; found here by axis terms instead of a graph of module types.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

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
from torchlathe.passes.analysis.roles import constant_nodes, written_axes
from torchlathe.passes.base import AnalysisPass

if TYPE_CHECKING:
    import networkx

__all__ = ["Families", "Family", "ParameterSlice", "ZeroInvariantGroups"]

# Exactness of erasing, from best to worst.
EXACT = "exact"
FOLDED = "exact-after-fold"
CORRECTED = "exact-after-correction"
APPROXIMATE = "approximate"

_BY_READERS = "equal to the model in which the slices that read its units are zero"

ZeroedBy: TypeAlias = Literal["writers", "readers", "all"]


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
        zeroed_by: Which slices are zero in the equal full-size model: "writers"; "readers", where
            writers of zeros would not make it equal; or "all" of them.
        zeroed: These slices.
        frozen: Corrected nodes that depend on the program's tensors alone, and become constants.
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
    zeroed_by: ZeroedBy = "writers"
    zeroed: tuple[ParameterSlice, ...] = ()
    frozen: frozenset[fx.Node] = frozenset()

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
            return [
                (f.name, f.extent, f.slices, f.exactness, f.pinned, f.zeroed_by) for f in families
            ]

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
        self.constant = constant_nodes(program)
        self._found_repeats: dict[int, Mapping[int, int]] = {}
        self._found_crossing: dict[int, frozenset[int]] = {}

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
            repeat = self._repeats(term)[atom.number]
            parameter = entry.kind is TensorKind.PARAMETER
            writes = parameter and self._writes(name, axis, atom)
            slices.append(ParameterSlice(name, axis, repeat, writes, entry.kind))
        pins = tuple(atom.pins)
        if not pins and any(atom.number in self._crossing(term) for _, _, term in places):
            reason = f"an axis of {places[0][0]} holds pairs of its indices"
            pins = (Pin(reason),)
        found = _Verdict(slices) if pins else self._verdict(atom, slices)
        flow, slices = found.flow, found.slices
        return Family(
            name=_name(slices, places, atom),
            atom=atom,
            slices=tuple(slices),
            exactness=_exactness(flow),
            reasons=_reasons(flow, found.zeroed_by),
            corrected=frozenset(flow.corrections) if flow else frozenset(),
            folds=flow.folds if flow else {},
            pins=pins,
            parameters_per_unit=self._parameters_per_unit(slices),
            zeroed_by=found.zeroed_by,
            zeroed=tuple(found.zeroed),
            frozen=frozenset(flow.frozen) if flow else frozenset(),
        )

    def _repeats(self, term: Term) -> Mapping[int, int]:
        """How many indices of an axis belong to one unit of each of its atoms."""
        found = self._found_repeats.get(id(term))
        if found is None:
            found = self._found_repeats[id(term)] = _repeats(term)
        return found

    def _crossing(self, term: Term) -> frozenset[int]:
        """The atoms of which an index of an axis has more than one unit."""
        found = self._found_crossing.get(id(term))
        if found is None:
            found = self._found_crossing[id(term)] = frozenset(_crossing(term))
        return found

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

    def _verdict(self, atom: Atom, slices: list[ParameterSlice]) -> _Verdict:
        """Follow the atom with zeroed writers, and if that is not exact with others at zero."""
        if not any(s.writes for s in slices):
            return _Verdict(slices)
        first = self._run(_Verdict(slices), atom)
        if first.flow is None or not first.flow.losses:
            return first
        # Not constants, nor what passes added: the caller's module has no such names to zero.
        owned = [s for s in slices if self._named(s)]
        written = {s: None for s in owned if self._writes(s.name, s.axis, atom)}
        read = [s for s in owned if s not in written]
        # For instance a table of positions that is added to a residual stream.
        both = [replace(s, writes=True) if s in written else s for s in slices]
        attempts = []
        if not all(s.writes for s in written):
            attempts.append(_Verdict(both))
        if read:
            attempts.append(_Verdict(slices, "readers", read))
            everything = [s for s in both if self._named(s)]
            attempts.append(_Verdict(both, "all", everything))
        for attempt in attempts:
            found = self._run(attempt, atom)
            if found.flow is None or not found.flow.losses:
                return found
        return first

    def _run(self, given: _Verdict, atom: Atom) -> _Verdict:
        start: dict[fx.Node, list[Any]] = {}
        zeroed = {(part.name, part.axis) for part in given.zeroed}
        for part in given.slices:
            node = self.nodes[part.name]
            row = start.setdefault(node, [None] * len(self.axis_map.terms(node)))
            row[part.axis] = ZERO if (part.name, part.axis) in zeroed else UNKNOWN
        flow = Flow(self.index, atom, constant=self.constant)
        flow.run(start)
        for part in given.zeroed:
            if part.axis in self.program.frozen.get(part.name, ()):
                flow.losses[self.nodes[part.name]] = "a constant was computed from all of it before"
        return replace(given, flow=flow)

    def _named(self, part: ParameterSlice) -> bool:
        zeroed = self.program.zeroed.get(part.name)
        added = zeroed is not None and not any(map(len, zeroed.values()))
        return part.kind is not TensorKind.CONSTANT and not added


@dataclass(frozen=True)
class _Verdict:
    """Slices with their roles, which of them are zero, and what the flow then says."""

    slices: list[ParameterSlice]
    zeroed_by: ZeroedBy = "writers"
    named: list[ParameterSlice] | None = None
    flow: Flow | None = None

    @property
    def zeroed(self) -> list[ParameterSlice]:
        """By default the slices that write."""
        return [s for s in self.slices if s.writes] if self.named is None else self.named


def _exactness(flow: Flow | None) -> str:
    if flow is None or flow.losses:
        return APPROXIMATE
    if flow.corrections:
        return CORRECTED
    return FOLDED if flow.folds else EXACT


def _reasons(flow: Flow | None, zeroed_by: ZeroedBy) -> tuple[str, ...]:
    if flow is None:
        return ()
    readers = () if zeroed_by == "writers" else (_BY_READERS,)
    folds = {node: f"the constant {c:g} moves into the bias" for node, c in flow.folds.items()}
    notes = flow.losses or {**flow.corrections, **folds}
    # One text stands for all the places where it holds.
    first: dict[str, tuple[fx.Node, int]] = {}
    for node, text in notes.items():
        place, count = first.get(text, (node, 0))
        first[text] = (place, count + 1)
    return readers + tuple(
        f"{text}: {describe(node)}" + (f" and {count - 1} more" if count > 1 else "")
        for text, (node, count) in first.items()
    )


def _repeats(term: Term) -> dict[int, int]:
    """How many indices of an axis belong to one unit of each of its atoms, in one walk."""
    if isinstance(term, Atom):
        return {term.number: 1}
    if isinstance(term, Concat):
        total: dict[int, int] = {}
        for piece in term.pieces:
            for number, count in _repeats(piece).items():
                total[number] = total.get(number, 0) + count
        return total
    inside = [_repeats(factor) for factor in term.factors]
    return {
        number: math.prod(
            counts.get(number) or factor.extent
            for counts, factor in zip(inside, term.factors, strict=True)
        )
        for number in dict.fromkeys(number for counts in inside for number in counts)
    }


def _crossing(term: Term) -> Iterator[int]:
    """Atoms in two factors of a product, so that an index has two units of them."""
    if isinstance(term, Atom):
        return
    parts = term.factors if isinstance(term, Product) else term.pieces
    if isinstance(term, Product):
        seen: set[int] = set()
        for factor in parts:
            own = set(_repeats(factor))
            yield from own & seen
            seen |= own
    for part in parts:
        yield from _crossing(part)


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
