"""Stored numbers with scales (``torchlathe::dequantize``), and activations rounded by tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import fx

from torchlathe.ir.axes.inference import is_one
from torchlathe.ir.axes.rule import UNKNOWN, ZERO, Rule, Terms, Value, Values, argument

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference

__all__ = ["Dequantize", "RoundTokens"]


class Dequantize(Rule):
    """``values[*r, *c] * scales[*r, g] -> [*r, *c]``: rows are free, and columns of a row's scale.

    Columns stay where several share a byte, or a group of them has a scale of its own.
    """

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The rows of values, scales and zero points are the same."""
        values, scales = ax.terms(argument(node, "values")), ax.terms(argument(node, "scales"))
        lead = len(scales) - 1
        rows = list(values[:lead])
        for other in (scales, self._zeros(node, ax)):
            for place in range(lead if other else 0):
                if is_one(rows[place]):
                    rows[place] = other[place]
                elif not is_one(other[place]):
                    ax.unify(rows[place], other[place])
            ax.pin_all(other[lead:], "it is a group of columns that share a scale")
        rest = values[lead:]
        if argument(node, "group"):
            ax.pin_all(rest, "groups of its indices share a scale")
        packed = (
            len(rest) == 1 and ax.shape(node)[-1] != node.all_input_nodes[0].meta["val"].shape[-1]
        )
        if packed:
            ax.pin_all(rest, "several of its indices share a byte")
            columns = ax.fresh(ax.shape(node)[-1])
            ax.pin(columns, "several of its indices share a byte")
            rest = (columns,)
        return (*rows, *rest)

    @staticmethod
    def _zeros(node: fx.Node, ax: Inference) -> tuple[Any, ...]:
        zeros = argument(node, "zeros")
        return ax.terms(zeros) if isinstance(zeros, fx.Node) else ()

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """A scale of zero makes zeros, and so does the number zero without a zero point."""
        values, scales = argument(node, "values"), argument(node, "scales")
        symmetric = not isinstance(argument(node, "zeros"), fx.Node)
        # The bits of other formats are no numbers: what is zero there is not known.
        plain = symmetric and argument(node, "format") == "int8"
        rank, lead = flow.rank(node), flow.rank(scales) - 1
        out: list[Value | None] = []
        for axis in range(rank):
            if not flow.on(node, axis):
                out.append(None)
                continue
            held = [flow.value(values, axis)] if plain else []
            if axis < lead and argument(node, "format") in ("int8", "int4", "int2", "fp8"):
                held.append(flow.value(scales, axis))
            out.append(ZERO if any(v is not None and v.is_zero for v in held) else UNKNOWN)
        return tuple(out)


class RoundTokens(Rule):
    """Activations rounded with one scale a token: zeros stay zeros, and nobody misses them."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """As they come."""
        return ax.terms(argument(node, "x"))

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """What is not zero may have been the largest, that the scale was made of."""
        x = argument(node, "x")
        rank = flow.rank(node)
        axes: Any = argument(node, "axes")
        shared = {axis % rank for axis in axes}
        out: list[Value | None] = []
        for axis in range(rank):
            value = flow.value(x, axis)
            if value is None or value.is_zero:
                out.append(value)
                continue
            if axis in shared:
                flow.lose(node, "it finds a scale over indices that are not zero")
            out.append(UNKNOWN)
        return tuple(out)
