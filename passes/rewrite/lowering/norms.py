"""Norms whose result is only ever quantised: one op does both."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Edit
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.provenance import info
from torchlathe.passes.rewrite.lowering.seeing import source

__all__ = ["fuse_norms"]

aten = torch.ops.aten
ops = torch.ops.torchlathe
_KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class _Norm:
    """A norm over the last axis, of one node or of several.

    Attributes:
        last: The node whose value is the norm's.
        x: What is normalised.
        weight: Node of the weight.
        bias: Node of the bias, or None.
        eps: What is added to the mean square.
        mean: Whether the mean is subtracted.
    """

    last: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    eps: float
    mean: bool


def fuse_norms(edit: Edit) -> int:
    """Let ``norm_quantise`` stand for a norm and the rounding of its result.

    RMSNorms that are written out, as in Llama, are norms too. With a sum before the norm that
    others read as well, ``add_norm_quantise`` gives all three.

    Returns:
        How many.
    """
    count, live = 0, _live(edit.program.output_node)
    for pair in list(edit.program.graph.find_nodes(op="call_function", target=_target())):
        value = pair.args[0]
        assert isinstance(value, fx.Node)
        norm = _norm(edit, source(value))
        if norm is None or not _alone(norm.last, pair, live):
            continue
        _replace(edit, norm, pair, _KINDS[str(pair.args[1])])
        count += 1
    return count


def _alone(node: fx.Node, reader: fx.Node, live: set[fx.Node]) -> bool:
    """Whether one node reads a value, directly or through nodes that change nothing."""
    users = set(node.users) & live
    if len(users) != 1:
        return False
    user = users.pop()
    return user is reader or (source(user) is source(node) and _alone(user, reader, live))


def _norm(edit: Edit, node: fx.Node) -> _Norm | None:
    """The norm that a node is the value of."""
    if node.target not in (aten.layer_norm.default, aten.rms_norm.default):
        return _written_out(edit, node)
    x, weight = node.args[0], argument(node, "weight")
    shape: Any = argument(node, "normalized_shape")
    if not isinstance(weight, fx.Node) or not isinstance(x, fx.Node) or len(shape) != 1:
        return None
    mean = node.target is aten.layer_norm.default
    bias = argument(node, "bias") if mean else None
    eps = argument(node, "eps")
    eps = torch.finfo(node.meta["val"].dtype).eps if eps is None else eps
    return _Norm(node, x, weight, bias, float(eps), mean)


def _written_out(edit: Edit, node: fx.Node) -> _Norm | None:
    """``weight * (x * rsqrt(mean(x ** 2) + eps))``, with casts wherever there may be any."""
    if node.target is not aten.mul.Tensor:
        return None
    factors = [_uncast(part) for part in node.args if isinstance(part, fx.Node)]
    weights = [part for part in factors if info(part).tensor is not None]
    scaled = [part for part in factors if part.target is aten.mul.Tensor]
    if len(weights) != 1 or len(scaled) != 1:
        return None
    if weights[0].meta["val"].shape != node.meta["val"].shape[-1:]:
        return None  # one weight for all, say, which kernels do not read
    parts = [_uncast(part) for part in scaled[0].args if isinstance(part, fx.Node)]
    roots = [part for part in parts if part.target is aten.rsqrt.default]
    if len(parts) != 2 or len(roots) != 1:
        return None
    x = parts[0] if parts[1] is roots[0] else parts[1]
    found = _square_of(roots[0])
    # What the edit made has no value yet, and is what it stands for.
    value: Any = edit.stands_for.get(x, x).meta["val"]
    if found is None or found[0] is not x or value.dtype != node.meta["val"].dtype:
        return None
    return _Norm(node, x, weights[0], None, found[1], False)


def _square_of(root: fx.Node) -> tuple[fx.Node, float] | None:
    """The x and the eps of ``rsqrt(mean(x ** 2, -1) + eps)``."""
    total = root.args[0]
    if not isinstance(total, fx.Node) or total.target is not aten.add.Tensor:
        return None
    mean, eps = total.args
    if not isinstance(mean, fx.Node) or not isinstance(eps, (int, float)):
        return None
    if mean.target is not aten.mean.dim or argument(mean, "keepdim") is not True:
        return None
    square, axes = mean.args[0], argument(mean, "dim")
    if not isinstance(square, fx.Node) or list(axes) not in ([-1], [square.meta["val"].dim() - 1]):
        return None
    x = square.args[0]
    squared: dict[Any, Any] = {
        aten.square.default: True,
        aten.pow.Tensor_Scalar: square.args[-1] == 2,
        aten.mul.Tensor: square.args[-1] is x,
    }
    if not squared.get(square.target, False) or not isinstance(x, fx.Node):
        return None
    return _uncast(x), float(eps)


def _uncast(node: fx.Node) -> fx.Node:
    """The value before casts to another floating type: norms are computed in fp32 in any case."""
    while node.target in (aten.to.dtype, aten._to_copy.default) and isinstance(
        node.args[0], fx.Node
    ):
        node = node.args[0]
    return source(node)


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


def _replace(edit: Edit, norm: _Norm, pair: fx.Node, kind: torch.dtype) -> None:
    x, last = source(norm.x), norm.last
    rest = (norm.weight, norm.bias, norm.eps, norm.mean, kind)
    summed = _plain_sum(x)
    if summed is None:
        new = edit.call(ops.norm_quantise.default, (x, *rest), like=last, before=last)
        edit.replace(pair, new)
        return
    # The sum has other readers, which may stand before the norm: the fused op takes its place.
    new = edit.call(ops.add_norm_quantise.default, (*summed, *rest), like=last, before=x)
    users = [user for user in x.users if user is not new]
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
