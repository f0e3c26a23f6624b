"""The segment graph: chains of operators, and which of them a network can do without.

A segment is a maximal chain of calls with one entry and one exit; every call that joins data of
several segments (an addition, a concatenation, attention) is a segment of its own. A segment is
removable if it has parameters, and whatever reads it is a joint that keeps another operand and
holds the same with the segment's parameters at zero. What is needed by nobody else dies with it,
which makes blocks, attention and whole sub-networks removable with their last segment.

Source: the segment graph and the removable segments of OTOv3 (arXiv 2312.09411), reconstructed
from its published graphs; dying by post-dominance, and the proof that a segment gives zeros, own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import fx

from torchlathe.ir import InputError, Program, TensorKind
from torchlathe.passes.analysis.branches import Branch, BranchFinder
from torchlathe.passes.analysis.constants import op_name
from torchlathe.passes.analysis.dataflow import DataFlow
from torchlathe.passes.analysis.dominance import PostDominators
from torchlathe.passes.base import AnalysisPass

if TYPE_CHECKING:
    import networkx

__all__ = ["Segment", "SegmentGraph", "Segments"]


@dataclass(frozen=True, eq=False)
class Segment:
    """A chain of calls, or one joint.

    Attributes:
        name: From the paths of its modules; unique, and stable between captures of a model.
        kind: "chain", "joint", or "output" for a chain that ends in an output of the model.
        op: What a joint does: "add", "cat", "mul", ...; None for a chain.
        nodes: Its calls, in execution order.
        parameters: Parameters that nothing else reads.
        parameter_count: Their number of elements.
        flops: Of its calls, at the sizes of the example inputs; 0 where they are not known.
        successors: Names of the segments that read it.
        branch: What removing it does; None where that cannot be thought of.
        reason: Why it is not removable; empty if it is.
    """

    name: str
    kind: Literal["chain", "joint", "output"]
    op: str | None
    nodes: tuple[fx.Node, ...]
    parameters: tuple[str, ...]
    parameter_count: int
    flops: int
    successors: tuple[str, ...]
    branch: Branch | None
    reason: str

    @property
    def removable(self) -> bool:
        """Whether the network is whole, and the same as with zeros, without it."""
        return not self.reason

    def __str__(self) -> str:
        return f"{self.name} ({self.reason or 'removable'})"


@dataclass(frozen=True, eq=False)
class SegmentGraph:
    """All segments of a program, in execution order.

    Attributes:
        segments: Chains and joints.
        flow: The graph that they were cut from.
    """

    segments: tuple[Segment, ...]
    flow: DataFlow = field(repr=False)

    def __iter__(self) -> Iterator[Segment]:
        return iter(self.segments)

    def __len__(self) -> int:
        return len(self.segments)

    @cached_property
    def removable(self) -> tuple[Segment, ...]:
        """The segments that can be removed one by one; not all of them at once."""
        return tuple(s for s in self.segments if s.removable)

    @cached_property
    def branches(self) -> tuple[Branch, ...]:
        """What can be left out at joints, whether it may or not, in execution order."""
        return tuple(s.branch for s in self.segments if s.branch is not None)

    def by_name(self, name: str) -> Segment:
        """The segment of this name, or the one whose branch has it.

        Raises:
            KeyError: There is none.
        """
        for segment in self.segments:
            if name in (segment.name, segment.branch.name if segment.branch else None):
                return segment
        raise KeyError(name)

    def to_networkx(self) -> networkx.DiGraph[str]:
        """Segments by name, with an edge to each that reads them."""
        import networkx

        graph: networkx.DiGraph[str] = networkx.DiGraph()
        for segment in self.segments:
            graph.add_node(
                segment.name,
                kind=segment.kind,
                op=segment.op,
                parameters=segment.parameter_count,
                flops=segment.flops,
                removable=segment.removable,
                reason=segment.reason,
            )
        for segment in self.segments:
            graph.add_edges_from((segment.name, reader) for reader in segment.successors)
        return graph


@dataclass(frozen=True)
class Segments(AnalysisPass[SegmentGraph]):
    """Cuts the network into segments, and finds those that it can do without."""

    name: ClassVar[str] = "segments"

    def compute(self, program: Program) -> SegmentGraph:
        """Cut at forks and joints; ask for each last call of a segment what it holds."""
        return _Cutter(program).run()

    def same(self, a: SegmentGraph, b: SegmentGraph) -> bool:
        """The same segments with the same verdicts."""

        def rows(graph: SegmentGraph) -> list[Any]:
            return [(s.name, s.kind, s.parameters, s.successors, s.reason) for s in graph]

        return rows(a) == rows(b)

    def statistics(self, result: SegmentGraph) -> dict[str, int | float]:
        """Counts of segments, and the largest share of the parameters that one takes along."""
        return {
            "segments": len(result),
            "joints": sum(s.kind == "joint" for s in result),
            "removable": len(result.removable),
            "largest": max((b.parameter_count for b in result.branches if not b.reason), default=0),
        }


class _Cutter:
    """One run of the analysis."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.flow = DataFlow(program)
        self.dominators = PostDominators(program.graph)
        self.flops = _flops(program)

    def run(self) -> SegmentGraph:
        chains, home = self._cut()
        owned = self._owned(home)
        names = self._names(chains, owned)
        finder = BranchFinder(self.program, self.flow, self.dominators, self.flops)
        sizes = {name: t.numel() for name, t in self.program.parameters.items()}
        segments = []
        for number, nodes in enumerate(chains):
            last = nodes[-1]
            readers = self.flow.readers[last]
            following = dict.fromkeys(home[n] for n in readers if n in home)
            joint = self.flow.is_joint(nodes[0])
            ends = any(n.op == "output" for n in readers)
            branch, reason = finder.find(nodes, owned[number], names[number])
            segments.append(
                Segment(
                    name=names[number],
                    kind="joint" if joint else "output" if ends else "chain",
                    op=op_name(last) if joint else None,
                    nodes=nodes,
                    parameters=tuple(owned[number]),
                    parameter_count=sum(sizes[name] for name in owned[number]),
                    flops=sum(self.flops.get(n.name, 0) for n in nodes),
                    successors=tuple(names[i] for i in following),
                    branch=branch,
                    reason=reason,
                )
            )
        return SegmentGraph(tuple(segments), self.flow)

    def _cut(self) -> tuple[list[tuple[fx.Node, ...]], dict[fx.Node, int]]:
        """The chains, and which of them each call is in."""
        chains: list[list[fx.Node]] = []
        home: dict[fx.Node, int] = {}
        flow = self.flow
        for node in flow.nodes:
            sources = flow.sources[node]
            before = sources[0]
            if (
                len(sources) == 1
                and before in home
                and not flow.is_joint(before)
                and len(flow.readers[before]) == 1
            ):
                home[node] = home[before]
                chains[home[node]].append(node)
            else:
                home[node] = len(chains)
                chains.append([node])
        return [tuple(chain) for chain in chains], home

    def _owned(self, home: Mapping[fx.Node, int]) -> dict[int, list[str]]:
        """Per chain, the parameters that only its calls read."""
        owned: dict[int, list[str]] = {number: [] for number in home.values()}
        for name, entry in self.program.entries.items():
            users = self.flow.users_of(name)
            places = {home.get(user) for user in users}
            if entry.kind is TensorKind.PARAMETER and len(places) == 1:
                place = places.pop()
                if place is not None:
                    owned[place].append(name)
        return owned

    def _names(
        self, chains: list[tuple[fx.Node, ...]], owned: Mapping[int, list[str]]
    ) -> list[str]:
        names: list[str] = []
        seen: dict[str, int] = {}
        for number, nodes in enumerate(chains):
            name = self.flow.name_of(nodes, owned[number])
            seen[name] = seen.get(name, 0) + 1
            names.append(name if seen[name] == 1 else f"{name}/{seen[name]}")
        return names


def _flops(program: Program) -> dict[str, int]:
    """FLOPs by name of the node; none where data decides an extent."""
    try:
        cost = program.cost().at()
    except InputError:
        return {}
    return {name: int(spent.flops) for name, spent in cost.nodes.items()}
