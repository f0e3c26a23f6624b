"""Where a program has caches: inputs that come back as outputs with new rows in them.

A decoding step reads the keys and values of the tokens so far, joins those of the new ones to them
(or writes them into their places), and gives all of it back. What lies between input and output
only moves rows about, so that it is the same for rows of bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.ir.provenance import info

__all__ = ["Cache", "find_caches", "holds_keys", "output_paths", "rows_of", "token_axis"]

aten = torch.ops.aten

# Ops that give rows back as they are, by the places of the arguments that hold rows.
_MOVES: dict[Any, tuple[int, ...]] = {
    aten.alias.default: (0,),
    aten.detach.default: (0,),
    aten.clone.default: (0,),
    aten.contiguous.default: (0,),
    aten.lift_fresh_copy.default: (0,),
    aten.index_copy.default: (0, 3),
    aten.index_put.default: (0, 2),
    aten.slice_scatter.default: (0, 1),
    aten.slice.Tensor: (0,),
    aten.index_select.default: (0,),
}

# Ops that put new rows to those before, by the place of the argument that says along which axis.
_JOINS: dict[Any, int] = {
    aten.cat.default: 1,
    aten.index_copy.default: 1,
    aten.slice_scatter.default: 2,
}
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)


@dataclass(frozen=True, eq=False)
class Cache:
    """One tensor of keys or values.

    Attributes:
        past: The input that holds the rows so far; None where the program only makes rows.
        steps: What joins new rows to it, in order; the last is given back.
        place: Of the output.
        name: As a caller writes it.
        columns: Channels of a head.
        dtype: Of the rows.
    """

    past: fx.Node | None
    steps: tuple[fx.Node, ...]
    place: int
    name: str
    columns: int
    dtype: torch.dtype


def find_caches(program: Program) -> list[Cache]:
    """All caches of a program, in the order of its outputs.

    Outputs that are called a cache by those who read them, but join nothing to an input, are caches
    that begin here: those of a prompt.
    """
    outputs: Any = program.output_node.args[0]
    paths = output_paths(program)
    found: list[Cache] = []
    for place, (node, path) in enumerate(zip(outputs, paths, strict=True)):
        if not _is_rows(node):
            continue
        columns, kind = node.meta["val"].shape[-1], node.meta["val"].dtype
        if not isinstance(columns, int):
            continue
        chain = _chain(node)
        if chain is not None:
            past, steps = chain
            found.append(Cache(past, steps, place, path, columns, kind))
        elif any(word in path for word in ("cache", "past_key_value")):
            if _reads_rows(node, columns):
                continue  # it holds an input that stays floating, in a way that is not known
            found.append(Cache(None, (node,), place, path, columns, kind))
    return found


def _reads_rows(node: fx.Node, columns: int) -> bool:
    """Whether rows that a caller gives go into a value, or are it."""
    seen, todo = {node}, [node]
    while todo:
        part = todo.pop()
        given = part.op == "placeholder" and info(part).tensor is None
        if given and _is_rows(part) and part.meta["val"].shape[-1] == columns:
            return True
        todo += [each for each in part.all_input_nodes if each not in seen]
        seen |= set(part.all_input_nodes)
    return False


def output_paths(program: Program) -> list[str]:
    """What each flat output is called, as far as its structure has names."""
    from torch.utils import _pytree as pytree

    flat: Any = program.output_node.args[0]
    marks = [str(place) for place in range(len(flat))]
    try:
        tree = program.unflatten_outputs(marks)
        found, _ = pytree.tree_flatten_with_path(tree)
    except (AttributeError, TypeError, ValueError, RuntimeError):
        # A class that is only made of tensors: its fields are in the spec.
        return _names(program.out_spec, "")
    return [pytree.keystr(path) for path, _ in found]


def _names(spec: Any, name: str) -> list[str]:
    """Names of the leaves of a structure, by the keys of its dictionaries."""
    if spec.is_leaf():
        return [name]
    keys = spec.context
    if isinstance(keys, list | tuple) and keys and isinstance(keys[0], list | tuple):
        keys = keys[0]
    parts = spec.children()
    named = isinstance(keys, list | tuple) and len(keys) == len(parts)
    found: list[str] = []
    for place, part in enumerate(parts):
        key = repr(keys[place]) if named else str(place)
        found += _names(part, f"{name}[{key}]")
    return found


def _is_rows(node: Any) -> bool:
    """Whether a value has rows of heads: floating, of four axes."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dim() == 4 and value.is_floating_point()


def _chain(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """The input that an output's rows come from, and what was done to them on the way."""
    steps: list[fx.Node] = []
    while node.op == "call_function":
        steps.append(node)
        before = [part for part in rows_of(node) if _from_input(part)]
        if len(before) != 1:
            return None
        node = before[0]
    if node.op != "placeholder" or info(node).tensor is not None or not steps:
        return None
    return node, tuple(reversed(steps))


def _from_input(node: fx.Node) -> bool:
    """Whether rows come from an input by nothing but moves."""
    while node.op == "call_function":
        parts = [part for part in rows_of(node) if _from_input(part)]
        if len(parts) != 1:
            return False
        node = parts[0]
    return node.op == "placeholder" and info(node).tensor is None and _is_rows(node)


def token_axis(cache: Cache) -> int:
    """The axis along which new rows are joined."""
    for step in cache.steps:
        if step.target is aten.index_put.default:
            indices: Any = step.args[1]
            return max(i for i, index in enumerate(indices) if index is not None)
        place = _JOINS.get(step.target)
        axis = None if place is None else _axis(step, place)
        if axis is not None:
            return axis
    return 2


def holds_keys(cache: Cache) -> bool:
    """Whether queries are compared with the rows, rather than the rows summed up."""
    seen = {*cache.steps, *([] if cache.past is None else [cache.past])}
    todo = list(seen)
    while todo:
        node = todo.pop()
        for user in node.users:
            second = len(user.args) > 1 and user.args[1] is node
            if user.target is aten.scaled_dot_product_attention.default:
                if second:
                    return True
            elif user.target in _PRODUCTS:
                if second and not _is_share(user.args[0]):
                    return True
            # How many rows there are goes into much else.
            elif user not in seen and isinstance(user.meta.get("val"), torch.Tensor):
                seen.add(user)
                todo.append(user)
    return False


def _is_share(node: Any) -> bool:
    """Whether a value comes out of a softmax, with no product after it."""
    seen, todo = {node}, [node]
    while todo:
        part = todo.pop()
        if "softmax" in str(part.target):
            return True
        if part.target not in _PRODUCTS:
            todo += [each for each in part.all_input_nodes if each not in seen]
            seen |= set(part.all_input_nodes)
    return False


def rows_of(node: fx.Node) -> list[fx.Node]:
    """The arguments of a move that hold rows; none of another op."""
    return [part for _, part in _operands(node) if isinstance(part, fx.Node)]


def _operands(node: fx.Node) -> Iterator[tuple[int, Any]]:
    if node.target is aten.cat.default:
        axis = _axis(node, 1)
        if axis is not None and axis != 3:
            # An empty tensor of one axis is nothing, in a join of any others.
            parts: Any = node.args[0]
            yield from ((0, part) for part in parts if part.meta["val"].dim() == 4)
        return
    places = _MOVES.get(node.target, ())
    if node.target is aten.index_put.default:
        indices: Any = node.args[1]
        if len(indices) > 3 or len(node.args) > 3:
            return  # it writes single channels, or adds
    elif len(places) > 1 or node.target in (aten.slice.Tensor, aten.index_select.default):
        axis = _axis(node, 2 if node.target is aten.slice_scatter.default else 1)
        if axis is None or axis == 3:
            return
    for place in places:
        if place < len(node.args):
            yield place, node.args[place]


def _axis(node: fx.Node, place: int) -> int | None:
    axis: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    return axis % 4 if isinstance(axis, int) else None
