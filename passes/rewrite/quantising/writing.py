"""Puts stored numbers, and what gives them meaning, into the graph in the place of a weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Edit, TensorKind
from torchlathe.kernels.dequantize.op import dequantize as _dequantize
from torchlathe.kernels.dequantize.op import quantize_dequantize_tokens as _round_tokens
from torchlathe.passes.rewrite.factorising.sites import Site, bias_of
from torchlathe.passes.rewrite.quantising.grids import Quantised

__all__ = ["DEQUANTIZE", "ROUND_TOKENS", "Written", "matrix_of", "rewrite", "write"]

aten = torch.ops.aten
# Importing the functions registers them; the graph calls the overloads.
assert _dequantize is not None
assert _round_tokens is not None
DEQUANTIZE = torch.ops.torchlathe.dequantize.default
ROUND_TOKENS = torch.ops.torchlathe.quantize_dequantize_tokens.default


@dataclass
class Written:
    """Where a site's stored form is.

    Attributes:
        site: The site; its calls may be gone.
        tensors: Name of each tensor: ``values``, ``scales``, and ``zeros`` and ``total`` if any.
        shape: Of the stored values.
        calls: What multiplies now, for each call of the site that is no look-up.
    """

    site: Site
    tensors: dict[str, str]
    shape: tuple[int, ...]
    calls: list[fx.Node] = field(default_factory=list)


def matrix_of(site: Site, weight: torch.Tensor) -> torch.Tensor:
    """A site's parameter as (rows, columns): groups below each other."""
    return site.matrices(weight).flatten(0, 1)


def write(
    edit: Edit,
    site: Site,
    stored: Quantised,
    activations: str | None,
    rounded: dict[tuple[fx.Node, tuple[int, ...]], fx.Node],
) -> Written:
    """Let every call of a site read stored numbers; the floating parameter dies.

    8-bit numbers take the parameter's own name. Packed ones are called ``..._packed``; scales,
    zero points and the scale of all ``..._scale``, ``..._zero_point`` and ``..._global_scale``.

    Args:
        edit: The edit.
        site: What is quantised.
        stored: Its matrix.
        activations: Format that inputs are rounded to, or None.
        rounded: Inputs that were rounded already, by node and axes; new ones are added.
    """
    program = edit.program
    old = program.tensor(site.weight)
    node = program.tensor_nodes[site.weight]
    users = list(node.users)
    if site.kind == "experts":
        _move_views(site, users)
    place = {node: i for i, node in enumerate(program.graph.nodes)}
    products = [user for user in users if user.target is not aten.embedding.default] or users
    first = min(products, key=place.__getitem__)
    plain = stored.group == 0 and stored.values.shape[1] == stored.columns and not site.transposed
    plain = plain and site.kind != "experts"
    shape = site.shape if plain else tuple(stored.values.shape)
    written = Written(site, {}, shape)
    if site.kind == "experts":
        written.calls += site.calls  # these stay as they are
    if plain:
        edit.set_tensor(site.weight, stored.values.reshape(shape))
        values, written.tensors["values"] = node, site.weight
    else:
        values = _add(edit, written, "values", "packed", stored.values, trains=False)
    trains = old.requires_grad
    scales = _add(edit, written, "scales", "scale", stored.scales, trains=trains)
    zeros = total = None
    if stored.zeros is not None:
        zeros = _add(edit, written, "zeros", "zero_point", stored.zeros, trains=False)
    if stored.total is not None:
        total = _add(edit, written, "total", "global_scale", stored.total, trains=False)
    # Of what is not packed the columns are those of the tensor, which passes may erase.
    columns = 0 if stored.values.shape[1] == stored.columns else stored.columns
    rest = (columns, stored.group, stored.format, old.dtype)

    def read(*tensors: fx.Node | None, like: fx.Node) -> fx.Node:
        return edit.call(DEQUANTIZE, (*tensors, total, *rest), like=like, before=like)

    weight: fx.Node | None = None
    for call in users:
        if call.target is aten.embedding.default:
            rows = [
                None if table is None else edit.call(
                    aten.embedding.default, (table, *call.args[1:]), like=call, before=call
                )
                for table in (values, scales, zeros)
            ]  # fmt: skip
            edit.replace(call, read(*rows, like=call))
            continue
        if weight is None:
            weight = _shaped(edit, site, plain, read(values, scales, zeros, like=first), first)
        if site.kind == "experts":
            edit.replace(node, weight, [call])
            continue
        data = site.operand(call)
        if activations is not None:
            data = _rounded(edit, site, call, data, activations, rounded)
        written.calls.append(_call(edit, site, call, node, data, weight))
    return written


def _move_views(site: Site, users: Sequence[fx.Node]) -> None:
    """Put transposes of experts' weights right before the products that read them.

    A weight is then computed where all that its layer reads is there: sweeps stop at that place.
    """
    for view in users:
        if view not in site.calls:
            place = {node: i for i, node in enumerate(view.graph.nodes)}
            min(view.users, key=place.__getitem__).prepend(view)


def rewrite(edit: Edit, written: Written, stored: Quantised) -> None:
    """Put other numbers of the same form in place."""
    edit.set_tensor(written.tensors["values"], stored.values.reshape(written.shape))
    for part, name in written.tensors.items():
        if part != "values":
            tensor = getattr(stored, part)
            edit.set_tensor(name, tensor)


def _add(
    edit: Edit, written: Written, part: str, suffix: str, tensor: torch.Tensor, *, trains: bool
) -> fx.Node:
    program = edit.program
    taken = {*program.entries, *program.aliases, *program.carried, *program.dropped}
    name, count = f"{written.site.weight}_{suffix}", 1
    while name in taken:
        name, count = f"{written.site.weight}_{suffix}{count}", count + 1
    # Scales are what can be trained of a quantised weight; all else are plain numbers.
    trains = trains and tensor.is_floating_point()
    kind = TensorKind.PARAMETER if part in ("values", "scales") else TensorKind.BUFFER
    if kind is TensorKind.PARAMETER:
        tensor = torch.nn.Parameter(tensor, requires_grad=trains)
    node = edit.add_tensor(name, tensor, kind)
    program.rewritten |= {name}
    written.tensors[part] = name
    return node


def _shaped(edit: Edit, site: Site, plain: bool, weight: fx.Node, first: fx.Node) -> fx.Node:
    """The weight as its readers take it: linear layers as (outs, ins), all others as it was."""
    if plain or site.kind in ("linear", "embedding"):
        return weight
    shape = list(site.shape)
    flip = site.kind == "experts" and site.transposed
    if flip:
        shape = [shape[0], shape[2], shape[1]]
    weight = edit.call(aten.view.default, (weight, shape), like=first, before=first)
    if flip:
        weight = edit.call(aten.transpose.int, (weight, 1, 2), like=first, before=first)
    return weight


def _rounded(
    edit: Edit,
    site: Site,
    call: fx.Node,
    data: fx.Node,
    form: str,
    rounded: dict[tuple[fx.Node, tuple[int, ...]], fx.Node],
) -> fx.Node:
    """The input of a layer with one scale a token, or one a sample for a convolution."""
    axes: tuple[int, ...] = (-1,)
    if site.kind == "convolution":
        # A window spans positions, so that these cannot have scales of their own.
        axes = tuple(range(-len(site.kernel) - 1, 0))
    key = (data, axes)
    if key not in rounded:
        like = call if data.op == "placeholder" else data
        args = (data, list(axes), form)
        rounded[key] = edit.call(ROUND_TOKENS, args, like=like, before=_after(data, call))
    return rounded[key]


def _after(data: fx.Node, call: fx.Node) -> fx.Node:
    """Where something right after a node can stand: before the next node, inputs apart."""
    node = data.next
    while node.op == "placeholder":
        node = node.next
    return node if node.op != "output" else call


def _call(
    edit: Edit, site: Site, call: fx.Node, old: fx.Node, data: fx.Node, weight: fx.Node
) -> fx.Node:
    if site.transposed:
        bias: Any = bias_of(call)
        given = () if bias is None else (bias,)
        new = edit.call(aten.linear.default, (data, weight, *given), like=call, before=call)
        edit.replace(call, new)
        return new
    args = tuple(weight if value is old else value for value in call.args)
    kwargs = {k: weight if value is old else value for k, value in call.kwargs.items()}
    source = site.operand(call)
    args = tuple(data if i == 0 and value is source else value for i, value in enumerate(args))
    edit.set_args(call, args, kwargs)
    return call
