"""What ops do to the numbers that a router's choice gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from torch import fx

from torchlathe.passes.analysis.constants import op_name

__all__ = [
    "ARRANGING",
    "CARRYING",
    "CONTRACTING",
    "COUNTING",
    "GROUPED",
    "SUMMING",
    "choices",
    "counted",
    "index_axis",
    "op_input",
    "other_reader",
]

# Ops whose result are the same numbers, in another order, shape or dtype.
CARRYING: Final = frozenset(
    (
        *("view", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze", "expand"),
        *("to", "_to_copy", "type_as", "clone", "contiguous", "alias", "detach"),
        *("transpose", "permute", "t", "movedim", "select", "slice", "split", "chunk", "unbind"),
    )
)
COUNTING: Final = frozenset({"histc", "bincount", "one_hot"})
# Ops on counts along the axis of the experts.
SUMMING: Final = frozenset({"cumsum", "sum", *CARRYING})
GROUPED: Final = frozenset({"_grouped_mm", "grouped_mm", "transformers.grouped_mm_fallback"})
CONTRACTING: Final = frozenset(
    {"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "conv1d"}
)
# From a tensor to what reads its experts; positions of axes can be followed.
ARRANGING: Final = frozenset(
    {"transpose", "permute", "t", "to", "_to_copy", "contiguous", "clone", "alias", "detach"}
)


def op_input(node: fx.Node) -> fx.Node:
    """The first operand of a call, however it was passed.

    Raises:
        ValueError: It has none.
    """
    for value in (*node.args, *node.kwargs.values()):
        if isinstance(value, fx.Node):
            return value
    raise ValueError(f"{node} reads nothing")


def choices(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node, int]]:
    """Numbers that a choice along an axis gives, what it chooses by, and the axis."""
    for node in graph.nodes:
        name = op_name(node) if node.op == "call_function" else ""
        if name == "argmax":
            axis = _argument(node, 1, "dim")
            if isinstance(axis, int):
                yield node, op_input(node), axis
        elif name == "topk" or (name == "max" and isinstance(node.meta["val"], tuple | list)):
            axis = _argument(node, 2 if name == "topk" else 1, "dim")
            for user in node.users:
                if op_name(user) == "getitem" and user.args[1] == 1:
                    yield user, op_input(node), -1 if axis is None else axis


def _argument(node: fx.Node, place: int, name: str) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def index_axis(user: fx.Node, node: fx.Node) -> int | None:
    """The axis that an index picks from, if it picks from just one."""
    name = op_name(user)
    if name == "embedding":
        return 0 if user.args[1] is node else None
    if name == "index_select":
        return int(user.args[1]) if user.args[2] is node else None  # type: ignore[arg-type]
    indices = list(user.args[1])  # type: ignore[arg-type]
    given = [axis for axis, index in enumerate(indices) if index is not None]
    return given[0] if len(given) == 1 and indices[given[0]] is node else None


def counted(node: fx.Node) -> Any:
    """How many numbers an op counts, or gives a code for."""
    if op_name(node) == "histc":
        bins, low, high = (
            _argument(node, place, name) for place, name in ((1, "bins"), (2, "min"), (3, "max"))
        )
        return bins if low in (0, None) and high == bins - 1 else None
    if op_name(node) == "bincount":
        return _argument(node, 2, "minlength")
    return _argument(node, 1, "num_classes")


def other_reader(node: fx.Node, known: set[fx.Node]) -> fx.Node | None:
    """A node that reads a tensor, through arrangements, and is not known to."""
    for user in node.users:
        if user in known:
            continue
        if op_name(user) not in ARRANGING:
            return user
        if found := other_reader(user, known):
            return found
    return None
