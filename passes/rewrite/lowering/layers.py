"""Layers in the logical form: what they read, and what follows them that a fused op can do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.extents import as_int, example_sizes, expression
from torchlathe.ir.provenance import info
from torchlathe.kernels.dequantize import op as _registers
from torchlathe.kernels.dequantize.formats import Format, format_of, unpack

__all__ = ["DEQUANTIZE", "ROUND_TOKENS", "Layer", "logical_layers", "logical_nodes"]

aten = torch.ops.aten
assert _registers is not None
DEQUANTIZE = torch.ops.torchlathe.dequantize.default
ROUND_TOKENS = torch.ops.torchlathe.quantize_dequantize_tokens.default

_ACTIVATIONS: dict[Any, str] = {aten.relu.default: "relu", aten.silu.default: "silu"}


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer that reads stored numbers.

    Attributes:
        call: The linear layer (or another reader) itself.
        kind: ``"linear"``, or the name of the op that is something else.
        weight: The node that dequantises.
        operand: Its input, before rounding.
        activations: Format that the input is rounded to, or None.
        bias: Node of the bias, or None.
        activation: What follows, as fused ops call it.
        residual: What is added at the end, or None.
        last: The node whose value a fused op gives.
        rows: Tokens at the sizes of the example inputs.
    """

    call: fx.Node
    kind: str
    weight: fx.Node
    operand: fx.Node
    activations: str | None
    bias: fx.Node | None
    activation: str
    residual: fx.Node | None
    last: fx.Node
    rows: int

    @property
    def format(self) -> Format:
        """Of the weight."""
        return format_of(str(argument(self.weight, "format")))

    @property
    def group(self) -> int:
        """Columns that share a scale; 0 for a whole row."""
        return int(argument(self.weight, "group"))

    @property
    def shape(self) -> tuple[int, int]:
        """(outs, ins) of a linear layer."""
        outs, ins = self.weight.meta["val"].shape
        return int(outs), int(ins)

    @property
    def dtype(self) -> torch.dtype:
        """Of the input."""
        kind: torch.dtype = self.operand.meta["val"].dtype
        return kind

    def node(self, part: str) -> fx.Node | None:
        """The node of a stored tensor: values, scales, zeros or total."""
        found = argument(self.weight, part)
        return found if isinstance(found, fx.Node) else None

    def tensor(self, program: Program, part: str) -> torch.Tensor | None:
        """A stored tensor."""
        node = self.node(part)
        name = None if node is None else info(node).tensor
        return None if name is None else program.tensor(name).detach()

    def codes(self, program: Program) -> torch.Tensor:
        """One code a number, (outs, ins)."""
        values = self.tensor(program, "values")
        assert values is not None
        return unpack(values, self.format, self.shape[1])


def logical_nodes(program: Program) -> list[fx.Node]:
    """The nodes that dequantise something that is stored."""
    return program.graph.find_nodes(op="call_function", target=DEQUANTIZE)


def logical_layers(program: Program) -> list[Layer]:
    """Every reader of a dequantised weight, in order of execution."""
    sizes = example_sizes(program)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    found: list[Layer] = []
    for weight in logical_nodes(program):
        if any(info(node).tensor is None for node in weight.all_input_nodes):
            continue  # rows of an embedding: nothing is multiplied
        found += [_layer(call, weight, sizes, order) for call in _readers(weight)]
    return sorted(found, key=lambda layer: order[layer.call])


def _readers(weight: fx.Node) -> Iterator[fx.Node]:
    """What reads a weight, through views of it."""
    for user in weight.users:
        if user.target in (aten.view.default, aten.transpose.int):
            yield from _readers(user)
        else:
            yield user


def _layer(call: fx.Node, weight: fx.Node, sizes: Any, order: dict[fx.Node, int]) -> Layer:
    source = call.args[0]
    assert isinstance(source, fx.Node)
    data, activations = source, None
    if source.target is ROUND_TOKENS:
        inner = source.args[0]
        assert isinstance(inner, fx.Node)
        data, activations = inner, str(source.args[2])
    shape = data.meta["val"].shape
    plain = call.target is aten.linear.default and call.args[1] is weight
    bias: Any = argument(call, "bias") if plain else None
    rows = prod(as_int(expression(extent), sizes) for extent in shape[:-1]) if plain else 0
    activation, residual, last = _epilogue(call, order) if plain else ("none", None, call)
    return Layer(
        call=call,
        kind="linear" if plain else str(call.target),
        weight=weight,
        operand=data,
        activations=activations,
        bias=bias if isinstance(bias, fx.Node) else None,
        activation=activation,
        residual=residual,
        last=last,
        rows=rows,
    )


def _epilogue(call: fx.Node, order: dict[fx.Node, int]) -> tuple[str, fx.Node | None, fx.Node]:
    """The activation and the sum that alone read a product, and the last of these nodes."""
    activation, last = "none", call
    after = _only_user(call)
    if after is not None and (name := _activation(after)) is not None:
        activation, last = name, after
        after = _only_user(last)
    if after is None or after.target is not aten.add.Tensor or after.kwargs:
        return activation, None, last
    others = [value for value in after.args if value is not last]
    value = after.meta["val"]
    if len(after.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
        return activation, None, last
    other = others[0].meta["val"]
    same = isinstance(other, torch.Tensor) and other.shape == value.shape
    if not same or other.dtype != value.dtype or value.shape != last.meta["val"].shape:
        return activation, None, last
    return activation, others[0], after


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def _activation(node: fx.Node) -> str | None:
    if node.target is aten.gelu.default:
        return "gelu_tanh" if argument(node, "approximate", "none") == "tanh" else "gelu"
    return _ACTIVATIONS.get(node.target)
