"""Ops that reduce along axes, or normalise along them without parameters."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from torchlathe.ir.axes.extents import is_static
from torchlathe.ir.axes.rule import UNKNOWN, ZERO, Layout, Rule, Terms, Value, Values, argument
from torchlathe.ir.axes.rules.shaping import zeros_or_unknown
from torchlathe.ir.axes.terms import ONE, Term

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference
    from torchlathe.ir.axes.resize import Resize

__all__ = ["AlongAxis", "Reduce", "correct_means", "reduced_axes"]

_MUL = torch.ops.aten.mul.Tensor
_ADD = torch.ops.aten.add.Tensor


def reduced_axes(node: fx.Node, rank: int) -> set[int]:
    """The axes that a reduction reduces; all of them if it names none."""
    dims: Any = argument(node, "dim")
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return set(range(rank))
    chosen = dims if isinstance(dims, list | tuple) else [dims]
    return {d % rank for d in chosen} if rank else set()


@dataclass(frozen=True)
class Reduce(Rule):
    """A reduction over some axes, with one or several results.

    Attributes:
        kind: "sum" ignores zeros; "mean" and "var_mean" are made up for by a divisor; with
            "extremum" and "other" leaving out even zeros changes the result. Along other axes,
            sums, means and the values of extrema of zeros are zero.
    """

    kind: Literal["sum", "mean", "var_mean", "extremum", "other"] = "other"

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The axes that stay, with `ONE` where ``keepdim`` asks for it."""
        source = node.args[0]
        terms = ax.terms(source)
        reduced = reduced_axes(node, len(terms))
        values = node.meta["val"]
        first = values if isinstance(values, torch.Tensor) else values[0]
        keepdim = first.dim() == len(terms)
        out: list[Term] = []
        for axis, term in enumerate(terms):
            if axis not in reduced:
                out.append(term)
            elif keepdim:
                out.append(ONE)
        if isinstance(values, torch.Tensor):
            return tuple(out)
        return [tuple(out) for _ in values]

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Report what the reduced axes lose; other axes keep a zero."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        rank = flow.rank(source)
        reduced = reduced_axes(node, rank)
        for axis in reduced:
            value = flow.value(source, axis)
            if value is not None:
                self._lost(node, value, flow)
        kept = [v for a in range(rank) if a not in reduced and (v := flow.value(source, a))]
        keeps = self.kind in ("sum", "mean", "extremum") and all(v.is_zero for v in kept)
        passed = ZERO if keeps else UNKNOWN
        if self.kind == "mean" and len(kept) == 1:
            passed = kept[0]
        number = flow.atom.number
        rows = [
            # Only the first result has values; those of the others are positions.
            tuple((UNKNOWN if place else passed) if number in axis else None for axis in row)
            for place, row in enumerate(flow.index.results(node))
        ]
        return rows if isinstance(node.meta["val"], list | tuple) else rows[0]

    def reads(self, node: fx.Node, operand: fx.Node, layout: Layout | None) -> set[int]:
        """The reduced axes."""
        return reduced_axes(node, operand.meta["val"].dim())

    def _lost(self, node: fx.Node, value: Value, flow: Flow) -> None:
        if not value.is_zero:
            flow.lose(node, "it reduces over indices that are not zero")
        elif self.kind == "sum" and _order(node) < 0:
            flow.lose(node, "even zeros take part in a norm of negative order")
        elif self.kind == "var_mean" and _unbiased(node) and not self._static(node, flow):
            flow.lose(node, "how many elements the variance is over is dynamic")
        elif self.kind in ("mean", "var_mean"):
            flow.correct(node, "the mean still counts the erased zeros")
        elif self.kind in ("extremum", "other"):
            flow.lose(node, "even zeros take part in this reduction")

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """Keep the divisor that counts the erased zeros."""
        if node not in resize.corrected or self.kind not in ("mean", "var_mean"):
            return
        source = node.args[0]
        assert isinstance(source, fx.Node)
        terms = resize.terms(source)
        share = 1.0
        for axis in reduced_axes(node, len(terms)):
            share *= resize.share(terms[axis])
        if share == 1.0:
            return
        if self.kind == "var_mean" and (less := _unbiased(node)):
            # The biased variance is corrected, and then divided by one less.
            count = math.prod(terms[a].extent for a in reduced_axes(node, len(terms)))
            first = resize.axis_map.results(node)[0] or ()
            edit = resize.edit
            edit.set_target(node, torch.ops.aten.var_mean.correction)
            keepdim = len(first) == len(terms)
            dims = sorted(reduced_axes(node, len(terms)))
            edit.set_args(node, (source, dims), {"correction": 0, "keepdim": keepdim})
            correct_means(node, share, resize, self.kind, scale=count / max(count - less, 0))
            return
        correct_means(node, share, resize, self.kind)

    @staticmethod
    def _static(node: fx.Node, flow: Flow) -> bool:
        terms = flow.index.axis_map.terms(node.all_input_nodes[0])
        return all(is_static(terms[a].extent) for a in reduced_axes(node, len(terms)))


def _order(node: fx.Node) -> float:
    """The order of a vector norm; 1 for a plain sum."""
    order: Any = argument(node, "ord", argument(node, "p"))
    return float(order) if isinstance(order, int | float) else 1.0


def _unbiased(node: fx.Node) -> float:
    """What a variance subtracts from the number of elements that it divides by."""
    names = {a.name for a in node.target._schema.arguments}  # type: ignore[union-attr]
    if "unbiased" in names:
        return float(bool(argument(node, "unbiased", True)))
    found: Any = argument(node, "correction")
    return 1.0 if found is None else float(found)


def correct_means(
    node: fx.Node, share: float, resize: Resize, kind: str, *, scale: float = 1.0
) -> None:
    """Rescale means over ``kept`` elements to means over all of them, the rest being zeros.

    With s = kept / all: mean = s * mean', and from E[x^2] = s (var' + mean'^2),
    var = s * var' + s (1 - s) * mean'^2 (own; algebra of the zeros' share). The variance is
    multiplied by ``scale`` on top.
    """
    edit = resize.edit
    if kind == "mean":
        edit.replace(node, edit.call(_MUL, (node, share), like=node))
        return
    taken: dict[Any, fx.Node] = {u.args[1]: u for u in node.users}
    mean = taken.get(1)
    if mean is None:
        mean = edit.call(operator.getitem, (node, 1), like=node)
    mean_users = list(mean.users)
    new_mean = edit.call(_MUL, (mean, share), like=mean)
    edit.replace(mean, new_mean, mean_users)
    if (var := taken.get(0)) is not None:
        var_users = list(var.users)
        last = mean if var < mean else var
        square = edit.call(_MUL, (mean, mean), like=last)
        extra = edit.call(_MUL, (square, scale * share * (1.0 - share)), like=square)
        scaled = edit.call(_MUL, (var, scale * share), like=extra)
        total = edit.call(_ADD, (scaled, extra), like=scaled)
        edit.replace(var, total, var_users)


@dataclass(frozen=True)
class AlongAxis(Rule):
    """Ops that compute along one axis and keep the shape: ``softmax``, ``cumsum``.

    Attributes:
        linear: Whether zeros along other axes stay zero.
    """

    linear: bool = False

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The shape does not change."""
        terms = ax.terms(node.args[0])
        values = node.meta["val"]
        return terms if isinstance(values, torch.Tensor) else [terms for _ in values]

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Along the axis itself every index matters."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        rank = flow.rank(source)
        for axis in reduced_axes(node, rank):
            if flow.value(source, axis) is not None:
                flow.lose(node, "every index along this axis takes part in it")
        if self.linear:
            return zeros_or_unknown(node, flow)
        return flow.unknown(node)
