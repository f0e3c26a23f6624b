"""What is left of a network without some branches, and whether it is still a network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import fx

from torchlathe.ir import Program, TensorKind, info
from torchlathe.ir.axes import Atom, AxisMap, Product, Term
from torchlathe.passes.analysis.branches import Branch, emptied
from torchlathe.passes.analysis.families import ZeroInvariantGroups
from torchlathe.passes.analysis.segments import SegmentGraph

__all__ = ["Liveness"]


class Liveness:
    """The calls and tensors that are alive while branches are taken out one after the other.

    A branch may go if every joint that reads it keeps an operand that carries data, so that by
    induction each output keeps a path from an input; and if no input is left unread. What is
    dead is found by counting readers, so that all removals together visit each edge once.
    (The validity test of OTOv3's hierarchical search, arXiv 2312.09411; a reconstruction.)

    Args:
        program: What branches are taken out of; it is not changed.
        graph: Its segments.
        flops: By name of the node.

    Attributes:
        dead: Calls, tensors and inputs that are not needed any more.
        taken: The branches that were taken out.
        parameters: Elements of the parameters that are gone, slices of living ones included.
        flops: FLOPs that are gone; those of sliced calls by the share of the weight that is left.
    """

    def __init__(
        self, program: Program, graph: SegmentGraph, flops: Mapping[str, int] | None = None
    ) -> None:
        self.program = program
        self.dead: set[fx.Node] = set()
        self.taken: list[Branch] = []
        self.parameters = 0
        self.flops = 0
        self._own = (0, 0)  # of what is dead as a whole
        self._flow = graph.flow
        self._flops = flops or {}
        self._readers = {node: len(node.users) for node in program.graph.nodes}
        self._operands: dict[fx.Node, set[fx.Node]] = {}
        self._sizes = {
            node: program.entries[name].tensor.numel()
            for name, node in program.tensor_nodes.items()
            if program.entries[name].kind is TensorKind.PARAMETER
        }

    def cost_of(self, branch: Branch) -> tuple[int, int] | str:
        """Parameters and FLOPs that go with a branch now, or why it cannot go."""
        found = self._dying(branch)
        if isinstance(found, str):
            return found
        parameters, flops = self._after(branch, found)
        return parameters - self.parameters, flops - self.flops

    def take(self, branch: Branch) -> str:
        """Take a branch out; the reason if it cannot go, and then nothing changes."""
        found = self._dying(branch)
        if isinstance(found, str):
            return found
        self.parameters, self.flops = self._after(branch, found)
        own, more = self._own, self._cost(found)
        self._own = (own[0] + more[0], own[1] + more[1])
        for joint in branch.joints:
            if joint not in self.dead:
                self._remaining(joint).discard(branch.exit)
        self.dead |= set(found)
        for node in found:
            for used in node.all_input_nodes:
                self._readers[used] -= 1
        self.taken.append(branch)
        return ""

    @property
    def effective(self) -> Iterator[Branch]:
        """The branches taken whose joints are not all dead by now."""
        return (b for b in self.taken if any(joint not in self.dead for joint in b.joints))

    def _dying(self, branch: Branch) -> list[fx.Node] | str:
        """What dies with a branch; or why it cannot go."""
        if branch.reason:
            return branch.reason
        if branch.exit in self.dead:
            return "it is gone already"
        for joint in branch.joints:
            if joint not in self.dead and not self._remaining(joint) - {branch.exit}:
                return f"%{joint.name} would have no operand left"
        found = [branch.exit]
        readers: dict[fx.Node, int] = {}
        for node in found:
            for used in node.all_input_nodes:
                if used in self.dead:
                    continue
                readers[used] = readers.get(used, self._readers[used]) - 1
                if readers[used] == 0:
                    if used.op == "placeholder" and info(used).tensor is None:
                        return f"the input %{used.name} would not be read any more"
                    found.append(used)
        if branch.families and (stuck := self._emptied(branch, found)):
            return stuck
        return found

    def _remaining(self, joint: fx.Node) -> set[fx.Node]:
        """The operands with data that a joint still has."""
        if joint not in self._operands:
            self._operands[joint] = set(self._flow.sources[joint])
        return self._operands[joint]

    def _emptied(self, branch: Branch, dying: list[fx.Node]) -> str:
        families = self.program.analysis(ZeroInvariantGroups)
        node = emptied(families, self._numbers(branch), self.dead | set(dying))
        return f"nothing would be left of what %{node.name} reads" if node else ""

    def _numbers(self, branch: Branch) -> set[int]:
        """Atoms of which nothing is left without the branches taken and this one."""
        gone = (branch, *(b for b in self.effective if b.families))
        return {family.atom.number for b in gone for family in b.families}

    def _cost(self, dying: list[fx.Node]) -> tuple[int, int]:
        parameters = sum(self._sizes.get(node, 0) for node in dying)
        return parameters, sum(self._flops.get(node.name, 0) for node in dying)

    def _after(self, branch: Branch, dying: list[fx.Node]) -> tuple[int, int]:
        """All that is gone once a branch is taken."""
        own, more = self._own, self._cost(dying)
        parameters, flops = own[0] + more[0], own[1] + more[1]
        numbers = self._numbers(branch)
        if not numbers:
            return parameters, flops
        analysis = self.program.analysis(ZeroInvariantGroups)
        dead = self.dead | set(dying)
        axis_map = analysis.axis_map
        touched = {n: None for number in sorted(numbers) for n in analysis.index.touching[number]}
        for node in touched:
            if node in self._sizes and node not in dead:
                left = math.prod(_left(term, numbers, axis_map) for term in axis_map.terms(node))
                parameters += self._sizes[node] - left
                less = 1 - left / self._sizes[node]
                spent = sum(self._flops.get(user.name, 0) for user in node.users)
                flops += round(less * spent)
        return parameters, flops


def _left(term: Term, numbers: set[int], axis_map: AxisMap) -> int:
    """The extent of an axis without some atoms."""
    term = axis_map.resolve(term)
    if isinstance(term, Atom):
        return 0 if term.number in numbers else int(term.extent)
    if isinstance(term, Product):
        return math.prod(_left(factor, numbers, axis_map) for factor in term.factors)
    return sum(_left(piece, numbers, axis_map) for piece in term.pieces)
