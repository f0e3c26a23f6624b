"""Experts in the logical form: grouped products of sorted slots by stacked, stored weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.extents import as_int, example_sizes, expression
from torchlathe.ir.provenance import info
from torchlathe.kernels.dequantize.formats import Format, format_of, unpack
from torchlathe.kernels.epilogue import interleave
from torchlathe.kernels.w4a16_experts.op import pack_experts as pack_w4a16
from torchlathe.kernels.w8a16_experts.op import pack_experts as pack_w8a16
from torchlathe.passes.rewrite.lowering.forms import Maker
from torchlathe.passes.rewrite.lowering.layers import DEQUANTIZE, gated_halves
from torchlathe.passes.rewrite.lowering.seeing import source

__all__ = ["Experts", "expert_layers"]

aten = torch.ops.aten
ops = torch.ops.torchlathe
_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Experts:
    """One grouped product by stored weights.

    Attributes:
        call: The product.
        weight: The node that dequantises.
        shape: (experts, outs, ins) of the weights.
        slots: What is multiplied, (slots, ins), or the tokens that `order` takes the slots from.
        order: The token of each slot, or None where slots are given.
        ends: Where the slots of each expert end.
        activation: What follows, as fused ops call it.
        halves: Whether the first half of the features gates the second.
        last: The node whose value a fused op gives.
        rows: Slots at the sizes of the example inputs.
    """

    call: fx.Node
    weight: fx.Node
    shape: tuple[int, int, int]
    slots: fx.Node
    order: fx.Node | None
    ends: fx.Node
    activation: str
    halves: bool
    last: fx.Node
    rows: int

    @property
    def name(self) -> str:
        """Of the stored numbers."""
        values: Any = argument(self.weight, "values")
        return str(info(values).tensor)

    @property
    def op(self) -> str:
        """The op that stands for it."""
        return "w4a16_experts_linear" if self.format.name == "int4" else "w8a16_experts_linear"

    @property
    def format(self) -> Format:
        """Of the weight."""
        return format_of(str(argument(self.weight, "format")))

    def refuses(self) -> str | None:
        """Why no op takes it, or None."""
        group = int(argument(self.weight, "group"))
        groups = {"int4": (0, 32, 64, 128), "int8": (0, 128)}.get(self.format.name)
        if groups is None or argument(self.weight, "total") is not None:
            return f"no op for experts takes {self.format.name}"
        if group not in groups:
            return f"no op for experts takes groups of {group}"
        if self.format.name == "int8" and argument(self.weight, "zeros") is not None:
            return "no op for experts in 8 bits takes zero points"
        kind = self.call.meta["val"].dtype
        if kind not in _HALVES:
            return f"its inputs are {str(kind).removeprefix('torch.')}"
        return None

    def write(self, maker: Maker) -> None:
        """Put the op in its place."""
        outs = self.shape[1]
        codes, scales, zeros = self._tensors(maker.edit.program)
        group = int(argument(self.weight, "group"))
        if self.format.name == "int4":
            packed: Any = pack_w4a16(codes, scales, zeros, group)
        else:
            packed = pack_w8a16(codes, scales, group)[:2]
        kind = "qs4" if self.format.name == "int4" else "hs8"
        nodes = [None if t is None else maker.add(f"{self.name}_{kind}", t) for t in packed]
        ends = maker.now(self.ends)
        like = self.call
        offsets = maker.edit.call(
            aten.constant_pad_nd.default, (ends, [1, 0]), like=like, before=self.last
        )
        features = outs // 2 if self.halves else outs
        group_of = (group,) if self.format.name == "int4" else ()
        args = (maker.now(self.slots), maker.now(self.order), offsets, *nodes, None, features)
        target = getattr(ops, self.op).default
        new = maker.edit.call(
            target, (*args, *group_of, self.activation), like=like, before=self.last
        )
        maker.stands(self.last, new)

    def _tensors(self, program: Program) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes (experts, rows, ins), scales and zero points (experts, groups, rows)."""
        experts, outs, ins = self.shape

        def stored(part: str) -> torch.Tensor | None:
            node: Any = argument(self.weight, part)
            return None if node is None else program.tensor(str(info(node).tensor)).detach()

        values, scales, zeros = stored("values"), stored("scales"), stored("zeros")
        assert values is not None
        assert scales is not None
        codes = unpack(values.flatten(1), self.format, ins).view(experts, outs, ins)
        kind = self.call.meta["val"].dtype
        by_group = scales.view(experts, outs, -1).mT.to(kind).contiguous()
        points = None if zeros is None else zeros.view(experts, outs, -1).mT.contiguous()
        if not self.halves:
            return codes, by_group, points
        turned = None if points is None else _turned(points, 2)
        return _turned(codes, 1), _turned(by_group, 2), turned


def _turned(tensor: torch.Tensor, axis: int) -> torch.Tensor:
    gate, gated = tensor.chunk(2, axis)
    return interleave(gate, gated, axis)


def expert_layers(program: Program) -> list[Experts]:
    """Every grouped product whose weights are stored numbers, in order of execution."""
    sizes = example_sizes(program)
    found = []
    for call in program.graph.find_nodes(op="call_function", target=aten._grouped_mm.default):
        flipped = call.args[1]
        ends: Any = argument(call, "offs")
        data = call.args[0]
        if not isinstance(flipped, fx.Node) or not isinstance(ends, fx.Node):
            continue
        assert isinstance(data, fx.Node)
        weight = _stored(flipped)
        if weight is None or data.meta["val"].dim() != 2:
            continue
        experts, ins, outs = (int(extent) for extent in flipped.meta["val"].shape)
        rows = prod(as_int(expression(e), sizes) for e in data.meta["val"].shape[:-1])
        layer = Experts(
            call=call,
            weight=weight,
            shape=(experts, outs, ins),
            slots=data,
            order=None,
            ends=ends,
            activation="none",
            halves=False,
            last=call,
            rows=rows,
        )
        found.append(_with_gate(_with_order(layer)))
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    return sorted(found, key=lambda layer: order[layer.last])


def _stored(flipped: fx.Node) -> fx.Node | None:
    """The node that dequantises what a product reads as (experts, ins, outs)."""
    if flipped.target is not aten.transpose.int:
        return None
    axes = {axis % 3 for axis in flipped.args[1:3] if isinstance(axis, int)}
    whole = source(flipped.args[0]) if isinstance(flipped.args[0], fx.Node) else None
    if axes != {1, 2} or whole is None:
        return None
    if whole.target is aten.view.default and isinstance(whole.args[0], fx.Node):
        whole = whole.args[0]
    if whole.target is not DEQUANTIZE:
        return None
    rows = whole.meta["val"].shape
    # Packed along the inputs, whatever leads.
    return whole if int(rows[-1]) == int(flipped.meta["val"].shape[1]) else None


def _with_order(layer: Experts) -> Experts:
    """Read the tokens themselves, where slots are rows of them."""
    taken = source(layer.slots)
    if taken.target is aten.index.Tensor:
        chosen: Any = taken.args[1]
        one = isinstance(chosen, (list, tuple)) and len(chosen) == 1
        order = chosen[0] if one else None
    elif taken.target is aten.index_select.default and taken.args[1] == 0:
        order = taken.args[2]
    else:
        return layer
    tokens = taken.args[0]
    if not isinstance(order, fx.Node) or not isinstance(tokens, fx.Node):
        return layer
    value = order.meta["val"]
    if value.dim() != 1 or value.dtype not in (torch.int32, torch.int64):
        return layer
    return replace(layer, slots=tokens, order=order)


def _with_gate(layer: Experts) -> Experts:
    """Take in the gate, where the first half of the features gates the second."""
    found = gated_halves(layer.last)
    if found is None:
        return layer
    return replace(layer, halves=True, activation=found[0], last=found[1])
