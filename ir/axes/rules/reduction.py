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
from torchlathe.ir.axes.terms import ONE, Term

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference
    from torchlathe.ir.axes.resize import Resize

__all__ = ["AlongAxis", "Reduce", "correct_means", "reduced_axes"]

_MUL = torch.ops.aten.mul.Tensor
_ADD = torch.ops.aten.add.Tensor
_SQRT = torch.ops.aten.sqrt.default
_CLAMP_MIN = torch.ops.aten.clamp_min.default
_CLAMP_MAX = torch.ops.aten.clamp_max.default
_VAR_MEAN = torch.ops.aten.var_mean.correction


def reduced_axes(node: fx.Node, rank: int) -> set[int]:
    """The axes that a reduction reduces; all of them if it names none."""
    dims: Any = argument(node, "dim")
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        return set(range(rank))
    chosen = dims if isinstance(dims, list | tuple) else [dims]
    return {d % rank for d in chosen} if rank else set()


Kind = Literal[
    "sum", "mean", "var_mean", "std_mean", "var", "std", "extremum", "logsumexp", "other"
]
_SPREADS = ("var_mean", "std_mean", "var", "std")
_MAXIMA = ("aten::amax", "aten::max")
_MINIMA = ("aten::amin", "aten::min")


@dataclass(frozen=True)
class Reduce(Rule):
    """A reduction over some axes, with one or several results.

    Attributes:
        kind: "sum" ignores zeros (as norms do); means and variances are made up for by a divisor,
            a maximum or minimum by comparing with zero, and "logsumexp" by adding the zeros' ones;
            with a median and "other" leaving out even zeros changes the result. Along other axes
            zeros stay zero but for "logsumexp" and "other".
    """

    kind: Kind = "other"

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
        keeps = self.kind not in ("logsumexp", "other") and all(v.is_zero for v in kept)
        passed = ZERO if keeps else UNKNOWN
        if self.kind in ("mean", "extremum") and len(kept) == 1:
            passed = kept[0]
        number = flow.atom.number
        rows = [
            # The second result of an extremum is positions.
            tuple(
                (UNKNOWN if place and self.kind not in _SPREADS else passed)
                if number in axis
                else None
                for axis in row
            )
            for place, row in enumerate(flow.index.results(node))
        ]
        return rows if isinstance(node.meta["val"], list | tuple) else rows[0]

    def reads(self, node: fx.Node, operand: fx.Node, layout: Layout | None) -> set[int]:
        """The reduced axes."""
        return reduced_axes(node, operand.meta["val"].dim())

    def _lost(self, node: fx.Node, value: Value, flow: Flow) -> None:
        """What it takes to leave out these indices of a reduced axis."""
        if not value.is_zero:
            flow.lose(node, "it reduces over indices that are not zero")
        elif self.kind == "sum":
            if _order(node) < 0:
                flow.lose(node, "even zeros take part in a norm of negative order")
        elif self.kind == "mean":
            flow.correct(node, "the mean still counts the erased zeros")
        elif self.kind in _SPREADS:
            if _unbiased(node) and not self._static(node, flow):
                flow.lose(node, "how many elements the variance is over is dynamic")
            else:
                flow.correct(node, "the variance still counts the erased zeros")
        elif self.kind == "extremum" and _comparable(node):
            flow.correct(node, "it still counts the erased zeros as candidates")
        elif self.kind == "logsumexp" and self._static(node, flow):
            flow.correct(node, "the sum still counts the erased zeros, as ones")
        else:
            flow.lose(node, "even zeros take part in this reduction")

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """Keep what the erased zeros added."""
        if node not in resize.corrected:
            return
        source = node.args[0]
        assert isinstance(source, fx.Node)
        terms = resize.terms(source)
        reduced = reduced_axes(node, len(terms))
        share = 1.0
        for axis in reduced:
            share *= resize.share(terms[axis])
        if share == 1.0:
            return
        if self.kind == "mean":
            correct_means(node, share, resize, "mean")
        elif self.kind in _SPREADS:
            _Spread(node, resize).correct(share, self.kind)
        elif self.kind == "extremum":
            _compare_with_zero(node, resize)
        else:
            all_of_them = math.prod(terms[a].extent for a in reduced)
            _add_ones(node, resize, round(all_of_them * (1 - share)))

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


def _comparable(node: fx.Node) -> bool:
    """Whether it is a maximum or minimum of numbers whose positions nothing asks for."""
    if node.target._schema.name not in (*_MAXIMA, *_MINIMA):  # type: ignore[union-attr]
        return False
    value = node.meta["val"]
    if isinstance(value, torch.Tensor):
        return value.dtype != torch.bool
    values_alone = all(u.target is operator.getitem and u.args[1] == 0 for u in node.users)
    return values_alone and value[0].dtype != torch.bool


def _compare_with_zero(node: fx.Node, resize: Resize) -> None:
    """``max(x', 0)`` is the maximum of what is left and of the erased zeros."""
    name = node.target._schema.name  # type: ignore[union-attr]
    target = _CLAMP_MIN if name in _MAXIMA else _CLAMP_MAX
    several = not isinstance(node.meta["val"], torch.Tensor)
    for result in list(node.users) if several else [node]:
        new = resize.edit.call(target, (result, 0), like=result)
        resize.edit.replace(result, new)


def _add_ones(node: fx.Node, resize: Resize, count: int) -> None:
    """``log(exp(x') + count)``: each erased zero added ``exp(0)``."""
    edit = resize.edit
    ones = edit.call(torch.ops.aten.full_like.default, (node, math.log(count)), like=node)
    users = [user for user in node.users if user is not ones]
    new = edit.call(torch.ops.aten.logaddexp.default, (node, ones), like=ones)
    edit.replace(node, new, users)


class _Spread:
    """A variance or a deviation, rewritten as moments that can be corrected."""

    def __init__(self, node: fx.Node, resize: Resize) -> None:
        self.node, self.resize, self.edit = node, resize, resize.edit
        source = node.args[0]
        assert isinstance(source, fx.Node)
        terms = resize.terms(source)
        self.dims = sorted(reduced_axes(node, len(terms)))
        first = resize.axis_map.results(node)[0] or ()
        self.arguments = (
            (source, self.dims),
            {
                "correction": 0,
                "keepdim": len(first) == len(terms) and bool(terms),
            },
        )
        self.scale = 1.0
        if less := _unbiased(node):
            # The biased variance is corrected, and then divided by one less.
            count = math.prod(terms[a].extent for a in self.dims)
            self.scale = count / (count - less) if count > less else math.nan

    def correct(self, share: float, kind: str) -> None:
        """Moments in place of the node, and corrected."""
        edit, node = self.edit, self.node

        def call(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
            return edit.call(target, args, kwargs, like=node, before=node)

        args, kwargs = self.arguments
        moments = call(_VAR_MEAN, *args, **kwargs)
        var, mean = call(operator.getitem, moments, 0), call(operator.getitem, moments, 1)
        spread = call(_SQRT, var) if kind in ("std", "std_mean") else var
        if kind in ("var", "std"):
            edit.replace(node, spread)
        else:
            for taken in list(node.users):
                edit.replace(taken, mean if taken.args[1] else spread)
        correct_means(moments, share, self.resize, "var_mean", scale=self.scale)


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
        linear: Whether zeros add nothing to the other indices, and zeros along other axes stay
            zero.
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
            value = flow.value(source, axis)
            if value is not None and not (self.linear and value.is_zero):
                flow.lose(node, "every index along this axis takes part in it")
        if not self.linear:
            return flow.unknown(node)
        along = reduced_axes(node, rank)
        return tuple(
            None if value is None else ZERO if value.is_zero and axis not in along else UNKNOWN
            for axis, value in ((a, flow.value(source, a)) for a in range(rank))
        )
