"""Convolutions in the logical form: those in 8 bits become one op."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from torchlathe.ir import Program
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.extents import as_int, example_sizes, expression
from torchlathe.kernels.convolution.op import pack_conv
from torchlathe.kernels.dequantize.formats import pack
from torchlathe.passes.rewrite.lowering.forms import Maker
from torchlathe.passes.rewrite.lowering.layers import Layer, activation_of
from torchlathe.passes.rewrite.lowering.seeing import next_reader

__all__ = ["Convolution", "convolution_of"]

aten = torch.ops.aten
ops = torch.ops.torchlathe
_PLAIN = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


@dataclass(frozen=True, eq=False)
class Convolution:
    """One convolution that reads stored numbers.

    Attributes:
        layer: What it reads, and what follows it.
        shape: Of the input, at the sizes of the example inputs.
        kernel: Extents of a window.
        stride: Steps between windows.
        padding: Zeros around a sample, or a word.
        dilation: Steps between what a window sees.
        groups: Of channels.
    """

    layer: Layer
    shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    op = "w8a8_conv2d"

    @property
    def weights(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return (
            int(self.layer.call.meta["val"].shape[1]),
            self.shape[1] // self.groups,
            *self.kernel,
        )

    def refuses(self) -> str | None:
        """Why the op does not take it, or None."""
        layer = self.layer
        if layer.call.target is not aten.conv2d.default or len(self.shape) != 4:
            return f"{layer.kind} of {len(self.shape)} axes, the op takes conv2d of four"
        if self.groups != 1:
            return f"it has {self.groups} groups"
        if layer.activations != "int8" or layer.format.name != "int8" or layer.group:
            rounded = layer.activations or "floating"
            return (
                f"its numbers are {layer.format.name} and its inputs {rounded}; each weight is "
                "read at many positions, so that unpacking it first is cheap"
            )
        return "its numbers have zero points" if layer.node("zeros") is not None else None

    def write(self, maker: Maker) -> None:
        """Put the op in its place."""
        layer, program = self.layer, maker.edit.program
        data, call = maker.now(layer.operand), layer.call

        def make(target: Any, *args: Any) -> fx.Node:
            return maker.edit.call(target, args, like=call, before=call)

        flat = make(aten.flatten.using_ints, data, 1)
        pair = make(ops.quantize_tokens.default, flat, "int8")
        numbers, scales = (make(operator.getitem, pair, i) for i in (0, 1))
        numbers = make(aten.view_as.default, numbers, data)
        values = layer.tensor(program, "values")
        assert values is not None
        row_scales = layer.tensor(program, "scales")
        assert row_scales is not None
        weight = maker.tensors(
            layer, "windows", lambda: pack_conv(values.view(self.weights), row_scales[:, 0])
        )
        geometry = [list(each) for each in (self.kernel, self.stride, self.padding, self.dilation)]
        target, bias = ops.w8a8_conv2d.default, maker.now(layer.bias)
        new = maker.call(
            layer, target, numbers, scales, *weight, bias, *geometry, self.weights[0],
            layer.dtype, layer.activation,
        )  # fmt: skip
        maker.stands(layer.last, new)

    def key(self, name: str) -> str:
        """What measurements of it are kept under."""
        sizes = "x".join(map(str, (*self.shape, *self.weights)))
        kind = str(self.layer.dtype).removeprefix("torch.")
        extra = f"|{self.layer.format.name}|{self.layer.group}|{self.layer.activations}"
        geometry = f"{self.stride}{self.padding}{self.dilation}{self.groups}".replace(" ", "")
        return f"conv {name}|{sizes}|{geometry}|{kind}{extra if name != 'dense' else ''}"

    def contestant(self, name: str) -> Callable[[], Any]:
        """A call of the dense convolution, the stored one or the op, on random data."""
        layer, form = self.layer, self.layer.format
        x = torch.randn(self.shape).to(layer.dtype)
        plain: Any = layer.call.target
        rest = (self.stride, self.padding, self.dilation, self.groups)
        if name == "dense":
            dense = torch.randn(self.weights).to(layer.dtype)
            return lambda: plain(x, dense, None, *rest)
        outs, columns = self.weights[0], torch.Size(self.weights[1:]).numel()
        codes = torch.randint(0, 2 ** min(form.bits, 7), (outs, columns)).to(form.stored)
        groups = 1 if layer.group == 0 else -(-columns // layer.group)
        if name == "stored":
            kind = torch.float32 if form.scales == "float" else torch.uint8
            scales = (torch.rand(outs, groups) * 100 + 1).to(kind)
            args = (pack(codes, form), scales, None, None, columns, layer.group, form.name)

            def stored() -> Any:
                data = x
                if layer.activations is not None:
                    axes = list(range(1 - len(self.shape), 0))
                    data = ops.quantize_dequantize_tokens(x, axes, layer.activations)
                weight = ops.dequantize(*args, layer.dtype).view(self.weights)
                return plain(data, weight, None, *rest)

            return stored
        weight = pack_conv(codes.view(self.weights), torch.rand(outs))

        def int8() -> Any:
            numbers, scales = ops.quantize_tokens(x.flatten(1), "int8")
            return ops.w8a8_conv2d(
                numbers.view_as(x), scales, *weight, None, self.kernel, self.stride, self.padding,
                self.dilation, outs, layer.dtype, "none",
            )  # fmt: skip

        return int8


def convolution_of(program: Program, layer: Layer) -> Convolution | None:
    """A layer as a convolution; None if it is something else."""
    call = layer.call
    if call.target not in _PLAIN.values():
        return None
    spatial = next(n for n, target in _PLAIN.items() if target is call.target)
    value = layer.operand.meta["val"]
    sizes = example_sizes(program)
    shape = tuple(as_int(expression(extent), sizes) for extent in value.shape)
    if len(shape) != spatial + 2:
        return None
    bias: Any = argument(call, "bias")
    after = next_reader(call)
    name = None if after is None else activation_of(after[1])
    layer = replace(
        layer,
        bias=bias if isinstance(bias, fx.Node) else None,
        activation=name or "none",
        last=call if name is None or after is None else after[1],
        rows=1,
    )
    kernel = call.args[1].meta["val"].shape[2:]  # type: ignore[union-attr]
    given = [argument(call, part) for part in ("stride", "padding", "dilation")]
    stride, padding, dilation = (
        part if isinstance(part, str) else _each(part, spatial) for part in given
    )
    assert not isinstance(stride, str)
    assert not isinstance(dilation, str)
    return Convolution(
        layer,
        shape,
        tuple(int(k) for k in kernel),
        stride,
        padding,
        dilation,
        int(argument(call, "groups")),
    )


def _each(value: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    """One number for each spatial axis."""
    if isinstance(value, int):
        return (value,) * spatial
    numbers = tuple(int(v) for v in value)
    return numbers if len(numbers) == spatial else numbers * spatial
