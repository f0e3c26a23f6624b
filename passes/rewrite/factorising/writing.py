"""Puts factors into the graph in the place of what they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Edit, TensorKind
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.provenance import info
from torchlathe.passes.rewrite.factorising.making import Factors
from torchlathe.passes.rewrite.factorising.plans import Plan
from torchlathe.passes.rewrite.factorising.sites import Site, bias_of

__all__ = ["add_factor", "shifted_bias", "stem_of", "strides", "write"]

aten = torch.ops.aten
_PLAIN_CONVOLUTION = {
    1: aten.conv1d.default,
    2: aten.conv2d.default,
    3: aten.conv3d.default,
}


def write(edit: Edit, plan: Plan, factors: Factors) -> None:
    """Let every call of the plan's sites use its factors; the old parameters die.

    New parameters are called after the module of the old one: ``encoder.query.weight`` becomes
    ``encoder.query.down.weight`` and ``encoder.query.up.weight``, with ``core`` between them for
    three factors; a factor that several share, ``encoder.query_key_value.down.weight``; rows that
    are kept, ``encoder.query.rows.weight``, with their places in a buffer ``encoder.query.order``.
    """
    program = edit.program
    trains = any(program.tensor(site.weight).requires_grad for site in plan.sites)
    names = [site.weight for site in plan.sites]
    stem = _shared_stem(names) if len(names) > 1 else stem_of(names[0])
    parts = ("down", "core")
    shared = [
        add_factor(edit, f"{stem}{part}", tensor, trains)
        for part, tensor in zip(parts, factors.shared, strict=False)
    ]
    first: dict[fx.Node, fx.Node] = {}
    for site, own, shift in zip(plan.sites, factors.own, factors.shifts, strict=True):
        last = add_factor(edit, f"{stem_of(site.weight)}up", own, trains)
        kept = _kept(edit, stem_of(site.weight), factors, trains)
        for call in site.calls:
            bias = bias_of(call)
            if shift is not None and bias is not None:
                bias = shifted_bias(edit, call, bias, shift)
            if kept is None:
                new = _call(edit, plan, site, call, bias, [*shared, last], first)
            else:
                low = _call(edit, plan, site, call, None, [*shared, last], first)
                new = _gathered(edit, site, call, bias, low, kept)
            edit.replace(call, new)


def _kept(edit: Edit, stem: str, factors: Factors, trains: bool) -> tuple[fx.Node, fx.Node] | None:
    """Tensors of the rows that are kept, and of their places."""
    if factors.rows is None or factors.order is None:
        return None
    rows = add_factor(edit, f"{stem}rows", factors.rows, trains)
    order = edit.add_tensor(_free_name(edit, f"{stem}order"), factors.order, TensorKind.BUFFER)
    return rows, order


def _gathered(
    edit: Edit, site: Site, call: fx.Node, bias: Any, low: fx.Node, kept: tuple[fx.Node, fx.Node]
) -> fx.Node:
    """The outputs of the product and of the rows that are kept, in order, and the bias on them."""
    rows, order = kept
    data, axis = site.operand(call), -1

    def op(target: Any, *args: Any) -> fx.Node:
        return edit.call(target, args, like=call, before=call)

    if site.kind == "experts":
        whole = _grouped(edit, call, data, [rows])
    elif site.kind == "convolution":
        axis = -1 - len(site.kernel)
        whole = op(call.target, data, rows, None, *_geometry(call, len(site.kernel)))
    else:
        whole = op(aten.linear.default, data, rows)
    found = op(aten.index_select.default, op(aten.cat.default, [low, whole], axis), axis, order)
    if bias is None:
        return found
    if site.kind == "convolution":
        bias = op(aten.reshape.default, bias, [-1, *[1] * len(site.kernel)])
    return op(aten.add.Tensor, found, bias)


def shifted_bias(edit: Edit, call: fx.Node, bias: fx.Node, shift: torch.Tensor) -> fx.Node:
    """The bias with something added: the same tensor where only this call reads it."""
    name = info(bias).tensor
    assert name is not None
    old = edit.program.tensor(name)
    new = (old.detach().double() + shift.to(old.device)).to(old.dtype)
    if set(bias.users) <= {call}:
        edit.set_tensor(name, new)
        return bias
    return add_factor(edit, f"{name}_shifted", new, old.requires_grad)


def add_factor(edit: Edit, stem: str, tensor: torch.Tensor, trains: bool) -> fx.Node:
    """A new parameter ``{stem}.weight``, with a number where that is taken."""
    program = edit.program
    name = _free_name(edit, stem, ".weight")
    parameter = torch.nn.Parameter(tensor, requires_grad=trains)
    node = edit.add_tensor(name, parameter, TensorKind.PARAMETER)
    # The original has no such tensor, and no zeros in it make the two equal.
    program.rewritten |= {name}
    return node


def _free_name(edit: Edit, stem: str, end: str = "") -> str:
    """The name, with a number where it is taken."""
    program = edit.program
    taken = {*program.entries, *program.aliases, *program.carried, *program.dropped}
    name, count = f"{stem}{end}", 1
    while name in taken:
        name, count = f"{stem}{count}{end}", count + 1
    return name


def stem_of(name: str) -> str:
    """What comes before ``down.weight``: ``a.query.weight`` gives ``a.query.``."""
    path, _, last = name.rpartition(".")
    if last == "weight":
        return f"{path}." if path else ""
    return f"{name}_"


def _shared_stem(names: Sequence[str]) -> str:
    """``a.query.weight`` and ``a.key.weight`` give ``a.query_key.``."""
    paths = [stem_of(name).rstrip("._").split(".") for name in names]
    common = 0
    while all(len(p) > common + 1 for p in paths) and len({p[common] for p in paths}) == 1:
        common += 1
    joined = "_".join("_".join(path[common:]) for path in paths)
    return ".".join([*paths[0][:common], joined]) + "."


def _call(
    edit: Edit,
    plan: Plan,
    site: Site,
    call: fx.Node,
    bias: Any,
    factors: Sequence[fx.Node],
    first: dict[fx.Node, fx.Node],
) -> fx.Node:
    """The calls that stand for one; those that several sites share are made once."""
    if call.target is aten.embedding.default:
        down, up = factors
        rows = edit.call(aten.embedding.default, (up, *call.args[1:]), like=call, before=call)
        return edit.call(aten.matmul.default, (rows, down), like=call, before=call)
    data = site.operand(call)
    if site.kind == "convolution":
        return _convolution(edit, plan, call, data, bias, factors)
    if site.kind == "experts":
        return _grouped(edit, call, data, factors)
    down, up = factors
    if data not in first:
        first[data] = edit.call(aten.linear.default, (data, down), like=call, before=call)
    given = () if bias is None else (bias,)
    return edit.call(aten.linear.default, (first[data], up, *given), like=call, before=call)


def _grouped(edit: Edit, call: fx.Node, data: fx.Node, factors: Sequence[fx.Node]) -> fx.Node:
    """Two grouped products with the segments of the one; factors are (experts, outs, ins)."""
    assert callable(call.target)
    for factor in factors:
        matrix = edit.call(aten.transpose.int, (factor, -2, -1), like=call, before=call)
        rest = tuple(call.args[2:])
        data = edit.call(call.target, (data, matrix, *rest), call.kwargs, like=call, before=call)
    return data


def _convolution(
    edit: Edit,
    plan: Plan,
    call: fx.Node,
    data: fx.Node,
    bias: Any,
    factors: Sequence[fx.Node],
) -> fx.Node:
    spatial = len(plan.sites[0].kernel)
    groups = plan.sites[0].groups
    plain = _PLAIN_CONVOLUTION[spatial]
    ones, zeros = [1] * spatial, [0] * spatial
    stride, padding, dilation = _geometry(call, spatial)

    def conv(x: fx.Node, weight: fx.Node, *rest: Any, like_call: bool = False) -> fx.Node:
        target: Any = call.target if like_call else plain
        return edit.call(target, (x, weight, *rest), like=call, before=call)

    if plan.form == "spatial":
        tall = padding if isinstance(padding, str) else [padding[0], 0]
        wide = padding if isinstance(padding, str) else [0, padding[1]]
        x = conv(data, factors[0], None, [stride[0], 1], tall, [dilation[0], 1], 1, like_call=True)
        return conv(x, factors[1], bias, [1, stride[1]], wide, [1, dilation[1]], 1, like_call=True)
    if plan.form in ("tucker", "cp"):
        data = conv(data, factors[0], None, ones, zeros, ones, 1)
        own = 1 if plan.form == "tucker" else plan.ranks[0]
        x = conv(data, factors[1], None, stride, padding, dilation, own, like_call=True)
        return conv(x, factors[2], bias, ones, zeros, ones, 1)
    x = conv(data, factors[0], None, stride, padding, dilation, groups, like_call=True)
    return conv(x, factors[1], bias, ones, zeros, ones, groups)


def _geometry(call: fx.Node, spatial: int) -> tuple[list[int], Any, list[int]]:
    """Stride, padding and dilation of a convolution; padding may be ``"same"`` or ``"valid"``."""
    padding = argument(call, "padding", 0)
    return (
        _each(argument(call, "stride", 1), spatial),
        padding if isinstance(padding, str) else _each(padding, spatial),
        _each(argument(call, "dilation", 1), spatial),
    )


def strides(site: Site) -> list[int]:
    """Of a convolution, one per axis of the kernel."""
    return _each(argument(site.calls[0], "stride", 1), len(site.kernel))


def _each(value: Any, count: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * count if len(values) == 1 else values
