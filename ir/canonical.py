"""Putting decomposed norms back together, for programs that were exported to core ATen."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

__all__ = ["restore_norms"]

_ATEN = torch.ops.aten


def restore_norms(graph: fx.Graph) -> None:
    """Replace norms that give their statistics too by those that do not, where nobody reads them.

    ``native_layer_norm`` and ``native_group_norm`` are what ``run_decompositions`` makes of
    ``layer_norm`` and ``group_norm``; the rest of the compiler knows the latter.
    """
    for target, restored in (
        (_ATEN.native_layer_norm.default, _ATEN.layer_norm.default),
        (_ATEN.native_group_norm.default, _ATEN.group_norm.default),
    ):
        for node in graph.find_nodes(op="call_function", target=target):
            if all(_is_first(user) for user in node.users):
                _restore(graph, node, restored)


def _is_first(user: fx.Node) -> bool:
    return user.target is operator.getitem and user.args[1:] == (0,)


def _restore(graph: fx.Graph, node: fx.Node, target: Any) -> None:
    given = _arguments(node)
    x, weight, bias, eps = (given[name] for name in ("input", "weight", "bias", "eps"))
    shape = given["normalized_shape"] if "normalized_shape" in given else given["group"]
    with graph.inserting_before(node):
        new = graph.call_function(target, (x, shape, weight, bias, eps))
    new.meta.update(node.meta)
    new.meta["val"] = node.meta["val"][0]
    new.meta.pop("tensor_meta", None)
    for user in list(node.users):
        user.replace_all_uses_with(new)
        graph.erase_node(user)
    graph.erase_node(node)


def _arguments(node: fx.Node) -> Mapping[str, Any]:
    """Arguments by their names in the op's schema."""
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}
