"""Running a program over all batches at once, node by node, with stops.

What a layer-by-layer method needs: every batch has arrived at the layer, none has gone beyond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tag, fx

from torchlathe.ir import Program
from torchlathe.ir.provenance import info

__all__ = ["LockstepRun"]


class LockstepRun:
    """The values of the nodes that are still to be read, for each batch.

    Memory: the live values of all batches at once; what no input goes into (a weight that is
    computed from others) is computed once, for all batches. Tensors of the program are read when
    they are used, so that what is changed in time counts.

    Args:
        program: What to run.
        batches: Flat inputs of each batch.

    Attributes:
        peak_bytes: The most memory that live values took so far, after any node.
    """

    def __init__(self, program: Program, batches: Sequence[Sequence[Any]]) -> None:
        self.program = program
        self.count = len(batches)
        self.values: dict[fx.Node, list[Any]] = {
            node: [batch[i] for batch in batches] for i, node in enumerate(program.input_nodes)
        }
        self._order = [n for n in program.graph.nodes if n.op == "call_function"]
        self._place = {node: i for i, node in enumerate(self._order)}
        self._next = 0
        self.peak_bytes = 0
        last: dict[fx.Node, fx.Node] = {}
        for node in program.graph.nodes:
            for used in node.all_input_nodes:
                last[used] = node
        self._fixed = _without_inputs(program)
        self._dying: dict[fx.Node, list[fx.Node]] = {}
        for used, user in last.items():
            self._dying.setdefault(user, []).append(used)

    def run_until(self, stop: fx.Node) -> None:
        """Run everything before a node, so that what it reads is there."""
        while self._next < self._place[stop]:
            self._step()

    def run_through(self, node: fx.Node) -> list[Any]:
        """Run up to a node and the node itself; its value for each batch."""
        self.run_until(node)
        if self._next == self._place[node]:
            self._step()
        return self.values[node]

    def run_all(self) -> None:
        """Run everything that is left."""
        while self._next < len(self._order):
            self._step()

    def value(self, node: fx.Node) -> list[Any]:
        """The value of a node for each batch, while something is still to read it."""
        if node in self.values:
            return self.values[node]
        name = info(node).tensor
        assert name is not None, f"{node} has no value now"
        return [self.program.entries[name].tensor] * self.count

    def _step(self) -> None:
        node = self._order[self._next]
        self._next += 1
        read = {used: self.value(used) for used in node.all_input_nodes}
        results = []
        with torch.no_grad():
            for index in range(1 if node in self._fixed else self.count):
                here = {used: values[index] for used, values in read.items()}
                args, kwargs = fx.map_arg((node.args, node.kwargs), here.__getitem__)
                results.append(node.target(*args, **kwargs))
        self.values[node] = results * self.count if node in self._fixed else results
        self.peak_bytes = max(self.peak_bytes, _bytes(self.values))
        for used in self._dying.get(node, ()):
            self.values.pop(used, None)
        if not node.users:
            del self.values[node]


def _without_inputs(program: Program) -> frozenset[fx.Node]:
    """The calls whose value is the same for every batch: nothing that they read comes from one."""
    found: set[fx.Node] = set()
    for node in program.graph.nodes:
        if node.op != "call_function" or node.is_impure(impure_random=True):
            continue
        if Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            continue
        if all(used in found or info(used).tensor for used in node.all_input_nodes):
            found.add(node)
    return frozenset(found)


def _bytes(values: Mapping[fx.Node, Sequence[Any]]) -> int:
    """Memory of live tensors; views of the same memory count once."""
    found = {}
    for each in values.values():
        for value in each:
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
