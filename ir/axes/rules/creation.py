"""Ops that make tensors from sizes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from torchlathe.ir.axes.rule import (
    SINGULAR,
    UNKNOWN,
    Rule,
    Terms,
    Value,
    Values,
    argument,
    with_arguments,
)

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference
    from torchlathe.ir.axes.resize import Resize

__all__ = ["Filled", "FilledLike", "Numbered"]


@dataclass(frozen=True)
class Filled(Rule):
    """``full``, ``zeros``, ``new_ones``: the same value everywhere, so any index may go.

    Attributes:
        constant: The value; None if it is the ``fill_value`` argument.
        sizes: Name of the size argument.
        name: Name of the argument with the value. Without one, as for ``empty``, nothing is known.
    """

    constant: float | None = None
    sizes: str = "size"
    name: str = "fill_value"

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Every axis is new."""
        return tuple(ax.fresh(e) for e in ax.shape(node))

    def value(self, node: fx.Node) -> Value:
        """The value that it is filled with."""
        value: Any = self.constant
        if value is None:
            value = argument(node, self.name)
        if not isinstance(value, int | float):
            return UNKNOWN
        return Value(float(value)) if math.isfinite(value) else SINGULAR

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """The fill value on every axis."""
        value = self.value(node)
        return tuple(value if flow.on(node, a) else None for a in range(flow.rank(node)))

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """The new sizes."""
        if not self.sizes:
            return
        sizes: Any = argument(node, self.sizes)
        new = resize.sizes(node, sizes, resize.terms(node))
        if new != list(sizes):
            resize.edit.set_args(node, *with_arguments(node, {self.sizes: new}))


@dataclass(frozen=True)
class FilledLike(Filled):
    """``zeros_like`` and its like: the shape is that of another tensor."""

    sizes: str = ""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The other tensor's terms."""
        return ax.terms(node.args[0])


class Numbered(Rule):
    """``arange``, ``eye``, ``linspace``: every index has its own value."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """New axes, which are fixed."""
        terms = tuple(ax.fresh(e) for e in ax.shape(node))
        ax.pin_all(terms, "its values are generated from the index")
        return terms

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Nothing is known."""
        return flow.unknown(node)
