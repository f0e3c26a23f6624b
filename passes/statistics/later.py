"""Second moments of what the calls of a parameter read after its first one.

A layer-by-layer method changes a parameter where the data arrives at its first call. What the other
calls are going to read depends on that change, and on those of layers between; so it is taken from
the program as it was. That is a run of its own for each parameter that has other calls, so that one
of these moments is held at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from torchlathe.ir import Program
from torchlathe.ir.interpreting import run_flat
from torchlathe.ir.provenance import info
from torchlathe.passes.statistics.arriving import Arrival, MomentSum
from torchlathe.passes.statistics.readers import Reader
from torchlathe.passes.statistics.routed import Routed, RoutedMoments

__all__ = ["LaterCalls"]


class LaterCalls:
    """The calls of parameters after the first of each, in a program as it was.

    Args:
        program: As it is before any change.
        readers: These calls, by name of the parameter.

    Attributes:
        program: A copy of the program; None if there are no such calls.
    """

    def __init__(self, program: Program, readers: Mapping[str, Sequence[Reader | Routed]]) -> None:
        self.program = program.copy() if any(readers.values()) else None
        self._readers: dict[str, list[Reader | Routed]] = {}
        if self.program is not None:
            there = {node.name: node for node in self.program.graph.nodes}
            for name, own in readers.items():
                self._readers[name] = [_moved(reader, there) for reader in own]

    def joined(self, name: str, arrival: Arrival, batches: Sequence[Sequence[Any]]) -> Arrival:
        """What arrived at the first call of a parameter, together with what the others read.

        Args:
            name: Of the parameter.
            arrival: At its first call.
            batches: Flat inputs of each batch.
        """
        readers = self._readers.get(name)
        if not readers:
            return arrival
        total, rows, ends = MomentSum(), list[Tensor](), list[Tensor]()
        for batch in batches:
            seen = self._run(readers, batch)
            for reader in readers:
                if isinstance(reader, Routed):
                    rows.append(seen[reader.operand])
                    ends.append(seen[reader.ends])
                else:
                    total.add(reader, seen[reader.operand])
        if isinstance(arrival.moments, RoutedMoments):
            routed = arrival.moments.with_more(rows, ends)
            return Arrival(arrival.reader, routed, routed.counts)
        counts = tuple(count + total.count for count in arrival.counts)
        moments = tuple(total.mean())
        for moment, own, count in zip(moments, arrival.moments, counts, strict=True):
            share = total.count / max(count, 1)
            moment.mul_(share).add_(own, alpha=1 - share)
        return Arrival(arrival.reader, moments, counts)

    def _run(self, readers: Sequence[Reader | Routed], batch: Sequence[Any]) -> dict[fx.Node, Any]:
        """What the calls read of one batch."""
        assert self.program is not None
        wanted = {reader.operand for reader in readers}
        wanted |= {reader.ends for reader in readers if isinstance(reader, Routed)}
        inputs = zip(self.program.input_nodes, batch, strict=True)
        seen = {node: value for node, value in inputs if node in wanted}
        for node in wanted:
            if (name := info(node).tensor) is not None:
                seen[node] = self.program.tensor(name).detach()

        def observe(node: fx.Node, value: Any) -> None:
            if node in wanted:
                seen[node] = value

        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            run_flat(self.program, batch, observe=observe)
        return seen


def _moved(reader: Reader | Routed, there: Mapping[str, fx.Node]) -> Reader | Routed:
    """The reader in a copy of its graph."""
    node, operand = there[reader.node.name], there[reader.operand.name]
    if isinstance(reader, Routed):
        return replace(reader, node=node, operand=operand, ends=there[reader.ends.name])
    return replace(reader, node=node, operand=operand)
