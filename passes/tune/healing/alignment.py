"""Which node of a rewritten program should have the value of which node of the original.

Source: own.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.ir.provenance import module_path
from torchlathe.passes.tune.training.blocks import block_name

__all__ = ["aligned_blocks", "aligned_nodes", "logits_among"]

_PASSING_ON = frozenset(
    {
        "view",
        "reshape",
        "_unsafe_view",
        "slice",
        "squeeze",
        "unsqueeze",
        "clone",
        "contiguous",
        "_to_copy",
        "to",
        "select",
        "transpose",
        "permute",
        "flatten",
    }
)
_PRODUCTS = frozenset({"linear", "addmm", "mm", "matmul", "bmm", "conv2d", "conv1d"})
_NOT_LOGITS = ("hidden", "embed", "pooler", "pooled", "feature", "state")


def aligned_nodes(original: Program, program: Program) -> dict[fx.Node, fx.Node]:
    """Nodes of the program, in order, to those of the original that they stand for.

    Nodes that no pass replaced have their names still. Where a pass wrote others instead, the last
    that came from a module stands for the last of that module in the original, if each module's
    calls are one run of nodes; only values of equal shape are taken for the same.
    """
    named = {node.name: node for node in original.graph.nodes if node.op == "call_function"}
    ends, others = _ends(program), _ends(original)
    found = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        same = named.get(node.name)
        if same is not None and same.target == node.target and _alike(same, node):
            found[node] = same
            continue
        path = module_path(node)
        theirs = others.get(path)
        if theirs is not None and ends.get(path) == node and _alike(theirs, node):
            found[node] = theirs
    taken = Counter(found.values())
    return {node: other for node, other in found.items() if taken[other] == 1}


def _ends(program: Program) -> dict[str, fx.Node]:
    """The last node of each module that is called once; a call is one run of nodes."""
    last: dict[str, fx.Node] = {}
    runs: Counter[str] = Counter()
    now = None
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        path = module_path(node)
        if path != now:
            runs[path] += 1
        now = path
        last[path] = node
    return {path: node for path, node in last.items() if path and runs[path] == 1}


def _alike(a: fx.Node, b: fx.Node) -> bool:
    """Whether both give one floating tensor, of the same extents where they are numbers."""
    first, second = a.meta.get("val"), b.meta.get("val")
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return False
    if not first.is_floating_point() or first.dim() != second.dim() or not first.dim():
        return False
    pairs = zip(first.shape, second.shape, strict=True)
    # Symbols of the two programs are the same expressions, as their graphs are copies.
    return all(str(x) == str(y) for x, y in pairs)


def aligned_blocks(original: Program, program: Program) -> dict[str, tuple[str, str]]:
    """Per block that both have, the names of its last aligned nodes: here, and in the original."""
    found = {}
    for node, other in aligned_nodes(original, program).items():
        name = block_name(node)
        if name is not None and name == block_name(other):
            found[name] = (node.name, other.name)
    return found


def logits_among(program: Program, names: list[str]) -> list[bool]:
    """Which flat outputs look like logits: they end in a product with more than one column.

    Args:
        program: The original.
        names: Of its flat outputs, as a caller would write them; some names tell.
    """
    outputs: Any = program.output_node.args[0]
    return [_is_logits(node, name.lower()) for node, name in zip(outputs, names, strict=True)]


def _is_logits(node: Any, name: str) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or not value.is_floating_point():
        return False
    if not isinstance(value.shape[-1], int) or value.shape[-1] < 2:
        return False
    if "logits" in name:
        return True
    if any(word in name for word in _NOT_LOGITS):
        return False
    while _op(node) in _PASSING_ON:
        node = node.args[0]
    return _op(node) in _PRODUCTS


def _op(node: Any) -> str:
    if not isinstance(node, fx.Node) or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return str(node.target._schema.name.partition("::")[2])
