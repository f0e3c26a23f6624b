"""The projections of values and of outputs in attention with one head, which are one map.

Attention is linear in its values: ``(P (x V' + b)) O' + c = P (x (O V)' + O b) + c`` for whatever
weights ``P`` it has. With several heads the product is one matrix of the model's width for each of
them, which is more work than the two; with one head it is less.

Source: own; linear operator reordering as in Hector (arXiv 2301.06284).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Edit, Program, TensorKind
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.provenance import info
from torchlathe.passes.base import Diagnostic
from torchlathe.passes.rewrite.reordering.maps import AffineMap, read_map

__all__ = ["OneHead", "find_single_heads", "fuse_single_head"]

aten = torch.ops.aten
# What may stand between a projection and the attention: the same numbers in another shape.
_SHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
)


@dataclass(frozen=True, eq=False)
class OneHead:
    """Attention whose values come from a linear layer, and whose result goes to one.

    Attributes:
        values: The first layer.
        outputs: The second.
    """

    values: AffineMap
    outputs: AffineMap

    @property
    def diagnostic(self) -> Diagnostic:
        """What is told of it."""
        first, second = self.values, self.outputs
        return Diagnostic.at(
            second.window,
            f"%{first.window.name} and %{second.window.name} became one before the attention: "
            f"{first.parameters + second.parameters:,} parameters of weights are "
            f"{second.shape[0] * first.shape[1]:,}",
        )


def find_single_heads(program: Program) -> Iterator[OneHead]:
    """Attention with one head where the product of the two layers takes less than they do."""
    for node in list(program.nodes):
        if node.target is not aten.scaled_dot_product_attention.default or len(node.args) < 3:
            continue
        value, reshaped = _back(node.args[2])
        result, again = _forth(node)
        if value is None or result is None:
            continue
        first, second = read_map(program, value), read_map(program, result)
        if first is None or second is None or {first.kind, second.kind} != {"linear"}:
            continue
        between, after = first.shape[0], second.shape[0]
        given: Any = node.args[2]
        shape, width = node.meta["val"].shape, given.meta["val"].shape[-1]
        one = len(shape) < 4 or shape[-3] == 1
        whole = shape[-1] == width == between == second.shape[1]
        if not (one and whole) or after > between or ((reshaped or again) and after != between):
            continue
        if all(_alone(single) for single in (first, second)):
            yield OneHead(first, second)


def fuse_single_head(edit: Edit, found: OneHead) -> None:
    """Let the first layer give what the second made of the attention's result."""
    program = edit.program
    first, second = found.values.window, found.outputs.window
    inner, outer = (_matrix(program, call) for call in (first, second))
    stem = (info(_weight(first)).tensor or "").rpartition(".")[0]
    stem = f"{stem}." if stem else ""
    dtype = first.meta["val"].dtype
    args: list[fx.Node] = [_add(edit, f"{stem}fused_weight", (outer @ inner).to(dtype))]
    if (bias := _bias(program, first)) is not None:
        args.append(_add(edit, f"{stem}fused_bias", (outer @ bias).to(dtype)))
    data: Any = first.args[0]
    edit.replace(first, edit.call(aten.linear.default, (data, *args), like=first, before=first))
    result: Any = second.args[0]
    shift = argument(second, "bias")
    if isinstance(shift, fx.Node):
        result = edit.call(aten.add.Tensor, (result, shift), like=second, before=second)
    edit.replace(second, result)


def _back(node: Any) -> tuple[fx.Node | None, bool]:
    """What gives a value, past changes of shape that nothing else reads, and whether there are."""
    shaped = False
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if node.target not in _SHAPES:
            return (node if node.op == "call_function" else None), shaped
        node, shaped = node.args[0], True
    return None, shaped


def _forth(node: fx.Node) -> tuple[fx.Node | None, bool]:
    """What alone reads a value, past changes of shape."""
    shaped = False
    while len(node.users) == 1:
        (user,) = node.users
        if user.args[:1] != (node,):
            return None, shaped
        if user.target not in _SHAPES:
            return user, shaped
        node, shaped = user, True
    return None, shaped


def _alone(single: AffineMap) -> bool:
    """Whether nothing else reads the layer's weight."""
    return single.window.target is aten.linear.default and len(_weight(single.window).users) == 1


def _weight(call: fx.Node) -> fx.Node:
    node = call.args[1]
    assert isinstance(node, fx.Node)
    return node


def _matrix(program: Program, call: fx.Node) -> torch.Tensor:
    name = info(_weight(call)).tensor
    assert name is not None
    return program.tensor(name).detach().double()


def _bias(program: Program, call: fx.Node) -> torch.Tensor | None:
    node = argument(call, "bias")
    name = info(node).tensor if isinstance(node, fx.Node) else None
    return None if name is None else program.tensor(name).detach().double()


def _add(edit: Edit, name: str, value: torch.Tensor) -> fx.Node:
    program = edit.program
    taken = {*program.entries, *program.aliases, *program.carried, *program.dropped}
    free, count = name, 1
    while free in taken:
        free, count = f"{name}{count}", count + 1
    node = edit.add_tensor(free, value.contiguous(), TensorKind.PARAMETER)
    program.rewritten |= {free}
    return node
