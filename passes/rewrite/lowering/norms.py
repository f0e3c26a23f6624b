"""Norms whose result is only ever quantised: one op does both."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Edit
from torchlathe.ir.axes.rule import argument

__all__ = ["fuse_norms"]

aten = torch.ops.aten
ops = torch.ops.torchlathe
_KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def fuse_norms(edit: Edit) -> int:
    """Let ``norm_quantise`` stand for a norm and the rounding of its result.

    With a sum before the norm that others read as well, ``add_norm_quantise`` gives all three.

    Returns:
        How many.
    """
    count, live = 0, _live(edit.program.output_node)
    for pair in list(edit.program.graph.find_nodes(op="call_function", target=_target())):
        norm = pair.args[0]
        assert isinstance(norm, fx.Node)
        if norm.target not in (aten.layer_norm.default, aten.rms_norm.default):
            continue
        weight: Any = argument(norm, "weight")
        shape: Any = argument(norm, "normalized_shape")
        if set(norm.users) & live != {pair} or not isinstance(weight, fx.Node) or len(shape) != 1:
            continue
        mean = norm.target is aten.layer_norm.default
        bias = argument(norm, "bias") if mean else None
        eps = argument(norm, "eps")
        eps = torch.finfo(norm.meta["val"].dtype).eps if eps is None else eps
        rest = (weight, bias, eps, mean, _KINDS[str(pair.args[1])])
        _replace(edit, norm, pair, rest)
        count += 1
    return count


def _live(output: fx.Node) -> set[fx.Node]:
    """What is read in the end; what was replaced stands in the graph until the edit ends."""
    found, stack = {output}, [output]
    while stack:
        new = [used for used in stack.pop().all_input_nodes if used not in found]
        found.update(new)
        stack += new
    return found


def _target() -> Any:
    return ops.quantize_tokens.default


def _replace(edit: Edit, norm: fx.Node, pair: fx.Node, rest: tuple[Any, ...]) -> None:
    x = norm.args[0]
    assert isinstance(x, fx.Node)
    summed = _plain_sum(x)
    if summed is None:
        new = edit.call(ops.norm_quantise.default, (x, *rest), like=norm, before=norm)
        edit.replace(pair, new)
        return
    # The sum has other readers, which may stand before the norm: the fused op takes its place.
    new = edit.call(ops.add_norm_quantise.default, (*summed, *rest), like=norm, before=x)
    users = [user for user in x.users if user is not norm]
    value = edit.call(operator.getitem, (new, 2), like=x, before=x)
    edit.replace(x, value, users)
    edit.replace(pair, new)


def _plain_sum(x: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two nodes of one shape and type that a node adds."""
    if x.target is not aten.add.Tensor or x.kwargs or len(x.args) != 2:
        return None
    a, b = x.args
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return None
    values: list[Any] = [node.meta.get("val") for node in (a, b, x)]
    if not all(isinstance(value, torch.Tensor) for value in values):
        return None
    same = all(v.shape == values[2].shape and v.dtype == values[2].dtype for v in values)
    return (a, b) if same else None
