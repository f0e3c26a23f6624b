"""Table look-ups."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from torchlathe.ir.axes.rule import Rule, Terms, Values, argument

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference

__all__ = ["Embedding"]


class Embedding(Rule):
    """``embedding``: rows are picked by value, so only columns can go."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The indices' axes, then the columns."""
        rows, columns = ax.terms(argument(node, "weight"))
        ax.pin(rows, "its rows are looked up by the values of a tensor")
        return (*ax.terms(argument(node, "indices")), columns)

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """A zero column gives a zero column."""
        unknown = flow.unknown(node)
        assert isinstance(unknown, tuple)
        column = flow.value(argument(node, "weight"), 1)
        return (*unknown[:-1], column)
