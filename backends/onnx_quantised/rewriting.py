"""From the logical form of quantised linear layers to the ops of this package."""

from __future__ import annotations

from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["rewrite_quantised"]

aten = torch.ops.aten

_BLOCKS = (128, 64, 32, 16)  # groups that ``MatMulNBits`` can have


def rewrite_quantised(module: fx.GraphModule, *, level: int = 0) -> int:
    """Replace quantised linear layers, as far as ONNX Runtime has an op for them.

    Args:
        module: Changed in place; weights in the layout of the new ops are added to it.
        level: ``accuracy_level`` of ``MatMulNBits``: 4 rounds activations to 8 bits.

    Returns:
        How many were replaced. The others stay as they are, for the exporter to spell out.
    """
    rows: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    count = 0
    for node in list(module.graph.find_nodes(op="call_function", target=aten.linear.default)):
        weight = _Weight.of(module, node.args[1])
        if weight is None:
            continue
        number = len(rows) + count
        if weight.format == "int8" and weight.zeros is None and _rounded(node.args[0]):
            if weight.scales.shape[-1] == 1:
                _as_integers(module, node, weight, rows, number)
                count += 1
        elif (
            not _is_rounding(node.args[0])
            # Weights of 8 bits are multiplied by rounded activations only.
            and (weight.bits == 4 or level == 4)
            and (group := weight.block()) is not None
        ):
            _as_bits(module, node, weight, group, level, number)
            count += 1
    if count:
        module.graph.eliminate_dead_code()
        module.recompile()
    return count


@dataclass(frozen=True)
class _Weight:
    """What a ``dequantize`` node reads."""

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    columns: int
    group: int
    format: str

    @classmethod
    def of(cls, module: fx.GraphModule, node: Any) -> _Weight | None:
        """The weight, if a node dequantises a stored matrix to float32."""
        if not isinstance(node, fx.Node) or str(node.target) != "torchlathe.dequantize.default":
            return None
        values, scales, zeros, total, columns, group, name, dtype = node.args
        tensors = [_tensor(module, value) for value in (values, scales, zeros)]
        known = tensors[0] is not None and tensors[1] is not None
        if not known or total is not None or dtype is not torch.float32:
            return None
        if (zeros is not None and tensors[2] is None) or name not in ("int8", "int4"):
            return None
        stored, factors, points = tensors
        assert stored is not None
        assert factors is not None
        assert isinstance(columns, int)
        assert isinstance(group, int)
        if stored.dim() != 2 or factors.dim() != 2 or not factors.is_floating_point():
            return None
        return cls(stored, factors.float(), points, columns, group, str(name))

    @property
    def bits(self) -> int:
        return 8 if self.format == "int8" else 4

    @property
    def width(self) -> int:
        """How many columns the matrix has."""
        return self.columns if self.bits == 4 else self.values.shape[1]

    def block(self) -> int | None:
        """Columns that share a scale in the layout of ``MatMulNBits``; None if it has no such."""
        # One scale for a row is as many equal scales for blocks.
        wanted = _BLOCKS if self.scales.shape[-1] == 1 else (self.group,)
        return next((b for b in wanted if b in _BLOCKS and self.width % b == 0), None)


def _tensor(module: fx.GraphModule, value: Any) -> Tensor | None:
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    owner, _, name = str(value.target).rpartition(".")
    found = getattr(module.get_submodule(owner), name)
    return found.detach() if isinstance(found, Tensor) else None


def _is_rounding(node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and str(node.target) == "torchlathe.quantize_dequantize_tokens.default"
    )


def _rounded(node: Any) -> bool:
    """Whether a node rounds float32 rows to int8, with a scale for each."""
    if not _is_rounding(node):
        return False
    x, axes, name = node.args
    value = x.meta.get("val")
    last = value.dim() - 1 if isinstance(value, Tensor) else -1
    float32 = isinstance(value, Tensor) and value.dtype is torch.float32
    return float32 and name == "int8" and list(axes) in ([-1], [last])


def _add(module: fx.GraphModule, name: str, tensor: Tensor, before: fx.Node) -> fx.Node:
    module.register_buffer(name, tensor.contiguous(), persistent=False)
    with module.graph.inserting_before(before):
        return module.graph.get_attr(name)


def _as_integers(
    module: fx.GraphModule,
    node: fx.Node,
    weight: _Weight,
    rows: dict[fx.Node, tuple[fx.Node, fx.Node]],
    number: int,
) -> None:
    from torchlathe.backends.onnx_quantised import ops

    rounding = node.args[0]
    assert isinstance(rounding, fx.Node)
    x = rounding.args[0]
    graph = module.graph
    if rounding not in rows:
        with graph.inserting_before(rounding):
            pair = graph.call_function(ops.quantize_rows._opoverload, (x,))
            rows[rounding] = (
                graph.call_function(getitem, (pair, 0)),
                graph.call_function(getitem, (pair, 1)),
            )
    values = _add(module, f"onnx_weight_{number}", weight.values.t(), node)
    scales = _add(module, f"onnx_scales_{number}", weight.scales.flatten(), node)
    bias = node.args[2] if len(node.args) > 2 else None
    with graph.inserting_before(node):
        new = graph.call_function(
            ops.integer_linear._opoverload, (x, *rows[rounding], values, scales, bias)
        )
    _replace(node, new)


def _as_bits(
    module: fx.GraphModule, node: fx.Node, weight: _Weight, group: int, level: int, number: int
) -> None:
    from torchlathe.backends.onnx_quantised import ops

    outs, groups = weight.values.shape[0], weight.width // group
    if weight.bits == 8:
        codes = (weight.values.to(torch.int16) + ops.CENTRE).to(torch.uint8)
        points = None if weight.zeros is None else weight.zeros.to(torch.int16) + ops.CENTRE
    else:
        codes, points = weight.values, weight.zeros
    graph, x = module.graph, node.args[0]
    values = _add(module, f"onnx_values_{number}", codes.reshape(outs, groups, -1), node)
    scales = _add(module, f"onnx_scales_{number}", weight.scales.expand(outs, groups).clone(), node)
    zeros = None
    if points is not None:
        packed = _packed(points.expand(outs, groups).to(torch.uint8), weight.bits)
        zeros = _add(module, f"onnx_zeros_{number}", packed, node)
    bias = node.args[2] if len(node.args) > 2 else None
    with graph.inserting_before(node):
        new = graph.call_function(
            ops.nbits_linear._opoverload,
            (x, values, scales, zeros, weight.bits, group, level, bias),
        )
    _replace(node, new)


def _packed(points: Tensor, bits: int) -> Tensor:
    """Zero points as they are stored: two of 4 bits in a byte."""
    if bits == 8:
        return points
    points = torch.nn.functional.pad(points, (0, points.shape[1] % 2))
    return points[:, ::2] | (points[:, 1::2] << 4)


def _replace(node: fx.Node, new: fx.Node) -> None:
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
