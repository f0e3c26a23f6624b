"""One call of an op as the cost formulas see it: shapes and static arguments, no tensors."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import fx

from torchlathe.ir.extents import Extent, expression

__all__ = ["Call", "Value", "aten", "is_contiguous", "read_call", "value_of"]


def aten(names: str) -> frozenset[str]:
    """Full names of the ATen ops that a text lists."""
    return frozenset(f"aten::{name}" for name in names.split())


class Value(NamedTuple):
    """A tensor without its elements.

    Attributes:
        shape: Extents, integers or sympy expressions.
        dtype: The dtype.
        strides: In elements; tells whether a reshape has to copy.
    """

    shape: tuple[Extent, ...]
    dtype: torch.dtype
    strides: tuple[Extent, ...]

    @property
    def numel(self) -> Extent:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> Extent:
        """Size in bytes, as if it were dense."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Call:
    """A call that is hashable, so that equal layers of a model are counted once.

    Attributes:
        target: The op.
        args: Arguments; tensors are `Value`, lists are tuples.
        kwargs: Keyword arguments, as sorted pairs.
        out: The result; a tuple of values where the op gives several.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    out: Any

    @property
    def name(self) -> str:
        """Name of the op without its overload, ``aten::linear``; of a function, its name."""
        if isinstance(self.target, torch._ops.OpOverload):
            return self.target._schema.name
        return getattr(self.target, "__name__", str(self.target))

    def argument(self, name: str, default: Any = None) -> Any:
        """The value given for a named argument of the op's schema."""
        keywords = dict(self.kwargs)
        if name in keywords:
            return keywords[name]
        for index, argument in enumerate(self.target._schema.arguments):
            if argument.name == name:
                return self.args[index] if index < len(self.args) else default
        return default

    @property
    def outputs(self) -> tuple[Value, ...]:
        """The tensors that the call gives."""
        return tuple(_values(self.out))

    @property
    def inputs(self) -> tuple[Value, ...]:
        """The tensors that the call takes; equal ones may appear more than once."""
        return tuple(_values((self.args, tuple(v for _, v in self.kwargs))))


def value_of(item: Any) -> Any:
    """Turn metadata into what a `Call` holds."""
    if isinstance(item, torch.Tensor):
        strides = item.stride() if item.layout is torch.strided else ()
        return Value(
            tuple(map(expression, item.shape)), item.dtype, tuple(map(expression, strides))
        )
    if isinstance(item, list | tuple):
        return tuple(map(value_of, item))
    if isinstance(item, dict):
        return tuple((k, value_of(v)) for k, v in sorted(item.items()))
    return expression(item)


def read_call(node: fx.Node, values: dict[fx.Node, Any]) -> Call:
    """The call that a node makes.

    Args:
        node: A ``call_function`` node.
        values: What `value_of` gave for the nodes before it.
    """

    def read(item: Any) -> Any:
        if isinstance(item, fx.Node):
            return values.get(item)
        if isinstance(item, list | tuple):
            return tuple(map(read, item))
        if isinstance(item, slice):
            return ("slice", read(item.start), read(item.stop), read(item.step))
        return expression(item)

    kwargs = tuple((k, read(v)) for k, v in sorted(node.kwargs.items()))
    return Call(node.target, read(node.args), kwargs, values.get(node))


def is_contiguous(value: Value) -> bool:
    """Whether a tensor is dense in row-major order, without asking the shape environment."""
    expected: Extent = 1
    for extent, stride in zip(reversed(value.shape), reversed(value.strides), strict=False):
        if extent != 1 and stride != expected:
            return False
        expected = expected * extent
    return len(value.strides) == len(value.shape)


def _values(item: Any) -> list[Value]:
    if isinstance(item, Value):
        return [item]
    if isinstance(item, tuple):
        return [value for part in item for value in _values(part)]
    return []
