"""Looking at values through the nodes that change nothing.

Models that were written to be trained are full of them: dropout that is off, casts to the type
that a value has, slices of the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from torchlathe.ir.axes.rule import argument

__all__ = ["next_reader", "source"]

aten = torch.ops.aten

_UNCHANGED = frozenset(
    {
        aten.to.dtype,
        aten.to.dtype_layout,
        aten._to_copy.default,
        aten.type_as.default,
        aten.alias.default,
        aten.detach.default,
        aten.slice.Tensor,
    }
)


def source(node: fx.Node) -> fx.Node:
    """The first node of the same value."""
    while _changes_nothing(node):
        inner = node.args[0]
        assert isinstance(inner, fx.Node)
        node = inner
    return node


def next_reader(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The one op that reads a value, and the node through which it does; None if there are more."""
    while True:
        users = list(node.users)
        if len(users) != 1 or users[0].op != "call_function":
            return None
        if not _changes_nothing(users[0]):
            return node, users[0]
        node = users[0]


def _changes_nothing(node: fx.Node) -> bool:
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    if node.target is aten.dropout.default:
        return argument(node, "train") is False or argument(node, "p") == 0
    if node.target not in _UNCHANGED:
        return False
    mine: Any = node.meta.get("val")
    its: Any = node.args[0].meta.get("val")
    if not isinstance(mine, torch.Tensor) or not isinstance(its, torch.Tensor):
        return False
    same = mine.shape == its.shape and mine.dtype == its.dtype and mine.device == its.device
    # A slice of the same shape, with a step of one, is the whole.
    return same and (node.target is not aten.slice.Tensor or argument(node, "step") == 1)
