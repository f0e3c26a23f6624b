"""Which node of one program stands for which of another.

Outputs are aligned with outputs. Passes keep the names of the nodes that they leave alone, and
nodes that they make remember the name of the one whose value they give, so two programs of one
capture are aligned by name. For the rest, and for programs that were captured apart, provenance
decides: the module path, the op, and how often it came before. What a pass replaced by other ops is
aligned where a module's value comes out: its last node in either program. Source: own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import fx

from torchlathe.ir import Program, info, module_path

__all__ = ["align"]


def align(first: Program, second: Program) -> dict[fx.Node, fx.Node]:
    """Pairs of nodes that stand for the same value; inputs and call nodes.

    Args:
        first: The program that the keys are of.
        second: The program that the values are of.
    """
    pairs: dict[fx.Node, fx.Node] = dict(zip(first.input_nodes, second.input_nodes, strict=False))
    ours, theirs = _calls(first), _calls(second)
    pairs.update(_outputs(first, second))
    taken = set(pairs.values())
    named = {node.name: node for node in theirs}
    # The last one, where a value was split into several that each stand for it.
    instead = {info(node).stands_for: node for node in theirs}
    for node in ours:
        other = named.get(node.name)
        if other is None or other.target is not node.target or not _same_place(node, other):
            other = instead.get(node.name)
        if other is not None and node not in pairs and other not in taken:
            pairs[node] = other
            taken.add(other)
    _by_provenance(ours, theirs, pairs)
    _by_module(ours, theirs, pairs)
    return pairs


def _outputs(first: Program, second: Program) -> dict[fx.Node, fx.Node]:
    """Pairs of the calls that give the outputs, where both have as many."""
    ours, theirs = first.output_node.args[0], second.output_node.args[0]
    assert isinstance(ours, tuple | list)
    assert isinstance(theirs, tuple | list)
    if len(ours) != len(theirs):
        return {}
    found: dict[fx.Node, fx.Node] = {}
    for node, other in zip(ours, theirs, strict=True):
        calls = [isinstance(n, fx.Node) and n.op == "call_function" for n in (node, other)]
        if all(calls) and node not in found and other not in found.values():
            found[node] = other
    return found


def _calls(program: Program) -> list[fx.Node]:
    return [node for node in program.nodes if node.op == "call_function"]


def _same_place(node: fx.Node, other: fx.Node) -> bool:
    return module_path(node) == module_path(other)


def _by_provenance(
    ours: Iterable[fx.Node], theirs: Iterable[fx.Node], pairs: dict[fx.Node, fx.Node]
) -> None:
    """Pair what is left by module, op and order, where both have as many of it."""
    taken = set(pairs.values())
    left = _grouped(n for n in ours if n not in pairs)
    right = _grouped(n for n in theirs if n not in taken)
    for key, nodes in left.items():
        others = right.get(key, [])
        if len(nodes) == len(others):
            pairs.update(zip(nodes, others, strict=True))


def _grouped(nodes: Iterable[fx.Node]) -> dict[tuple[str, object], list[fx.Node]]:
    found: dict[tuple[str, object], list[fx.Node]] = defaultdict(list)
    for node in nodes:
        found[module_path(node), node.target].append(node)
    return found


def _by_module(
    ours: Iterable[fx.Node], theirs: Iterable[fx.Node], pairs: dict[fx.Node, fx.Node]
) -> None:
    """Pair the last nodes of a module, whatever ops they are."""
    taken = set(pairs.values())
    left, right = _last(ours), _last(theirs)
    for path, node in left.items():
        other = right.get(path)
        if path and other is not None and node not in pairs and other not in taken:
            pairs[node] = other


def _last(nodes: Iterable[fx.Node]) -> Mapping[str, fx.Node]:
    """The last node of each module that gives floating values."""
    found: dict[str, fx.Node] = {}
    for node in nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            found[_path(node)] = node
    return found


def _path(node: fx.Node) -> str:
    """The module of a node; what a pass added has that of the node whose place it takes."""
    return module_path(node) or (info(node).tensor or "")
