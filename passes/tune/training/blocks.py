"""Cutting a graph into blocks that run one after the other.

A flat graph has no modules left whose parameters could be gathered or whose activations could be
computed again at a time, as FSDP and checkpointing of activations want it. Blocks bring them back:
runs of nodes that come from one repeated module, ``encoder.layer.3``. Source: own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from torchlathe.ir.provenance import info, module_path

__all__ = ["Piece", "block_name", "cut", "starts_of_blocks"]

_REPEATED = re.compile(r"^(?:.*?\.)??\d+(?=\.|$)")


@dataclass(frozen=True)
class Piece:
    """A part of a graph.

    Attributes:
        graph: Placeholders are ``tensors``, then ``inputs``; gives a tuple of ``outputs``.
        tensors: Names of the tensors that it reads.
        inputs: Names of the nodes that it reads.
        outputs: Names of its nodes that are read after it.
    """

    graph: fx.Graph
    tensors: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def block_name(node: fx.Node) -> str | None:
    """Path of the outermost numbered module that a node comes from: ``encoder.layer.3``."""
    found = _REPEATED.match(module_path(node))
    return found.group() if found else None


def starts_of_blocks(graph: fx.Graph) -> list[str]:
    """Names of the nodes with which a block begins; the first call of the graph is one."""
    starts: list[str] = []
    now: str | None = None
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        name = block_name(node)
        # What comes from no block (masks, the head) stays with the block that runs.
        if not starts or (name is not None and name != now):
            starts.append(node.name)
            now = name
    return starts


def cut(graph: fx.Graph, starts: Sequence[str], wanted: Sequence[str] = ()) -> list[Piece]:
    """The parts of a graph in lifted form.

    Args:
        graph: The graph.
        starts: Names of the nodes with which parts begin, the first call among them.
        wanted: Names of nodes whose values are outputs, besides those of the graph.
    """
    place: dict[fx.Node, int] = {}
    members: list[list[fx.Node]] = []
    first = set(starts)
    for node in graph.nodes:
        if node.op == "call_function":
            if node.name in first:
                members.append([])
            members[-1].append(node)
            place[node] = len(members) - 1
    return [_piece(nodes, index, place, set(wanted)) for index, nodes in enumerate(members)]


def _piece(
    nodes: Sequence[fx.Node], index: int, place: dict[fx.Node, int], wanted: set[str]
) -> Piece:
    read = dict.fromkeys(
        used for node in nodes for used in node.all_input_nodes if place.get(used) != index
    )
    tensors = {used: name for used in read if (name := info(used).tensor) is not None}
    inputs = [used for used in read if used not in tensors]
    outputs = [
        node
        for node in nodes
        if node.name in wanted or any(place.get(user, -1) != index for user in node.users)
    ]
    graph = fx.Graph()
    made = {used: graph.placeholder(f"a{i}") for i, used in enumerate([*tensors, *inputs])}
    for node in nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
    graph.output(tuple(made[node] for node in outputs))
    return Piece(
        graph,
        tuple(tensors.values()),
        tuple(node.name for node in inputs),
        tuple(node.name for node in outputs),
    )
