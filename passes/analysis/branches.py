"""What a network loses when a joint does without one of its operands, and whether it may.

A branch is the last call of a segment together with all calls and tensors that nothing else
needs. It can be left out if the joints that read it are sums or concatenations, keep another
operand that carries data, and give the same as with the branch's parameters at zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torchlathe.ir import Program, TensorKind, describe, info
from torchlathe.ir.axes import Atom, AxisMap, Concat, Product, Term
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.extents import expression
from torchlathe.ir.inputs import input_paths
from torchlathe.passes.analysis.constants import constants_with, op_name
from torchlathe.passes.analysis.families import Family, ZeroInvariantGroups

if TYPE_CHECKING:
    from torchlathe.passes.analysis.dataflow import DataFlow
    from torchlathe.passes.analysis.dominance import PostDominators
    from torchlathe.passes.analysis.families import Families

__all__ = ["CATS", "PRODUCTS", "SUMS", "Branch", "BranchFinder", "emptied"]

SUMS = frozenset({"add", "sub", "subtract"})
PRODUCTS = frozenset({"mul", "multiply"})
CATS = frozenset({"cat", "concat", "concatenate"})
_PER_CHANNEL = frozenset(
    {"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "prelu"}
)


@dataclass(frozen=True, eq=False)
class Branch:
    """A call that joints can do without, and all that dies with it.

    Attributes:
        name: From the paths of the modules that die.
        segment: Name of the segment whose last call it is.
        exit: That call.
        joints: The calls that read it.
        nodes: Calls with data that die, in execution order, the exit last.
        parameters: Parameters that die.
        parameter_count: Their number of elements.
        flops: Of the calls that die, at the sizes of the example inputs.
        zeroed: Parameters that are zero, as a whole, in the model that is equal without it.
        constant: What the exit holds everywhere when they are zero; None if that is not known,
            or for an operand of a concatenation.
        families: For an operand of a concatenation, the families whose units all go.
        exactness: "exact"; "exact-after-fold" if a constant stays in its place;
            "exact-after-correction" if a norm counts the channels; "unknown".
        reason: Why it has to stay; empty if it can go.
    """

    name: str
    segment: str
    exit: fx.Node
    joints: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    parameters: tuple[str, ...]
    parameter_count: int
    flops: int
    zeroed: tuple[str, ...] = ()
    constant: float | None = None
    families: tuple[Family, ...] = ()
    exactness: str = "unknown"
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason or self.exactness})"


class _No(Exception):  # noqa: N818 - control flow inside of this module, never an error
    """Why a branch has to stay."""


class BranchFinder:
    """Judges the last calls of segments.

    Args:
        program: What is analysed.
        flow: Its calls that carry data.
        dominators: What dies with what.
        flops: By name of the node.
    """

    def __init__(
        self,
        program: Program,
        flow: DataFlow,
        dominators: PostDominators,
        flops: Mapping[str, int],
    ) -> None:
        self.program = program
        self.flow = flow
        self.dominators = dominators
        self.flops = flops
        self._paths = dict(zip(program.input_nodes, input_paths(program), strict=True))
        self._sizes = {name: t.numel() for name, t in program.parameters.items()}
        self._tensors = program.tensor_nodes
        self._names: dict[str, int] = {}
        self._by_atom: dict[int, Family] | None = None

    def find(
        self, nodes: Sequence[fx.Node], owned: Sequence[str], segment: str
    ) -> tuple[Branch | None, str]:
        """What a segment's last call takes along, and why it has to stay.

        Args:
            nodes: Calls of the segment.
            owned: Parameters that only these read.
            segment: Its name.

        Returns:
            The branch, None if it is not an operand of joints or has no parameters; and the reason,
            empty if it can go without a trace.
        """
        last = nodes[-1]
        try:
            joints = self._joints(last)
        except _No as no:
            return None, str(no)
        dying = self.dominators.subtree(last)
        parameters = self._parameters(dying)
        if not parameters:
            return None, "it has no parameters of its own"
        calls = tuple(n for n in dying if n in self.flow.sources)
        facts: dict[str, Any] = {
            "name": self._unique(self.flow.name_of(calls, parameters)),
            "segment": segment,
            "exit": last,
            "joints": joints,
            "nodes": calls,
            "parameters": parameters,
            "parameter_count": sum(self._sizes[name] for name in parameters),
            "flops": sum(self.flops.get(n.name, 0) for n in dying),
        }
        try:
            self._keeps_inputs(dying)
            if all(op_name(j) in CATS for j in joints):
                facts |= self._sliced(last, joints, dying, parameters)
            else:
                facts |= self._held(last, joints, dying, owned, parameters)
        except _No as no:
            facts["reason"] = str(no)
        branch = Branch(**facts)
        if not branch.reason and branch.constant:
            return branch, f"it holds {branch.constant:g} when its parameters are zero"
        return branch, branch.reason

    def _unique(self, name: str) -> str:
        self._names[name] = count = self._names.get(name, 0) + 1
        return name if count == 1 else f"{name}/{count}"

    # -- where it is read ----------------------------------------------------------------------

    def _joints(self, last: fx.Node) -> tuple[fx.Node, ...]:
        known = SUMS | PRODUCTS | CATS
        for user in last.users:
            if user.op == "output":
                raise _No("it is an output of the model")
            if user not in self.flow.sources or user not in self.flow.readers[last]:
                raise _No(f"its shape is read: {describe(user)}")
            if op_name(user) not in known or not self.flow.is_joint(user):
                raise _No(f"what reads it needs it: {describe(user)}")
        return tuple(last.users)

    def _keeps_inputs(self, dying: Sequence[fx.Node]) -> None:
        for node in dying:
            if node in self._paths:
                raise _No(f"the input {self._paths[node]} would not be read any more")

    def _parameters(self, dying: Sequence[fx.Node]) -> tuple[str, ...]:
        names = (info(n).tensor for n in dying if n.op == "placeholder")
        entries = self.program.entries
        return tuple(n for n in names if n and entries[n].kind is TensorKind.PARAMETER)

    # -- sums and products ---------------------------------------------------------------------

    def _held(
        self,
        last: fx.Node,
        joints: Sequence[fx.Node],
        dying: Sequence[fx.Node],
        owned: Sequence[str],
        parameters: Sequence[str],
    ) -> dict[str, Any]:
        """What the exit holds when the segment's parameters are zero, or all that die with it."""
        for joint in joints:
            _stands_alone(joint, last)
        held: float | None = None
        tensors = self._tensors
        zeroed: Sequence[str] = ()
        for zeroed in (owned, parameters):
            held = constants_with([tensors[name] for name in zeroed], dying).get(last)
            if held is not None or len(zeroed) == len(parameters):
                break
        if held is None:
            culprit = _culprit(last, self.flow, dying)
            raise _No(f"it is not zero when its parameters are: {describe(culprit)}")
        for joint in joints:
            if held == 0.0 and op_name(joint) in PRODUCTS:
                raise _No(f"zeros would take the other factor along: {describe(joint)}")
        exactness = "exact" if held == 0.0 else "exact-after-fold"
        return {"zeroed": tuple(zeroed), "constant": held, "exactness": exactness}

    # -- concatenations ------------------------------------------------------------------------

    def _sliced(
        self,
        last: fx.Node,
        joints: Sequence[fx.Node],
        dying: Sequence[fx.Node],
        parameters: Sequence[str],
    ) -> dict[str, Any]:
        """The families that its slice of the concatenations consists of."""
        axes = {argument(j, "dim", 0) % j.meta["val"].dim() for j in joints}
        if len(axes) > 1:
            raise _No("it is concatenated along different axes")
        for joint in joints:
            if all(source is last for source in joint.args[0]):  # type: ignore[union-attr]
                raise _No(f"nothing else is concatenated: {describe(joint)}")
        families = self.program.analysis(ZeroInvariantGroups)
        term = families.axis_map.terms(last)[axes.pop()]
        chosen = tuple(self._cover(term, families, dying, parameters))
        numbers = {family.atom.number for family in chosen}
        if (node := emptied(families, numbers, set(dying))) is not None:
            raise _No(f"nothing else would be left of what reads a part: {describe(node)}")
        worst = max((f.exactness for f in chosen), key=_ORDER.index)
        return {"families": chosen, "exactness": worst}

    def _cover(
        self,
        term: Term,
        families: Families,
        dying: Sequence[fx.Node],
        parameters: Sequence[str],
    ) -> Iterator[Family]:
        """Families without which nothing of an axis is left."""
        term = families.axis_map.resolve(term)
        if isinstance(term, Concat):
            for piece in dict.fromkeys(term.pieces):
                yield from self._cover(piece, families, dying, parameters)
            return
        if isinstance(term, Product):
            reasons = []
            for factor in term.factors:
                try:
                    found = list(self._cover(factor, families, dying, parameters))
                except _No as no:
                    reasons.append(str(no))
                else:
                    yield from found
                    return
            raise _No(reasons[0] if reasons else "its axis has one index")
        yield self._whole(term, families, dying, parameters)

    def _whole(
        self, atom: Atom, families: Families, dying: Sequence[fx.Node], parameters: Sequence[str]
    ) -> Family:
        """The family of an atom, if all of its units can go with the branch."""
        if self._by_atom is None:
            self._by_atom = {f.atom.number: f for f in families}
        family = self._by_atom.get(atom.number)
        if family is None:
            raise _No("its channels are no family of parameters")
        if not family.prunable:
            why = f": {family.pins[0]}" if family.pins else ""
            raise _No(f"its channels cannot be taken out{why}")
        if family.exactness == "approximate":
            raise _No(f"taking its channels out is not exact: {'; '.join(family.reasons)}")
        own = {*parameters, *(info(n).tensor for n in dying)}
        for part in family.writers:
            if part.name not in own and not self._scales(part.name):
                raise _No(f"its channels are those of {part.name} too")
        return family

    def _scales(self, name: str) -> bool:
        """Whether a tensor only scales or shifts channels inside of norms."""
        users = self.flow.users_of(name)
        one = self.program.entries[name].tensor.dim() == 1
        return one and all(op_name(user) in _PER_CHANNEL for user in users)


_ORDER = ("exact", "exact-after-correction", "exact-after-fold", "approximate")


def _stands_alone(joint: fx.Node, last: fx.Node) -> None:
    """Hold the other operands of a sum or product to having the result's shape and dtype."""
    if op_name(joint) in CATS:
        raise _No(f"it is concatenated besides being added: {describe(joint)}")
    first, second = joint.args[:2]
    other = second if first is last else first
    assert isinstance(other, fx.Node)
    want, got = joint.meta["val"], other.meta["val"]
    same = [*map(expression, want.shape)] == [*map(expression, got.shape)]
    if not same or want.dtype != got.dtype:
        raise _No(f"the other operand has not the shape and dtype of the result: {describe(joint)}")


def _culprit(last: fx.Node, flow: DataFlow, dying: Sequence[fx.Node]) -> fx.Node:
    """The call that most likely makes something else of zeros: a joint, or the first call."""
    inside = set(dying)
    node = last
    while not flow.is_joint(node) and flow.sources[node][0] in inside:
        node = flow.sources[node][0]
    return node


def emptied(families: Families, numbers: set[int], dead: set[fx.Node]) -> fx.Node | None:
    """A node with an axis of which nothing is left without some atoms; None if there is none.

    Args:
        families: Where the terms are.
        numbers: Numbers of atoms whose indices all go.
        dead: Nodes that are not asked.
    """
    axis_map: AxisMap = families.axis_map
    seen: dict[int, bool] = {}

    def gone(term: Term) -> bool:
        key = id(term)
        if key not in seen:
            found = axis_map.resolve(term)
            if isinstance(found, Atom):
                seen[key] = found.number in numbers
            elif isinstance(found, Product):
                seen[key] = any(map(gone, found.factors))
            else:
                seen[key] = all(map(gone, found.pieces))
        return seen[key]

    for number in sorted(numbers):
        for node in families.index.touching.get(number, ()):
            if node in dead or not axis_map.has(node):
                continue
            values = node.meta.get("val")
            if not isinstance(values, torch.Tensor | list | tuple):
                continue
            if any(gone(term) for row in axis_map.results(node) for term in row or ()):
                return node
    return None
