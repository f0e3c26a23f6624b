"""Mixture-of-experts layers: which tensors hold experts, and what decides who reads which.

A layer is recognised by what its graph computes and not by names of modules: scores of a router
are the operand of a `topk` (or `argmax`), the numbers that it gives pick slices of weights along
one axis, and that axis are the experts. Two ways of picking are known: an index into the weights
(``weight[numbers]``), and a product of sorted rows by groups (``grouped_mm``), whose offsets are
counted from the same numbers. Source: own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeGuard

import torch
from torch import fx

from torchlathe.ir import PreconditionError, Program, describe, info
from torchlathe.ir.axes import Atom, AxisMap, AxisTerms
from torchlathe.passes.analysis.constants import op_name
from torchlathe.passes.analysis.expert_ops import (
    ARRANGING,
    CARRYING,
    CONTRACTING,
    COUNTING,
    GROUPED,
    SUMMING,
    choices,
    counted,
    index_axis,
    op_input,
    other_reader,
)
from torchlathe.passes.base import AnalysisPass

__all__ = ["ExpertLayer", "ExpertLayers", "ExpertRead", "FoundExperts", "HiddenUnits"]


@dataclass(frozen=True, eq=False)
class ExpertRead:
    """A node that reads a tensor by the routing.

    Attributes:
        node: The product by groups, or the index.
        tensor: What it reads.
        axis: The axis of the stored tensor that are the experts.
        by: The numbers of the experts, one per row; or with ``grouped`` the offsets of their rows.
        grouped: Whether rows are sorted, and cut by offsets.
    """

    node: fx.Node
    tensor: str
    axis: int
    by: fx.Node
    grouped: bool


@dataclass(frozen=True, eq=False)
class HiddenUnits:
    """Hidden units inside each expert, which may be in another order in each of them.

    Attributes:
        atom: The atom of the axis terms.
        places: Tensor and axis of each slice that a unit owns.
    """

    atom: Atom
    places: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class ExpertLayer:
    """One layer of experts with its router.

    Attributes:
        name: What the names of its tensors begin with.
        experts: Number of experts.
        choices: Number of router outputs; more than experts where several lead to one.
        top_k: How many a row picks.
        scores: What the choice is made by; shape (..., choices).
        logits: What the router computes first, from which the scores come; same shape.
        chosen: The numbers of the router's outputs that were picked; shape (..., top_k).
        assigned: The numbers of the experts: ``chosen``, or what ``table`` makes of it.
        table: The tensor that maps router outputs to experts, shape (choices,) int64, if any.
        reads: What reads the experts, in execution order.
        path: Nodes between the numbers and the reads.
        counting: Those of them that have the number of experts as an argument.
        tensors: Tensors that hold experts, with the axis.
        router: Tensors with one slice per router output, with the axis; empty if that axis is not
            the router's own.
        hidden: Units inside of the experts.
    """

    name: str
    experts: int
    choices: int
    top_k: int
    scores: fx.Node
    logits: fx.Node
    chosen: fx.Node
    assigned: fx.Node
    table: str | None
    reads: tuple[ExpertRead, ...]
    path: frozenset[fx.Node]
    counting: tuple[fx.Node, ...]
    tensors: Mapping[str, int]
    router: Mapping[str, int]
    hidden: tuple[HiddenUnits, ...]

    def slots(self, program: Program) -> torch.Tensor:
        """Which expert each router output leads to; shape (choices,) int64."""
        if self.table is None:
            return torch.arange(self.experts)
        return program.tensor(self.table).detach().cpu().long()

    def __str__(self) -> str:
        return f"{self.name}: {self.experts} experts, {self.top_k} per row"


@dataclass(frozen=True, eq=False)
class FoundExperts:
    """All layers of experts, and what looks like one but is not understood.

    Attributes:
        layers: In execution order.
        rejected: Reasons, with the node and its source line.
    """

    layers: tuple[ExpertLayer, ...]
    rejected: tuple[tuple[str, str], ...]

    def need(self, who: str) -> tuple[ExpertLayer, ...]:
        """The layers.

        Raises:
            PreconditionError: There is none; says what looked like one.
        """
        if self.layers:
            return self.layers
        if self.rejected:
            where, reason = self.rejected[0]
            raise PreconditionError(
                f"{who} found no layer of experts that it understands: {reason}",
                where=where,
                hint="pick experts by weight[numbers] or by grouped_mm, with the weights of all "
                "experts in one tensor",
            )
        raise PreconditionError(
            f"{who} found no layer of experts: no topk or argmax of a router picks weights",
            hint="leave the pass out for a model without mixture-of-experts layers",
        )


@dataclass(frozen=True)
class ExpertLayers(AnalysisPass[FoundExperts]):
    """Finds the layers of experts by following the numbers that a router's `topk` gives."""

    name: ClassVar[str] = "expert-layers"

    def compute(self, program: Program) -> FoundExperts:
        """Try every choice in the graph."""
        axis_map = program.analysis(AxisTerms)
        layers: list[ExpertLayer] = []
        rejected = []
        for chosen, scores, axis in choices(program.graph):
            found = _Tracer(program, axis_map, chosen, scores, axis).layer()
            if isinstance(found, ExpertLayer):
                layers.append(found)
            elif found:
                rejected.append((describe(chosen), found))
        return FoundExperts(tuple(layers), tuple(rejected))

    def same(self, a: FoundExperts, b: FoundExperts) -> bool:
        """The same layers with the same tensors."""

        def rows(found: FoundExperts) -> list[Any]:
            return [(str(x), x.choices, x.tensors, x.router, x.table) for x in found.layers]

        return rows(a) == rows(b)

    def statistics(self, result: FoundExperts) -> dict[str, int | float]:
        """Counts of layers and experts."""
        return {
            "layers": len(result.layers),
            "experts": sum(layer.experts for layer in result.layers),
            "not understood": len(result.rejected),
        }


class _Tracer:
    """Follows the numbers of one choice to the weights that they pick."""

    def __init__(
        self, program: Program, axis_map: AxisMap, chosen: fx.Node, scores: fx.Node, axis: int
    ) -> None:
        self.program, self.axis_map = program, axis_map
        self.chosen, self.scores = chosen, scores
        self.assigned = chosen
        self.table: str | None = None
        self.axis = axis % scores.meta["val"].dim()
        self.numbers: dict[fx.Node, None] = {}
        self.counts: dict[fx.Node, None] = {}
        self.odd: list[fx.Node] = []
        self.reads: list[ExpertRead] = []
        self.problem = ""

    def layer(self) -> ExpertLayer | str:
        """The layer, or why there is none; "" if nothing looks like one."""
        choices = self.scores.meta["val"].shape[self.axis]
        if not isinstance(choices, int) or choices < 2:
            return ""
        self._follow()
        if not any(self._rank(read.tensor) >= 3 for read in self.reads):
            return self.problem or self._suspicion()
        path = self._path()
        if reason := self.problem or self._refusal(path):
            return reason
        tensors = {read.tensor: read.axis for read in self.reads}
        experts = int(self.program.tensor(self.reads[0].tensor).shape[self.reads[0].axis])
        value = self.chosen.meta["val"]
        kept_axis = value.dim() == self.scores.meta["val"].dim()
        return ExpertLayer(
            name=_common(list(tensors)),
            experts=experts,
            choices=choices,
            top_k=int(value.shape[self.axis]) if kept_axis else 1,
            scores=self.scores,
            logits=self._logits(),
            chosen=self.chosen,
            assigned=self.assigned,
            table=self.table,
            reads=tuple(self.reads),
            path=frozenset(path),
            counting=tuple(n for n in path if op_name(n) in COUNTING),
            tensors=tensors,
            router=self._router(),
            hidden=self._hidden(tensors),
        )

    # -- forward ---------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Visit all that reads the numbers, or what is counted from them."""
        stack = [self.chosen]
        self.numbers[self.chosen] = None
        while stack:
            node = stack.pop()
            for user in list(node.users):
                if user in self.numbers or user in self.counts:
                    continue
                kind = self._kind(user, node)
                if kind is not None:
                    kind[user] = None
                    stack.append(user)
        order = {node: i for i, node in enumerate(self.program.graph.nodes)}
        self.reads.sort(key=lambda read: order[read.node])

    def _kind(self, user: fx.Node, node: fx.Node) -> dict[fx.Node, None] | None:
        """Where a user of a followed node belongs; notes reads and what is not understood."""
        name = op_name(user)
        if node in self.counts:
            if name in SUMMING:
                return self.counts
            if name in GROUPED:
                self._grouped_read(user, node)
            else:
                self.odd.append(user)
            return None
        if name in CARRYING:
            return self.numbers
        if name in COUNTING:
            return self.counts
        if name == "sort":
            return self.numbers
        if name == "getitem":
            # Of a sort the second result says where rows go, which are not numbers of experts.
            sorts = op_name(node) == "sort" and user.args[1] == 1
            return None if sorts else self.numbers
        if name in ("index", "index_select", "embedding"):
            return self._indexed(user, node)
        self.odd.append(user)
        return None

    def _indexed(self, user: fx.Node, node: fx.Node) -> dict[fx.Node, None] | None:
        source = op_input(user)
        if source is node and op_name(user) != "embedding":
            return self.numbers  # rows of the numbers, in another order
        axis = index_axis(user, node)
        found = self._stored(source, axis) if axis is not None else None
        tensor = None if found is None else self.program.tensor(found[0])
        if found is None or tensor is None:
            self.odd.append(user)
        elif tensor.is_floating_point():
            self.reads.append(ExpertRead(user, *found, node, grouped=False))
        elif tensor.dim() == 1 and self.table is None and node is self.chosen:
            self.table, self.assigned = found[0], user
            return self.numbers
        else:
            self.odd.append(user)
        return None

    def _grouped_read(self, user: fx.Node, offsets: fx.Node) -> None:
        operands = [v for v in (*user.args, *user.kwargs.values()) if isinstance(v, fx.Node)]
        if len(operands) < 3 or operands[2] is not offsets:
            return
        found = self._stored(operands[1], 0)
        if found is None:
            self.problem = f"the experts that {user} reads are not a tensor of the model"
            return
        self.reads.append(ExpertRead(user, *found, offsets, grouped=True))

    def _stored(self, node: fx.Node, axis: int) -> tuple[str, int] | None:
        """The tensor that a node is an arrangement of, and where an axis of the node lies in it."""
        while node.op == "call_function":
            if op_name(node) not in ARRANGING:
                return None
            source = op_input(node)
            rank = source.meta["val"].dim()
            if op_name(node) == "transpose":
                a, b = (int(x) % rank for x in node.args[1:3])  # type: ignore[arg-type]
                axis = {a: b, b: a}.get(axis, axis)
            elif op_name(node) == "permute":
                axis = int(node.args[1][axis]) % rank  # type: ignore[index,arg-type]
            elif op_name(node) == "t":
                axis = rank - 1 - axis
            node = source
        name = info(node).tensor
        return None if name is None else (name, axis)

    # -- backward --------------------------------------------------------------------------------

    def _path(self) -> list[fx.Node]:
        """Followed nodes that lead to a read, in execution order."""
        followed = {**self.numbers, **self.counts}
        stack = [read.by for read in self.reads]
        found: set[fx.Node] = set()
        while stack:
            node = stack.pop()
            if node in found or node not in followed:
                continue
            found.add(node)
            if node is not self.assigned:
                stack.extend(node.all_input_nodes)
        return [node for node in self.program.graph.nodes if node in found]

    def _refusal(self, path: Sequence[fx.Node]) -> str:
        """Why the experts that were found cannot be changed; "" if they can."""
        extents = {int(self.program.tensor(read.tensor).shape[read.axis]) for read in self.reads}
        if len(extents) != 1:
            return f"its tensors hold different numbers of experts: {sorted(extents)}"
        (experts,) = extents
        if self.table is None and experts != self.scores.meta["val"].shape[self.axis]:
            return f"its router has another number of outputs than the {experts} experts"
        for node in path:
            if op_name(node) in COUNTING and counted(node) != experts:
                return f"{node} counts {counted(node)} numbers instead of {experts}"
        if self.axis != self.scores.meta["val"].dim() - 1:
            return "its router's outputs are not on the last axis"
        after = set(path) - {self.assigned}
        for node in self.odd:
            if not after.isdisjoint(node.all_input_nodes):
                return f"{node} reads the numbers of the experts for something else"
        for name in {read.tensor for read in self.reads}:
            nodes = {read.node for read in self.reads}
            if outside := other_reader(self.program.tensor_nodes[name], nodes):
                return f"{name} is read by {outside} too, which no routing leads to"
        return ""

    def _suspicion(self) -> str:
        """What kept the numbers of something like a router from leading anywhere."""
        if not self.odd or op_name(self._logits()) not in CONTRACTING:
            return ""
        ops = ", ".join(dict.fromkeys(op_name(node) for node in self.odd))
        return f"the numbers of the choice go into {ops}"

    def _logits(self) -> fx.Node:
        """The nearest product that the scores come from, through ops that keep their axis."""
        extent = self.scores.meta["val"].shape[self.axis]
        queue, seen = [self.scores], {self.scores}
        while queue:
            node = queue.pop(0)
            if op_name(node) in CONTRACTING:
                return node
            for used in node.all_input_nodes:
                value = used.meta.get("val")
                if used.op != "call_function" or used in seen or not _floats(value):
                    continue
                if value.dim() and value.shape[-1] == extent:
                    seen.add(used)
                    queue.append(used)
        return self.scores

    def _router(self) -> dict[str, int]:
        terms = self.axis_map.terms(self.scores)
        term = terms[self.axis] if terms else None
        if not isinstance(term, Atom):
            return {}
        return {
            name: axis
            for name, node in self.program.tensor_nodes.items()
            for axis, other in enumerate(self.axis_map.terms(node))
            if isinstance(other, Atom) and other.number == term.number
        }

    def _hidden(self, tensors: Mapping[str, int]) -> tuple[HiddenUnits, ...]:
        """Free atoms on several of the experts' tensors, and on no other tensor."""
        places: dict[int, list[tuple[str, int]]] = {}
        atoms: dict[int, Atom] = {}
        for name, node in self.program.tensor_nodes.items():
            for axis, term in enumerate(self.axis_map.terms(node)):
                for atom in {a.number: a for a in self.axis_map.atoms_of(term)}.values():
                    atoms[atom.number] = atom
                    places.setdefault(atom.number, []).append((name, axis))
        return tuple(
            HiddenUnits(atoms[number], tuple(found))
            for number, found in places.items()
            if all(name in tensors and axis != tensors[name] for name, axis in found)
            and len({name for name, _ in found}) > 1
            and not atoms[number].pins
        )

    def _rank(self, name: str) -> int:
        return self.program.tensor(name).dim()


def _floats(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _common(names: Sequence[str]) -> str:
    """The dotted path that names share; of one name that name without its last part."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for same in zip(*parts, strict=False):
        if len(set(same)) != 1:
            break
        shared.append(same[0])
    return ".".join(shared) or names[0]
