"""Explaining one name: which families it belongs to, who is coupled with it, and what pins it.

The inference keeps which node bound which variable; from this record follows where two axes were
found to be one, and from the graph, which nodes carry the axis from one tensor to the other. (Own.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch import fx

from torchlathe.ir import Program, info, module_path, source_line
from torchlathe.ir.axes import Atom, AxisMap, Concat, Pin, Product, Term
from torchlathe.passes.analysis.families import Families, Family, ZeroInvariantGroups
from torchlathe.passes.analysis.naming import Target, find_target

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["AxisPart", "Coupled", "Explanation", "FamilyPart", "Op", "PinPart", "explain"]


@dataclass(frozen=True)
class Op:
    """A node of the graph, as a reader finds it.

    Attributes:
        node: Its name in the listing.
        op: What it calls; the tensor's or input's name for a placeholder.
        module: Path of the module whose forward made it.
        where: ``file:line (function)`` of the model's code.
    """

    node: str
    op: str
    module: str
    where: str | None


@dataclass(frozen=True)
class Coupled:
    """A tensor's axis in a family.

    Attributes:
        tensor: Name.
        axis: The axis.
        role: ``"writes"`` or ``"reads"``.
        kind: ``"parameter"``, ``"buffer"`` or ``"constant"``.
        module: Path of the module that has it.
        indices_per_unit: Indices of the axis that one unit takes.
        parameters_per_unit: Elements of the tensor that one unit takes.
        joined: The ops that found this axis and the explained one to be the same.
        carried: The nodes that carry it between the two, in order, both tensors included.
    """

    tensor: str
    axis: int
    role: str
    kind: str
    module: str
    indices_per_unit: int
    parameters_per_unit: int
    joined: tuple[Op, ...]
    carried: tuple[Op, ...]


@dataclass(frozen=True)
class PinPart:
    """A reason why no unit of a family can go.

    Attributes:
        reason: What needs every index to stay.
        op: The node that needs it; None where no node does.
        where: Module path and source line.
        carried: The nodes that carry the axis from what is explained to the op.
    """

    reason: str
    op: Op | None
    where: str
    carried: tuple[Op, ...]


@dataclass(frozen=True)
class FamilyPart:
    """One family, seen from what is explained.

    Attributes:
        name: Of the family; of a node's axis that no parameter has, ``%node:axis``.
        units: How many there are; text if the extent is dynamic.
        prunable: Whether units can be erased.
        exactness: Of erasing them; "pinned" if nothing can.
        reasons: Which corrections it takes, or why it is only approximate.
        parameters_per_unit: Parameters that one unit takes along.
        pins: Why its units cannot be erased.
        coupled: All slices of the family.
        advice: What can be done.
    """

    name: str
    units: int | str
    prunable: bool
    exactness: str
    reasons: tuple[str, ...]
    parameters_per_unit: int
    pins: tuple[PinPart, ...]
    coupled: tuple[Coupled, ...]
    advice: tuple[str, ...]


@dataclass(frozen=True)
class AxisPart:
    """What an axis consists of.

    Attributes:
        tensor: The tensor, or ``%node``.
        axis: Which axis.
        extent: Number of indices; text if it is dynamic.
        structure: Its parts: ``3 x 4 x 2`` (row-major), ``[64 | 64]`` (end to end).
        families: Names of the families in it, in order.
        index: The index that was asked for.
        units: For that index, which unit of which family it belongs to.
    """

    tensor: str
    axis: int
    extent: int | str
    structure: str
    families: tuple[str, ...]
    index: int | None = None
    units: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Explanation:
    """What `explain` finds; ``str()`` of it is for reading.

    Attributes:
        name: What was asked for, by its full name.
        kind: ``"parameter"``, ``"axis"``, ``"channel"``, ``"family"``, ``"module"``, ``"node"`` or
            ``"op"``.
        axes: The axes in question.
        families: Their families, in the order in which they are met.
        notes: What else a reader should know.
    """

    name: str
    kind: str
    axes: tuple[AxisPart, ...]
    families: tuple[FamilyPart, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return _plain(asdict(self))  # type: ignore[no-any-return]

    def text(self, limit: int | None = 12) -> str:
        """As text.

        Args:
            limit: Coupled slices to show of each family, and families; None for all.
        """
        from torchlathe.passes.analysis.explain_text import lines

        return "\n".join(line for line, _ in lines(self, limit))

    def __str__(self) -> str:
        return self.text()

    def rich(self, limit: int | None = 12) -> Text:
        """As text for a terminal; ``limit`` as `text` takes it."""
        from torchlathe.passes.analysis.explain_text import rich_text

        return rich_text(self, limit)

    def __rich__(self) -> Text:
        return self.rich()


def explain(program: Program, name: str) -> Explanation:
    """Say which families a name belongs to, what is coupled with it, and what pins it.

    Args:
        program: Any program; nothing in it changes.
        name: A parameter or buffer (``encoder.0.weight``), an axis of it (``encoder.0.weight:0``),
            an index of an axis (``encoder.0.weight:0[17]``), a family, the path of a module, a
            node, or an op (``aten.linear.default``).

    Raises:
        InputError: Nothing is called so; the hint has the nearest names.
    """
    families = program.analysis(ZeroInvariantGroups)
    target = find_target(program, families, name)
    return _Explainer(program, families, target).run()


class _Explainer:
    """One explanation in the making."""

    def __init__(self, program: Program, families: Families, target: Target) -> None:
        self.program = program
        self.families = families
        self.axis_map: AxisMap = families.axis_map
        self.target = target
        self.nodes = program.tensor_nodes
        self.by_atom = {f.atom.number: f for f in families}
        self.by_name = {n.name: n for n in program.nodes}

    def run(self) -> Explanation:
        """Explain every axis of the target, and each of their families once."""
        target = self.target
        axes: list[AxisPart] = []
        starts: dict[int, tuple[Atom, fx.Node, int]] = {}
        for node, axis in target.places:
            term = self._terms(node)[axis]
            atoms = {a.number: a for a in self.axis_map.atoms_of(term)}
            wanted = [a for a in atoms.values() if target.atom in (None, a.number)]
            for atom in wanted:
                starts.setdefault(atom.number, (atom, node, axis))
            axes.append(self._axis(node, axis, term))
        parts = tuple(self._family(*start) for start in starts.values())
        notes = (*target.notes, *self._op_notes())
        return Explanation(target.name, target.kind, tuple(axes), parts, notes)

    # -- axes ------------------------------------------------------------------------------

    def _terms(self, node: fx.Node) -> tuple[Term, ...]:
        return self.axis_map.terms(node)

    def _axis(self, node: fx.Node, axis: int, term: Term) -> AxisPart:
        index = self.target.index
        return AxisPart(
            tensor=info(node).tensor or f"%{node.name}",
            axis=axis,
            extent=_plain(term.extent),
            structure=_structure(term),
            families=tuple(
                dict.fromkeys(self._name(a, node, axis) for a in self.axis_map.atoms_of(term))
            ),
            index=index,
            units=()
            if index is None
            else tuple((self._name(a, node, axis), unit) for a, unit in _located(term, index)),
        )

    def _name(self, atom: Atom, node: fx.Node, axis: int) -> str:
        family = self.by_atom.get(atom.number)
        return family.name if family else f"%{node.name}:{axis}"

    # -- families --------------------------------------------------------------------------

    def _family(self, atom: Atom, node: fx.Node, axis: int) -> FamilyPart:
        family = self.by_atom.get(atom.number)
        walk = _Walk(self.families, atom, node)
        pins = family.pins if family else tuple(atom.pins)
        exactness = "pinned" if pins else family.exactness if family else "approximate"
        return FamilyPart(
            name=self._name(atom, node, axis),
            units=_plain(atom.extent),
            prunable=bool(family and family.prunable),
            exactness=exactness,
            reasons=family.reasons if family and not pins else (),
            parameters_per_unit=family.parameters_per_unit if family else 0,
            pins=tuple(self._pin(pin, walk) for pin in pins),
            coupled=tuple(self._coupled(family, atom, node, axis, walk)) if family else (),
            advice=tuple(self._advice(family)) if family else (),
        )

    def _pin(self, pin: Pin, walk: _Walk) -> PinPart:
        node = self.by_name.get(pin.node)
        path = walk.to(node) if node is not None else ()
        return PinPart(pin.reason, _op(node) if node else None, pin.where, tuple(map(_op, path)))

    def _coupled(
        self, family: Family, atom: Atom, node: fx.Node, axis: int, walk: _Walk
    ) -> Iterator[Coupled]:
        own = self.axis_map.trail(node, axis, atom)
        for part in family.slices:
            place = self.nodes[part.name]
            other = self.axis_map.trail(place, part.axis, atom)
            shape = self.program.entries[part.name].tensor.shape
            yield Coupled(
                tensor=part.name,
                axis=part.axis,
                role="writes" if part.writes else "reads",
                kind=part.kind.value,
                module=part.name.rpartition(".")[0],
                indices_per_unit=part.repeat,
                parameters_per_unit=shape.numel() // shape[part.axis] * part.repeat,
                joined=tuple(map(_op, _between(own, other))),
                carried=tuple(map(_op, walk.to(place))),
            )

    def _advice(self, family: Family) -> Iterator[str]:
        if family.prunable:
            if family.exactness == "approximate":
                yield "it is left alone unless structured-erase has approximate=true"
            yield f'structured-erase{{include=["{family.name}"]}} erases units of this family alone'
            yield f'structured-erase{{exclude=["{family.name}"]}} keeps it as it is'
            return
        if any("has no axis rule" in pin.reason for pin in family.pins):
            yield "a rule for the op lifts the pin: see docs/writing_rules.md"
        elif any("axis of an output" in pin.reason for pin in family.pins):
            yield "callers see this axis; what comes before it can shrink"
        tensors = list(dict.fromkeys(part.name for part in family.slices))
        others = [f for f in self._sharing(tensors) if f.prunable and f is not family]
        for other in others[:3]:
            places = ", ".join(f"{p.name}:{p.axis}" for p in other.slices if p.name in set(tensors))
            yield (
                f"another axis of the same tensors can shrink: {places} "
                f"(family {other.name}, {other.extent} units, {other.exactness})"
            )
        if not others:
            yield "no other axis of its tensors can shrink either"

    @cached_property
    def _owners(self) -> dict[str, list[Family]]:
        owners: dict[str, list[Family]] = {}
        for family in self.families:
            for name in dict.fromkeys(part.name for part in family.slices):
                owners.setdefault(name, []).append(family)
        return owners

    def _sharing(self, tensors: Iterable[str]) -> list[Family]:
        found = {f.name: f for name in tensors for f in self._owners.get(name, ())}
        return list(found.values())

    # -- nodes -----------------------------------------------------------------------------

    def _op_notes(self) -> Iterator[str]:
        """What the asked nodes themselves pin or need corrected."""
        asked = {node.name for node in self.target.nodes}
        if not asked:
            return
        for family in self.families:
            for pin in family.pins:
                if pin.node in asked:
                    yield f"%{pin.node} pins {family.name}: {pin.reason}"
            for node in (*family.corrected, *family.folds):
                if node.name in asked:
                    how = "a correction" if node in family.corrected else "a new bias"
                    yield f"%{node.name} takes {how} when units of {family.name} go"


class _Walk:
    """Shortest ways from one node to others over nodes that carry an atom."""

    def __init__(self, families: Families, atom: Atom, start: fx.Node) -> None:
        self._index, self._number, self._start = families.index, atom.number, start
        self._touched = set(families.index.touching.get(atom.number, ()))

    def _carries(self, node: fx.Node) -> bool:
        return any(self._number in axis for row in self._index.results(node) for axis in row)

    @cached_property
    def _parents(self) -> dict[fx.Node, fx.Node | None]:
        parents: dict[fx.Node, fx.Node | None] = {self._start: None}
        waiting = deque([self._start])
        while waiting:
            node = waiting.popleft()
            # A node that sums over the axis is reached, and from it what else it reads.
            near = [used for used in node.all_input_nodes if self._carries(used)]
            if self._carries(node):
                near += [u for u in node.users if u in self._touched or u.op == "output"]
            for other in near:
                if other not in parents:
                    parents[other] = node
                    waiting.append(other)
        return parents

    def to(self, goal: fx.Node) -> tuple[fx.Node, ...]:
        """The nodes from the start to a goal, both included; empty if there is no way."""
        if goal not in self._parents:
            return ()
        path = []
        node: fx.Node | None = goal
        while node is not None:
            path.append(node)
            node = self._parents[node]
        return tuple(reversed(path))


def _between(own: list[tuple[Atom, fx.Node]], other: list[tuple[Atom, fx.Node]]) -> list[fx.Node]:
    """The nodes whose unifications connect two axes, without what both have in common."""
    shared = {atom.number for atom, _ in own} & {atom.number for atom, _ in other}
    steps = [node for atom, node in own if atom.number not in shared]
    steps += [node for atom, node in reversed(other) if atom.number not in shared]
    return list(dict.fromkeys(steps))


def _op(node: fx.Node) -> Op:
    target = node.target if isinstance(node.target, str) else str(node.target)
    if node.op == "placeholder":
        target = info(node).tensor or "an input"
    elif node.op == "output":
        target = "the output"
    return Op(node.name, target, module_path(node), source_line(node))


def _structure(term: Term) -> str:
    if isinstance(term, Atom):
        return str(_plain(term.extent))
    if isinstance(term, Concat):
        return "[" + " | ".join(map(_structure, term.pieces)) + "]"
    return " x ".join(map(_structure, term.factors)) or "1"


def _located(term: Term, index: int) -> Iterator[tuple[Atom, int]]:
    """Which unit of each atom an index of an axis belongs to."""
    if isinstance(term, Atom):
        yield term, index
    elif isinstance(term, Product):
        inner = 1
        places = []
        for factor in reversed(term.factors):
            places.append((factor, index // inner % factor.extent))
            inner *= factor.extent
        for factor, place in reversed(places):
            yield from _located(factor, place)
    else:
        for piece in term.pieces:
            if index < piece.extent:
                yield from _located(piece, index)
                return
            index -= piece.extent


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
