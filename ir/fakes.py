"""Fake values: the shapes, dtypes and strides that ``node.meta["val"]`` holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor

from torchlathe.ir.errors import Error, VerifyError
from torchlathe.ir.extents import expression
from torchlathe.ir.provenance import describe
from torchlathe.ir.strides import StrideSampler

if TYPE_CHECKING:
    from torch._subclasses.fake_tensor import FakeTensorMode

__all__ = ["FakeValues", "fake_run", "same_value", "valueless"]

# Ops whose results have sizes, or values, that depend on data.
_BY_DATA = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)

# Elementwise ops whose result is like their widest operand where all are of one floating dtype.
_ELEMENTWISE = frozenset(
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (
        *((name, kind) for name in ("add", "sub", "mul", "div") for kind in ("Tensor", "Scalar")),
        *((name, "default") for name in ("rsqrt", "sqrt", "neg", "reciprocal", "square")),
    )
)


def fake_run(node: fx.Node, mode: Any) -> Any:
    """Run one ``call_function`` node on the fake values of its inputs.

    Raises:
        VerifyError: The op refuses its inputs, for instance because shapes do not fit.
    """
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    assert callable(node.target)
    try:
        # The C++ kernels of composite ops would fix symbolic extents to those of the example.
        with mode, torch.no_grad(), enable_python_dispatcher():
            return node.target(*args, **kwargs)
    except Error:
        raise
    except Exception as error:
        shapes = [
            f"%{n.name}: {tuple(n.meta['val'].shape)}"
            for n in node.all_input_nodes
            if isinstance(n.meta.get("val"), torch.Tensor)
        ]
        raise VerifyError(
            f"{node.target} does not accept its inputs ({', '.join(shapes)}): {error}",
            where=describe(node),
        ) from error


def valueless(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape and no values: it is fake, or on the meta device."""
    return isinstance(tensor, FakeTensor) or tensor.device.type == "meta"


def same_value(a: Any, b: Any) -> bool:
    """Whether two fake values are interchangeable as metadata."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (
            a.dtype == b.dtype
            and a.device == b.device
            and a.dim() == b.dim()
            and all(_same_extent(x, y) for x, y in zip(a.shape, b.shape, strict=True))
            and all(_same_extent(x, y) for x, y in zip(a.stride(), b.stride(), strict=True))
        )
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_value, a, b))
    return type(a) is type(b) and _same_extent(a, b)


def _same_extent(a: Any, b: Any) -> bool:
    # Comparing the expressions, not the SymInts, adds no guard to the shape environment.
    a = a.node.expr if isinstance(a, torch.SymInt | torch.SymFloat | torch.SymBool) else a
    b = b.node.expr if isinstance(b, torch.SymInt | torch.SymFloat | torch.SymBool) else b
    return bool(a == b)


class FakeValues:
    """Makes fake values for known shapes, each of a kind once.

    Propagating symbolic shapes through an op takes milliseconds, and making a symbolic tensor
    nearly one; where shapes are known already, only the strides are left to find, and nodes of
    the same shape can share one value, since nobody writes to metadata.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._made: dict[Any, torch.Tensor] = {}
        self._runs: dict[Any, Any] = {}
        self._sampler = StrideSampler()
        self._alive: list[Any] = []

    def run(self, node: fx.Node) -> Any:
        """As `fake_run`, once for all nodes that call the same op on the same fake values.

        The layers of a model repeat each other, and so do the nodes that a rewrite adds to them.
        """
        like = _widest_operand(node)
        if like is not None:
            return like
        key = self._call_key(node)
        if key is None:
            return fake_run(node, self._mode)
        if key not in self._runs:
            self._runs[key] = fake_run(node, self._mode)
        return self._runs[key]

    def _call_key(self, node: fx.Node) -> Any:
        tags = getattr(node.target, "tags", None)
        if tags is None or any(tag in tags for tag in _BY_DATA):
            return None  # every call has sizes of its own, or it is no op of torch's

        def identity(used: fx.Node) -> str:
            value = used.meta["val"]
            self._alive.append(value)  # an id is one only while its object lives
            return f"<{id(value)}>"

        return node.target, repr(fx.map_arg((node.args, node.kwargs), identity))

    def resized(self, node: fx.Node, shapes: Sequence[Sequence[Any]]) -> Any:
        """The value of a node that has other shapes now; None where its strides are not known.

        Args:
            node: It has its old value, and its inputs have their new ones.
            shapes: Per tensor of the value, its new extents.
        """
        value = node.meta["val"]
        tensors = [value] if isinstance(value, torch.Tensor) else list(_tensors(value))
        new = [self._dense(t, list(shape)) for t, shape in zip(tensors, shapes, strict=True)]
        if None in new:
            strides = self._sampler.strides(node, shapes)
            if strides is None:
                return None
            new = [
                self._made_once(t, list(shape), list(steps))
                for t, shape, steps in zip(tensors, shapes, strides, strict=True)
            ]
        if isinstance(value, torch.Tensor):
            return new[0]
        rest = iter(new)
        return type(value)(next(rest) if isinstance(v, torch.Tensor) else v for v in value)

    def _dense(self, value: torch.Tensor, shape: list[Any]) -> torch.Tensor | None:
        """A value without gaps, in the memory order of the old one; None if that one has some."""
        order = _dense_order(value)
        if order is None:
            return None
        if order == sorted(order):
            return self._made_once(value, shape, None)
        strides: list[Any] = [0] * len(shape)
        step: Any = 1
        for axis in reversed(order):
            strides[axis] = step
            if axis != order[0]:  # a product with a symbol takes long, and this one is not needed
                step = step * shape[axis]
        return self._made_once(value, shape, strides)

    def _made_once(
        self, like: torch.Tensor, shape: list[Any], strides: list[Any] | None
    ) -> torch.Tensor:
        """A value of this shape; None for the strides that follow from it."""
        steps = None if strides is None else tuple(map(expression, strides))
        key = (tuple(map(expression, shape)), steps, like.dtype, like.device)
        if key not in self._made:
            if strides is None:
                # Where extents are symbolic, this takes half the arithmetic of given strides.
                meta = torch.empty(shape, dtype=like.dtype, device="meta")
            else:
                meta = torch.empty_strided(shape, strides, dtype=like.dtype, device="meta")
            self._made[key] = FakeTensor(self._mode, meta, like.device)
        return self._made[key]


def _tensors(values: Sequence[Any]) -> Iterator[torch.Tensor]:
    return (item for item in values if isinstance(item, torch.Tensor))


def _widest_operand(node: fx.Node) -> torch.Tensor | None:
    """The operand of an elementwise op that the result is like in shape, strides and dtype."""
    if node.target not in _ELEMENTWISE:
        return None
    values = [used.meta["val"] for used in node.all_input_nodes]
    if not all(isinstance(v, torch.Tensor) and v.is_floating_point() for v in values):
        return None
    wide: torch.Tensor = max(values, key=lambda v: v.dim())
    order = _dense_order(wide)
    if order is None:
        return None
    for value in values:
        if value is not wide and not _broadcasts_onto(value, wide, order):
            return None
    return wide


def _broadcasts_onto(value: torch.Tensor, wide: torch.Tensor, order: list[int]) -> bool:
    """Whether a tensor changes nothing about the other's shape, memory order and dtype."""
    if value.dtype != wide.dtype or value.device != wide.device:
        return False
    missing = wide.dim() - value.dim()
    strides = []
    for axis in order:
        if axis < missing or _same_extent(value.shape[axis - missing], 1):
            continue
        if not _same_extent(value.shape[axis - missing], wide.shape[axis]):
            return False
        strides.append(_hint(value.stride(axis - missing)))
    return None not in strides and strides == sorted(strides, reverse=True)


def _hint(number: Any) -> Any:
    return number.node.hint if isinstance(number, torch.SymInt) else number


def _dense_order(value: torch.Tensor) -> list[int] | None:
    """Axes from outermost to innermost, if the tensor has no gaps and no overlaps."""
    sizes, strides = list(map(_hint, value.shape)), list(map(_hint, value.stride()))
    if any(x is None for x in (*sizes, *strides)):
        return None
    order = sorted(range(len(sizes)), key=lambda i: (-strides[i], i))
    step = 1
    for axis in reversed(order):
        if sizes[axis] != 1 and strides[axis] != step:
            return None
        step *= sizes[axis]
    return order
