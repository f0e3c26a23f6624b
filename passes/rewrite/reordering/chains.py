"""Maximal chains of affine maps in a program, and the cheapest way to cut each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from torchlathe.ir import InputError, Program
from torchlathe.passes.rewrite.reordering.maps import AffineMap, composable, read_map

__all__ = ["Segment", "cut", "find_chains"]

aten = torch.ops.aten
_COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)


@dataclass(frozen=True, eq=False)
class Segment:
    """Maps that become one.

    Attributes:
        maps: In order.
        whole: What they are together.
        flops: Of that, at the sizes of the example inputs; less than before.
        saved: FLOPs (and elementwise operations) that go.
    """

    maps: tuple[AffineMap, ...]
    whole: AffineMap
    flops: float
    saved: float


def find_chains(program: Program) -> list[list[AffineMap]]:
    """Chains of two or more maps, where nothing else reads what is between them."""
    maps = {}
    for node in program.nodes:
        if node.op == "call_function":
            found = read_map(program, node)
            if found is not None:
                maps[node] = found
    before: dict[fx.Node, fx.Node] = {}
    for node in maps:
        source = _source(node)
        if source in maps:
            before[node] = source
    after = {source: node for node, source in before.items()}
    chains = []
    for node in maps:
        if node in before or node not in after:
            continue
        chain = [maps[node]]
        while node in after:
            node = after[node]
            chain.append(maps[node])
        chains.append(chain)
    return chains


def _source(node: fx.Node) -> fx.Node | None:
    """What gives the data of a call, if only this call reads it; copies are looked through."""
    place = 1 if node.target is aten.embedding.default else 0
    source = node.args[place]
    while isinstance(source, fx.Node) and len(source.users) == 1:
        idle = source.target is aten.dropout.default and not source.args[2]
        if source.target not in _COPIES and not idle:
            return source
        source = source.args[0]
    return None


def cut(program: Program, chain: Sequence[AffineMap], *, grow: bool) -> list[Segment]:
    """The segments of a chain that are to become one call each, for the fewest FLOPs in all.

    Shortest path over the places where the chain may be cut.

    Args:
        program: Where the chain is.
        chain: Its maps.
        grow: Whether a segment may have more parameters than its maps have.
    """
    spent = _spent(program)
    best: list[tuple[float, float, int]] = [(0.0, 0.0, 0)]
    segments: dict[tuple[int, int], Segment] = {}
    for end in range(1, len(chain) + 1):
        options = []
        for start in range(end):
            if start == end - 1:
                cost, calls = spent.get(chain[start].window, 0.0), 1
            else:
                found = _segment(chain[start:end], spent, grow)
                if found is None:
                    continue
                segments[start, end] = found
                cost, calls = found.flops, 1
            options.append((best[start][0] + cost, best[start][1] + calls, start))
        best.append(min(options))
    chosen = []
    end = len(chain)
    while end:
        start = best[end][2]
        if (start, end) in segments:
            chosen.append(segments[start, end])
        end = start
    return chosen[::-1]


def _segment(
    maps: Sequence[AffineMap], spent: Mapping[fx.Node, float], grow: bool
) -> Segment | None:
    whole: AffineMap | None = maps[0]
    for following in maps[1:]:
        whole = None if whole is None else composable(whole, following)
    if whole is None:
        return None
    if any(_shared(single) for single in maps):
        return None
    if whole.parameters > sum(single.parameters for single in maps) and not grow:
        return None
    before = sum(spent.get(single.window, 0.0) for single in maps)
    # A lookup has no FLOPs; everything else has them in proportion to its weight.
    after = 0.0
    if whole.kind != "embedding":
        last = next((m for m in reversed(maps) if m.kind != "scale"), maps[-1])
        after = spent.get(last.window, 0.0) * whole.parameters / last.parameters
    return Segment(tuple(maps), whole, after, before - after) if after <= before else None


def _shared(single: AffineMap) -> bool:
    """Whether another call reads its weight, which would then be stored twice."""
    if single.kind == "scale":
        return False
    weight = single.window.args[0 if single.kind == "embedding" else 1]
    return isinstance(weight, fx.Node) and len(weight.users) > 1


def _spent(program: Program) -> dict[fx.Node, float]:
    """FLOPs of each call; at a size of one where the data decides."""
    try:
        nodes = program.cost().at().nodes
    except InputError:
        return {}
    by_name = {node.name: node for node in program.nodes}
    return {by_name[name]: float(c.flops + c.other_flops) for name, c in nodes.items()}
