"""Layers in the logical form: what they read, and what follows them that a fused op can do."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
from torchlathe.kernels.epilogue import GATED, interleave
from torchlathe.passes.rewrite.lowering.seeing import next_reader, source

__all__ = [
    "DEQUANTIZE",
    "ROUND_TOKENS",
    "Layer",
    "activation_of",
    "claimed_once",
    "gated_halves",
    "logical_layers",
    "logical_nodes",
    "tokens_of",
    "with_epilogue",
]

aten = torch.ops.aten
assert _registers is not None
DEQUANTIZE = torch.ops.torchlathe.dequantize.default
ROUND_TOKENS = torch.ops.torchlathe.quantize_dequantize_tokens.default

_ACTIVATIONS: dict[Any, str] = {aten.relu.default: "relu", aten.silu.default: "silu"}
_GATES = {plain: gate for gate, plain in GATED.items()}
_MOST_RANK = 128  # of a term that kernels take


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
        gated: The layer that this one gates, where one op computes both.
        halves: Whether the first half of the features gates the second.
        low_rank: Nodes of the factors ``down`` and ``up`` whose product with the input is added.
        before_sum: What ``last`` is without the residual.
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
    gated: Layer | None = None
    halves: bool = False
    low_rank: tuple[fx.Node, fx.Node] | None = None
    before_sum: fx.Node | None = None

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
        """(outs, ins) of a linear layer, outs of its result."""
        outs, ins = self.weight.meta["val"].shape
        return int(outs) // 2 if self.halves else int(outs), int(ins)

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
        """One code a number, (rows, ins), in the order of rows that the fused op wants."""
        values = self.tensor(program, "values")
        assert values is not None
        codes = unpack(values, self.format, self.shape[1])
        return self._turned(codes, None if self.gated is None else self.gated.codes(program), 0)

    def scales(self, program: Program, dtype: torch.dtype) -> torch.Tensor:
        """(groups, rows), in the same order."""
        scales = self.tensor(program, "scales")
        assert scales is not None
        other = None if self.gated is None else self.gated.scales(program, dtype)
        return self._turned(scales.t().to(dtype), other, 1).contiguous()

    def zeros(self, program: Program) -> torch.Tensor | None:
        """(groups, rows), in the same order; None without."""
        zeros = self.tensor(program, "zeros")
        if zeros is None:
            return None
        other = None if self.gated is None else self.gated.zeros(program)
        return self._turned(zeros.t(), other, 1).contiguous()

    def biases(self, program: Program) -> torch.Tensor | None:
        """(rows,) in the same order, for a gate: None where neither part has a bias."""
        parts = [self] if self.gated is None else [self, self.gated]
        if all(part.bias is None for part in parts):
            return None
        found = []
        for part in parts:
            name = None if part.bias is None else info(part.bias).tensor
            outs = int(part.weight.meta["val"].shape[0])
            empty = torch.zeros(outs, dtype=self.dtype)
            found.append(empty if name is None else program.tensor(name).detach())
        return self._turned(found[0], found[1] if self.gated is not None else None, 0)

    def _turned(self, tensor: torch.Tensor, other: torch.Tensor | None, axis: int) -> torch.Tensor:
        if self.halves:
            tensor, other = tensor.chunk(2, axis)
        if other is None:
            return tensor
        # A float8 has no padding of its own.
        kind = tensor.dtype
        bits = torch.uint8 if kind.itemsize == 1 else kind
        return interleave(tensor.view(bits), other.view(bits), axis).view(kind)


def logical_nodes(program: Program) -> list[fx.Node]:
    """The nodes that dequantise something that is stored."""
    return program.graph.find_nodes(op="call_function", target=DEQUANTIZE)


def logical_layers(program: Program, device: str = "cpu") -> list[Layer]:
    """Every reader of a dequantised weight, in order of execution.

    For ``device="cuda"`` a gate and what it gates are one layer, and so are a layer and a low-rank
    term of the same input: there are kernels for these. On a CPU each product is a call of its
    own in any case.
    """
    sizes = example_sizes(program)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    found: list[Layer] = []
    for weight in logical_nodes(program):
        if any(info(node).tensor is None for node in weight.all_input_nodes):
            continue  # rows of an embedding: nothing is multiplied
        found += [_layer(call, weight, sizes, terms=device == "cuda") for call in _readers(weight)]
    if device == "cuda":
        found = _with_gates([_halved(layer) for layer in found])
    found = claimed_once(sorted(found, key=lambda layer: order[layer.call]), set())
    return sorted(found, key=lambda layer: order[layer.last])


def _readers(weight: fx.Node) -> Iterator[fx.Node]:
    """What reads a weight, through views of it."""
    for user in weight.users:
        if user.target in (aten.view.default, aten.transpose.int):
            yield from _readers(user)
        else:
            yield user


def _layer(call: fx.Node, weight: fx.Node, sizes: Any, *, terms: bool) -> Layer:
    data = call.args[0]
    assert isinstance(data, fx.Node)
    activations = None
    if data.target is ROUND_TOKENS:
        inner = data.args[0]
        assert isinstance(inner, fx.Node)
        data, activations = source(inner), str(data.args[2])
    plain = call.target is aten.linear.default and call.args[1] is weight
    bias: Any = argument(call, "bias") if plain else None
    rows = tokens_of(data, sizes) if plain else 0
    layer = Layer(
        call=call,
        kind="linear" if plain else str(call.target),
        weight=weight,
        operand=data,
        activations=activations,
        bias=bias if isinstance(bias, fx.Node) else None,
        activation="none",
        residual=None,
        last=call,
        rows=rows,
    )
    if not plain:
        return layer
    return with_epilogue(_with_low_rank(layer) if terms else layer)


def tokens_of(data: fx.Node, sizes: Any) -> int:
    """Tokens of an input (..., features), at the sizes of the example inputs."""
    return prod(as_int(expression(extent), sizes) for extent in data.meta["val"].shape[:-1])


def _with_low_rank(layer: Layer) -> Layer:
    """Take in the product of two thin layers of the same input that is added to the result."""
    added = _sum_of(layer.last)
    if added is None:
        return layer
    outer, node = added
    outer = source(outer)
    inner = outer.args[0] if outer.target is aten.linear.default else None
    inner = source(inner) if isinstance(inner, fx.Node) else None
    if inner is None or inner.target is not aten.linear.default:
        return layer
    if argument(outer, "bias") is not None or argument(inner, "bias") is not None:
        return layer
    if source(_node(inner.args[0])) is not source(layer.operand):
        return layer
    down, up = _node(inner.args[1]), _node(outer.args[1])
    if info(down).tensor is None or info(up).tensor is None or len(outer.users) != 1:
        return layer
    if up.meta["val"].shape[1] > _MOST_RANK:
        return layer  # the product is read as a residual
    return replace(layer, low_rank=(down, up), last=node)


def _node(value: Any) -> fx.Node:
    assert isinstance(value, fx.Node)
    return value


def with_epilogue(layer: Layer) -> Layer:
    """A layer with the activation and the sum that alone read its product."""
    after = next_reader(layer.last)
    if after is not None and (name := activation_of(after[1])) is not None:
        layer = replace(layer, activation=name, last=after[1])
    return _with_residual(layer)


def _with_residual(layer: Layer) -> Layer:
    added = _sum_of(layer.last)
    if added is None:
        return layer
    return replace(layer, residual=added[0], last=added[1], before_sum=layer.last)


def claimed_once(layers: Sequence[Layer], claimed: set[fx.Node]) -> list[Layer]:
    """Layers of which no two take in the same sum: the second is what the first one adds.

    Args:
        layers: In order of their calls.
        claimed: The nodes that ops stand for already; those of the layers are added.
    """
    found = []
    for layer in layers:
        if layer.residual is not None and layer.last in claimed:
            assert layer.before_sum is not None
            layer = replace(layer, residual=None, last=layer.before_sum, before_sum=None)
        claimed.add(layer.last)
        found.append(layer)
    return found


def _sum_of(value: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What is added to a value that nothing else reads, of its shape and type, and the sum."""
    after = next_reader(value)
    if after is None or after[1].target is not aten.add.Tensor or after[1].kwargs:
        return None
    seen, total = after
    others = [part for part in total.args if part is not seen]
    if len(total.args) != 2 or len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    parts: list[Any] = [node.meta["val"] for node in (others[0], total, value)]
    if not all(isinstance(part, torch.Tensor) for part in parts):
        return None
    if any(p.shape != parts[0].shape or p.dtype != parts[0].dtype for p in parts):
        return None
    return others[0], total


def activation_of(node: fx.Node) -> str | None:
    """An activation that fused ops have, by their name for it."""
    if node.target is aten.gelu.default:
        return "gelu_tanh" if argument(node, "approximate", "none") == "tanh" else "gelu"
    return _ACTIVATIONS.get(node.target)


# -- gates -----------------------------------------------------------------------------------


def _with_gates(layers: Sequence[Layer]) -> list[Layer]:
    """Make one layer of each gate and what it gates."""
    by_last = {layer.last: layer for layer in layers}
    gone: set[Layer] = set()
    found = []
    for layer in layers:
        pair = _pair(layer, by_last)
        if pair is None or pair[1] in gone or layer in gone:
            continue
        product, other = pair
        gone |= {layer, other}
        name = _GATES[layer.activation]
        both = replace(layer, gated=other, activation=name, last=product)
        found.append(_with_residual(both))
    return found + [layer for layer in layers if layer not in gone]


def _pair(layer: Layer, by_last: dict[fx.Node, Layer]) -> tuple[fx.Node, Layer] | None:
    """The product of a layer with another of the same input, and that layer."""
    after = next_reader(layer.last)
    if after is None or after[1].target is not aten.mul.Tensor or not _may_gate(layer):
        return None
    seen, product = after
    others = [part for part in product.args if part is not seen]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    other = by_last.get(source(others[0]))
    if other is None or next_reader(other.last) is None or not _may_gate(other):
        return None
    if other.activation != "none" or other is layer:
        return None
    alike = all(
        getattr(layer, part) == getattr(other, part)
        for part in ("activations", "format", "group", "shape", "dtype")
    )
    alike = alike and source(layer.operand) is source(other.operand)
    alike = alike and (layer.node("zeros") is None) == (other.node("zeros") is None)
    return (product, other) if alike else None


def _may_gate(layer: Layer) -> bool:
    plain = layer.kind == "linear" and layer.residual is None and layer.low_rank is None
    return plain and not layer.halves and layer.gated is None


def _halved(layer: Layer) -> Layer:
    """A layer whose first half of features gates the second, as those that are stored as one."""
    if layer.last is not layer.call or not _may_gate(layer):
        return layer
    found = gated_halves(layer.last)
    if found is None:
        return layer
    return _with_residual(replace(layer, halves=True, activation=found[0], last=found[1]))


def gated_halves(value: fx.Node) -> tuple[str, fx.Node] | None:
    """How the first half of a value's features gates the second, if it does, and the product.

    Returns:
        The gated activation by the name that fused ops have for it, and the node of the product.
    """
    after = next_reader(value)
    halves = None if after is None else _halves_of(after[1])
    if halves is None:
        return None
    gate, other = halves
    activation, after = "none", next_reader(gate)
    if after is not None and (name := activation_of(after[1])) is not None:
        activation, after = name, next_reader(after[1])
    if after is None or after[1].target is not aten.mul.Tensor or next_reader(other) is None:
        return None
    seen, product = after
    parts = {source(part) for part in product.args if isinstance(part, fx.Node)}
    return (_GATES[activation], product) if parts == {source(seen), other} else None


def _halves_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two halves along the last axis that a node cuts a value in, where it does."""
    value: Any = node.args[0] if node.args else None
    if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
        return None
    whole = value.meta["val"]
    axis: Any = argument(node, "dim", 0)
    if node.target is aten.chunk.default:
        even = argument(node, "chunks") == 2 and whole.shape[-1] % 2 == 0
    elif node.target is aten.split.Tensor:
        even = 2 * argument(node, "split_size") == whole.shape[-1]
    elif node.target is aten.split_with_sizes.default:
        sizes: Any = argument(node, "split_sizes")
        even = len(sizes) == 2 and sizes[0] == sizes[1]
    else:
        return None
    parts = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    if not even or axis not in (-1, whole.dim() - 1) or set(parts) != {0, 1}:
        return None
    return (parts[0], parts[1]) if len(node.users) == 2 else None
