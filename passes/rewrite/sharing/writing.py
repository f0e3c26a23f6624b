"""Puts what layers share into the graph: one tensor with several readers, and private factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Edit, TensorKind
from torchlathe.ir.axes.rule import argument
from torchlathe.passes.analysis.sharing.candidates import Candidate, bias_argument
from torchlathe.passes.statistics.readers import Reader

__all__ = [
    "add_correction",
    "add_parameter",
    "basis_shape",
    "coefficient_shape",
    "replace_by_product",
    "tie_biases",
    "tie_weights",
]

aten = torch.ops.aten
_CONVOLUTIONS: dict[Any, int] = {aten.conv1d.default: 1, aten.conv2d.default: 2}


def tie_weights(edit: Edit, layers: Sequence[Candidate], common: torch.Tensor) -> str:
    """Store one weight for several layers, under the name of the first.

    Args:
        edit: Of the program that the layers are of.
        layers: Of one shape.
        common: Their weight, (outs, features) float64.

    Returns:
        The name.
    """
    first = layers[0]
    like = edit.program.tensor(first.name)
    edit.set_tensor(first.name, first.tensor(common.to(like.device), like))
    for layer in layers[1:]:
        edit.tie(layer.name, first.name)
    return first.name


def tie_biases(edit: Edit, layers: Sequence[Candidate], common: torch.Tensor) -> None:
    """Store one bias for several layers that have one each.

    Args:
        edit: Of the program that the layers are of.
        layers: With a bias.
        common: Theirs, (outs,) float64.
    """
    names = [layer.bias for layer in layers if layer.bias is not None]
    like = edit.program.tensor(names[0])
    edit.set_tensor(names[0], common.to(like))
    for name in names[1:]:
        edit.tie(name, names[0])


def add_parameter(edit: Edit, weight: str, part: str, value: torch.Tensor) -> fx.Node:
    """A new parameter, named after a weight: ``query.weight`` gives ``query.basis``.

    Args:
        edit: Of the program.
        weight: The name of the weight.
        part: What the new parameter is to it.
        value: Taken over in the dtype and on the device of the weight.
    """
    program = edit.program
    path, _, last = weight.rpartition(".")
    stem = path if last == "weight" else weight
    taken = {*program.entries, *program.aliases, *program.carried, *program.dropped}
    wanted = f"{stem}.{part}" if stem else part
    name, count = wanted, 1
    while name in taken:
        name, count = f"{wanted}{count}", count + 1
    like = program.tensor(weight)
    value = value.detach().to(device=like.device, dtype=like.dtype).contiguous()
    parameter = torch.nn.Parameter(value, requires_grad=like.requires_grad)
    node = edit.add_tensor(name, parameter, TensorKind.PARAMETER)
    # The original has no such tensor, and no zeros in it make the two equal.
    program.rewritten |= {name}
    return node


def basis_shape(layer: Candidate, rank: int) -> tuple[int, ...]:
    """Of a basis for a layer: the kernel of a convolution stays with it."""
    if layer.readers[0].node.target in _CONVOLUTIONS:
        return (rank, *layer.shape[1:])
    return (rank, layer.features)


def replace_by_product(edit: Edit, layer: Candidate, basis: fx.Node, coefficients: fx.Node) -> None:
    """Let a layer multiply with a basis and then with its coefficients; its weight dies.

    Args:
        edit: Of the program.
        layer: With calls that read its weight.
        basis: (rank, features), or a kernel of so many channels.
        coefficients: (outs, rank).
    """
    for reader in layer.readers:
        node = reader.node
        inside = _first(edit, reader, basis)
        edit.replace(node, _second(edit, node, inside, coefficients, bias_argument(node)))


def add_correction(edit: Edit, layer: Candidate, right: fx.Node, left: fx.Node) -> None:
    """Add ``U (V x)`` to the result of a layer.

    Args:
        edit: Of the program.
        layer: With calls that keep their weight.
        right: V, as a basis.
        left: U, (outs, rank).
    """
    for reader in layer.readers:
        node = reader.node
        users = list(node.users)
        inside = _first(edit, reader, right)
        correction = _second(edit, node, inside, left, None)
        # Another layer that shares may be among them, with a correction of its own before it.
        total = edit.call(aten.add.Tensor, (node, correction), like=node, before=min(users))
        edit.replace(node, total, users)


def _first(edit: Edit, reader: Reader, basis: fx.Node) -> fx.Node:
    """The data times the basis."""
    node = reader.node
    if node.target not in _CONVOLUTIONS:
        return edit.call(aten.linear.default, (_data(node), basis), like=node, before=node)
    spatial = _CONVOLUTIONS[node.target]
    args = (
        _data(node),
        basis,
        None,
        _each(argument(node, "stride", 1), spatial),
        _each(argument(node, "padding", 0), spatial),
        _each(argument(node, "dilation", 1), spatial),
    )
    target: Any = node.target
    return edit.call(target, args, like=node, before=node)


def _data(node: fx.Node) -> Any:
    """What a layer reads by now: another layer that shares may have been replaced before it."""
    return node.args[1 if node.target is aten.addmm.default else 0]


def _second(
    edit: Edit, node: fx.Node, inside: fx.Node, coefficients: fx.Node, bias: Any
) -> fx.Node:
    given = () if bias is None else (bias,)
    target: Any = node.target if node.target in _CONVOLUTIONS else aten.linear.default
    return edit.call(target, (inside, coefficients, *given), like=node, before=node)


def coefficient_shape(layer: Candidate, rank: int) -> tuple[int, ...]:
    """Of coefficients: those of a convolution are a kernel of one position."""
    spatial = _CONVOLUTIONS.get(layer.readers[0].node.target, 0)
    return (layer.outs, rank, *[1] * spatial)


def _each(value: Any, count: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * count if len(values) == 1 else values
