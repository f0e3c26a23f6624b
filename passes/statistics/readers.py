"""Contractions of data with a parameter: how each looks as a plain matrix product.

Whatever the op is (linear, matmul, einsum, grouped convolution, batched experts), the letters of
its `Layout` fall into four kinds: *groups* are on data, weight and result; *read* ones on data and
weight, and summed over; *samples* are the rest of the data; *outs* the rest of the weight. So

    result[g, n, o] = sum over k of  data[g, n, k] * weight[g, o, k]  (+ bias)

Source: own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from torchlathe.ir import Program, TensorKind
from torchlathe.ir.axes import AxisTerms, rule_of
from torchlathe.ir.axes.extents import is_static
from torchlathe.ir.axes.rule import argument
from torchlathe.ir.axes.rules.contraction import Contraction, Convolution
from torchlathe.ir.provenance import info

__all__ = ["Reader", "patches", "readers_of", "unfolds"]

Axes = tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class Reader:
    """One contraction of data with a parameter.

    Attributes:
        node: The call.
        operand: The one that is computed: the data.
        weight: Name of the parameter.
        letters: Extent of each letter; -1 where it is not static.
        data_axes: Letters of each axis of the data.
        weight_axes: Letters of each axis of the weight.
        result_axes: Letters of each axis of the result.
        groups: Letters that data, weight and result share.
        read: Letters that are summed over.
        kernel: Letters of a convolution's kernel.
    """

    node: fx.Node
    operand: fx.Node
    weight: str
    letters: Mapping[str, int]
    data_axes: Axes
    weight_axes: Axes
    result_axes: Axes
    groups: tuple[str, ...]
    read: tuple[str, ...]
    kernel: tuple[str, ...] = ()

    def at(self, node: fx.Node) -> Reader:
        """The same contraction in another program, where extents may be others."""
        data = node.all_input_nodes[self.node.all_input_nodes.index(self.operand)]
        groups: Any = argument(node, "groups", 1)
        letters = {name: groups if name == "g" else -1 for name in self.letters}
        return replace(self, node=node, operand=data, letters=letters)

    @property
    def read_axis(self) -> int:
        """The weight's axis that is summed over."""
        return next(i for i, axis in enumerate(self.weight_axes) if set(axis) & set(self.read))

    @property
    def outs(self) -> tuple[str, ...]:
        """Letters that only the weight and the result have."""
        own = (*self.groups, *self.read, *self.kernel)
        return tuple(name for axis in self.weight_axes for name in axis if name not in own)

    def data_rows(self, value: torch.Tensor) -> torch.Tensor:
        """The data as (groups, samples, read)."""
        return self._rows(value, self.data_axes, self.read)

    def result_rows(self, value: torch.Tensor) -> torch.Tensor:
        """The result as (groups, samples, outs)."""
        return self._rows(value, self.result_axes, self.outs)

    def weight_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as (groups, outs x kernel, read)."""
        split, order, sizes = self._split_weight(weight.shape)
        return weight.reshape(split).permute(order).reshape(sizes)

    def weight_from(self, matrix: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The inverse of `weight_matrix`.

        Args:
            matrix: Shape (groups, outs x kernel, read).
            shape: Of the weight.
        """
        split, order, _ = self._split_weight(shape)
        back = [order.index(i) for i in range(len(order))]
        return matrix.reshape([split[i] for i in order]).permute(back).reshape(tuple(shape))

    def layer_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as (groups, outs, features): what meets one row of features at a time.

        Features are what is read; where `unfolds` says so, what is read x the kernel, as `patches`
        has it. The kernel of another convolution stays with the outs.
        """
        matrix = self.weight_matrix(weight)
        if not unfolds(self):
            return matrix
        groups, _, read = matrix.shape
        split = matrix.reshape(groups, -1, self._kernel_size(weight.shape), read)
        return split.transpose(2, 3).flatten(2)

    def weight_from_layer(self, matrix: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """The inverse of `layer_matrix`.

        Args:
            matrix: Shape (groups, outs, features).
            shape: Of the weight.
        """
        if unfolds(self):
            groups, outs, _ = matrix.shape
            split = matrix.reshape(groups, outs, -1, self._kernel_size(shape))
            matrix = split.transpose(2, 3).flatten(1, 2)
        return self.weight_from(matrix, shape)

    def _kernel_size(self, shape: Sequence[int]) -> int:
        split, names = _split(shape, self.weight_axes, self.letters)
        return _product(dict(zip(names, split, strict=True)), self.kernel)

    def _split_weight(self, shape: Sequence[int]) -> tuple[list[int], list[int], tuple[int, ...]]:
        split, names = _split(shape, self.weight_axes, self.letters)
        sizes = dict(zip(names, split, strict=True))
        wanted = (*self.groups, *self.outs, *self.kernel, *self.read)
        order = [names.index(name) for name in wanted]
        extents = (
            _product(sizes, self.groups),
            _product(sizes, (*self.outs, *self.kernel)),
            _product(sizes, self.read),
        )
        return split, order, extents

    def _rows(self, value: torch.Tensor, axes: Axes, last: tuple[str, ...]) -> torch.Tensor:
        split, names = _split(value.shape, axes, self.letters)
        samples = [name for name in names if name not in (*self.groups, *last)]
        order = [names.index(name) for name in (*self.groups, *samples, *last)]
        sizes = dict(zip(names, split, strict=True))
        extents = (_product(sizes, self.groups), _product(sizes, samples), _product(sizes, last))
        return value.reshape(split).permute(order).reshape(extents)


def _product(sizes: Mapping[str, int], names: Sequence[str]) -> int:
    return math.prod(sizes[name] for name in names)


def _split(
    shape: Sequence[int], axes: Axes, letters: Mapping[str, int]
) -> tuple[list[int], list[str]]:
    """One size per letter of the axes."""
    sizes: list[int] = []
    names: list[str] = []
    for extent, axis in zip(shape, axes, strict=True):
        known = [letters.get(name, -1) for name in axis] if len(axis) > 1 else [-1]
        rest = math.prod(size for size in known if size != -1)
        sizes.extend(extent // rest if size == -1 else size for size in known)
        names.extend(axis)
    return sizes, names


def readers_of(program: Program) -> dict[fx.Node, Reader]:
    """All contractions of data with a parameter, in order of execution.

    Left out are those whose parameter is seen through another op first (a transposed view, a
    cast), and those with letters of no kind, for instance a data axis that is summed alone.
    """
    axis_map = program.analysis(AxisTerms)
    found = {}
    for node, layout in axis_map.layouts.items():
        rule = rule_of(node)
        if not isinstance(rule, Contraction) or len(layout.factors) != 2:
            continue
        (data, data_axes), (weight, weight_axes) = layout.factors
        if _parameter(program, data) is not None:
            (data, data_axes), (weight, weight_axes) = (weight, weight_axes), (data, data_axes)
        name = _parameter(program, weight)
        if name is None or info(data).tensor is not None:
            continue
        letters = {
            letter: int(term.extent) if is_static(term.extent) else -1
            for letter, term in layout.letters.items()
        }
        conv = isinstance(rule, Convolution)
        reader = _reader(node, data, name, data_axes, weight_axes, layout.output, letters, conv)
        if reader is not None:
            found[node] = reader
    return found


def _parameter(program: Program, node: fx.Node) -> str | None:
    name = info(node).tensor
    if name is None or program.entries[name].kind is not TensorKind.PARAMETER:
        return None
    return name


def _reader(
    node: fx.Node,
    data: fx.Node,
    weight: str,
    data_axes: Axes,
    weight_axes: Axes,
    result_axes: Axes,
    letters: dict[str, int],
    conv: bool,
) -> Reader | None:
    on_data, on_weight, on_result = (
        {name for axis in axes for name in axis} for axes in (data_axes, weight_axes, result_axes)
    )
    spatial = len(weight_axes) - 2 if conv else 0
    kernel = tuple(f"k{i}" for i in range(spatial))
    ordered = [name for axis in weight_axes for name in axis]
    groups = tuple(name for name in ordered if name in on_data & on_result)
    read = tuple(name for name in ordered if name in on_data - on_result)
    outs = on_weight - {*groups, *read, *kernel}
    plain = outs <= on_result and len(set(ordered)) == len(ordered) and bool(read)
    if not conv:
        # A convolution's positions are other ones before and after it.
        plain = plain and on_data - {*groups, *read} == on_result - {*groups, *outs}
    if not plain:
        return None
    return Reader(
        node, data, weight, letters, data_axes, weight_axes, result_axes, groups, read, kernel
    )


def unfolds(reader: Reader) -> bool:
    """Whether `patches` takes this: a convolution that is not transposed."""
    rule = rule_of(reader.node)
    if not isinstance(rule, Convolution) or rule._transposed(reader.node):
        return False
    weight: Any = argument(reader.node, "weight")
    return weight.meta["val"].dim() - 2 in (1, 2, 3)


def patches(reader: Reader, value: torch.Tensor) -> torch.Tensor | None:
    """What a convolution multiplies its kernel by, at each position.

    Args:
        reader: The convolution.
        value: Its input, (batch, channels, *positions).

    Returns:
        Shape (groups, batch x positions of the result, channels per group x kernel); None for
        other ops, and for convolutions that are transposed.
    """
    node = reader.node
    if not unfolds(reader):
        return None
    weight: Any = argument(node, "weight")
    kernel = [int(extent) for extent in weight.meta["val"].shape[2:]]
    if value.dim() != len(kernel) + 2:
        return None
    stride = _each(argument(node, "stride", 1), len(kernel))
    dilation = _each(argument(node, "dilation", 1), len(kernel))
    padding = _padding(argument(node, "padding", 0), kernel, dilation)
    value = F.pad(value, padding)
    columns = _windows(value, kernel, stride, dilation)
    groups: Any = argument(node, "groups", 1)
    batch, features, positions = columns.shape
    columns = columns.reshape(batch, groups, features // groups, positions)
    return columns.permute(1, 0, 3, 2).reshape(groups, batch * positions, features // groups)


def _windows(
    value: torch.Tensor, kernel: list[int], stride: list[int], dilation: list[int]
) -> torch.Tensor:
    """(batch, channels x kernel, positions) of what is padded already."""
    if len(kernel) == 1:
        value, kernel = value[:, :, None], [1, *kernel]
        stride, dilation = [1, *stride], [1, *dilation]
    if len(kernel) == 2:
        return F.unfold(value, tuple(kernel), dilation=tuple(dilation), stride=tuple(stride))
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), 2):
        # Each axis of positions leaves its windows at the end, in the order of the kernel.
        value = value.unfold(axis, d * (k - 1) + 1, s)[..., ::d]
    batch, channels = value.shape[:2]
    count = len(kernel)
    back = (0, 1, *range(2 + count, 2 + 2 * count), *range(2, 2 + count))
    return value.permute(back).reshape(batch, channels * math.prod(kernel), -1)


def _each(value: Any, count: int) -> list[int]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    return values * count if len(values) == 1 else values


def _padding(padding: Any, kernel: list[int], dilation: list[int]) -> list[int]:
    """Zeros before and after, the last axis first, as ``F.pad`` takes them."""
    if padding == "valid":
        both = [(0, 0) for _ in kernel]
    elif padding == "same":
        whole = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        both = [(total // 2, total - total // 2) for total in whole]
    else:
        both = [(p, p) for p in _each(padding, len(kernel))]
    return [p for pair in reversed(both) for p in pair]
