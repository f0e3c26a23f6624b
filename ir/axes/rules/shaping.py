"""Ops that move elements without computing: views, permutations, expansion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torchlathe.ir.axes.inference import is_one
from torchlathe.ir.axes.rule import (
    UNKNOWN,
    Rule,
    Terms,
    Value,
    Values,
    argument,
    join,
    with_arguments,
)
from torchlathe.ir.axes.terms import ONE, Term

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference
    from torchlathe.ir.axes.resize import Resize

__all__ = [
    "Expand",
    "Permute",
    "Repeat",
    "RepeatInterleave",
    "Reshape",
    "Squeeze",
    "Structural",
    "Unsqueeze",
    "first_operand",
    "from_right",
    "zeros_or_unknown",
]


class Structural(Rule):
    """Elements only change places, so an erased index holds what it held before."""

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """The values of where the elements came from."""
        return flow.structural(node)


def first_operand(node: fx.Node, flow: Flow) -> Values:
    """What the first operand holds, where the others only give places or sizes."""
    sources: Any = node.args[0]
    operands = sources if isinstance(sources, list | tuple) else [sources]
    found = [v for operand in operands for v in flow.values(operand)]
    value = join(found) if found else UNKNOWN

    def row(values: tuple[Value | None, ...]) -> tuple[Value | None, ...]:
        return tuple(None if v is None else value for v in values)

    unknown = flow.unknown(node)
    return [row(r) for r in unknown] if isinstance(unknown, list) else row(unknown)


def from_right(node: fx.Node, flow: Flow) -> Values:
    """Per axis what the first operand holds there, aligned at the right; new axes unknown."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    lead = flow.rank(node) - flow.rank(source)
    unknown = flow.unknown(node)
    assert isinstance(unknown, tuple)
    return tuple(
        value if value is None or axis < lead else flow.value(source, axis - lead) or value
        for axis, value in enumerate(unknown)
    )


def zeros_or_unknown(node: fx.Node, flow: Flow) -> Values:
    """Zeros stay zeros, and nothing else is known: for ops that mix in zeros, or sum."""
    values = [v for used in node.all_input_nodes for v in flow.values(used)]
    return flow.structural(node) if all(v.is_zero for v in values) else flow.unknown(node)


@dataclass(frozen=True)
class Reshape(Structural):
    """``view``, ``reshape``, ``flatten``, ``unflatten``: row-major regrouping.

    Attributes:
        sizes: Name of the size argument; "" where there is none to recompute.
    """

    sizes: str = ""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Regroup the factors."""
        source = node.args[0]
        return ax.reshape(ax.terms(source), ax.shape(node))

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """The new sizes are the extents of the result's terms."""
        if not self.sizes:
            return
        terms = resize.terms(node)
        sizes: Any = argument(node, self.sizes)
        if len(sizes) != len(terms):  # unflatten gives sizes for one axis only
            rank = len(resize.terms(node.args[0]))  # type: ignore[arg-type]
            start = argument(node, "dim") % rank
            terms = terms[start : start + len(sizes)]
        new = resize.sizes(node, sizes, terms)
        if new != list(sizes):
            resize.edit.set_args(node, *with_arguments(node, {self.sizes: new}))


@dataclass(frozen=True)
class Permute(Structural):
    """``permute``, ``transpose``, ``t``, ``movedim`` and their like."""

    def order(self, node: fx.Node, rank: int) -> list[int]:
        """Which axis of the input each axis of the result is."""
        name = node.target._schema.name  # type: ignore[union-attr]
        if name == "aten::permute":
            dims: Any = argument(node, "dims")
            return [d % rank for d in dims]
        order = list(range(rank))
        if name == "aten::transpose":
            first, second = argument(node, "dim0") % rank, argument(node, "dim1") % rank
            order[first], order[second] = second, first
            return order
        # What the op does to a tensor whose extents are all different tells the order.
        assert callable(node.target)
        probe = torch.empty(order, device="meta")
        return list(node.target(probe, *node.args[1:], **node.kwargs).shape)

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The same terms in another order."""
        terms = ax.terms(node.args[0])
        return tuple(terms[i] for i in self.order(node, len(terms)))

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """The same values in another order."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return tuple(flow.value(source, i) for i in self.order(node, flow.rank(source)))


class Unsqueeze(Structural):
    """A new axis of extent 1."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Insert `ONE`."""
        terms = list(ax.terms(node.args[0]))
        terms.insert(argument(node, "dim") % (len(terms) + 1), ONE)
        return tuple(terms)


class Squeeze(Structural):
    """Axes of extent 1 go."""

    @staticmethod
    def dropped(node: fx.Node, terms: Sequence[Term]) -> list[int]:
        """The axes that go."""
        rank = len(terms)
        dims: Any = argument(node, "dim")
        if dims is None:
            dims = range(rank)
        chosen = dims if isinstance(dims, list | tuple | range) else [dims]
        return sorted({d % rank for d in chosen if is_one(terms[d % rank])}) if rank else []

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Keep the terms of the axes that are not squeezed."""
        terms = ax.terms(node.args[0])
        drop = self.dropped(node, terms)
        return tuple(t for i, t in enumerate(terms) if i not in drop)

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """Name the axes, since another may be down to extent 1 now."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dims = self.dropped(node, resize.terms(source))
        edit = resize.edit
        edit.set_target(node, torch.ops.aten.squeeze.dims)
        edit.set_args(node, (source, dims), {})


@dataclass(frozen=True)
class Expand(Structural):
    """``expand``, ``expand_as``, ``broadcast_to``: an axis of extent 1 is repeated.

    Attributes:
        sizes: Name of the size argument; "" where there is none.
    """

    sizes: str = ""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Expanded axes are new, and any of their (equal) indices may go."""
        terms = ax.terms(node.args[0])
        shape = ax.shape(node)
        lead = len(shape) - len(terms)
        out: list[Term] = []
        for axis, extent in enumerate(shape):
            term = terms[axis - lead] if axis >= lead else ONE
            if is_one(term) and not (isinstance(extent, int) and extent == 1):
                term = ax.fresh(extent)
            out.append(term)
        other = argument(node, "other")
        if isinstance(other, fx.Node):
            out = [
                t if is_one(o) else ax.unify(t, o)
                for t, o in zip(out, ax.terms(other), strict=True)
            ]
        return tuple(out)

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """``expand_as`` reads only the shape of its second argument."""
        return from_right(node, flow)

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """The new sizes."""
        if not self.sizes:
            return
        sizes: Any = argument(node, self.sizes)
        new = resize.sizes(node, sizes, resize.terms(node))
        if new != list(sizes):
            resize.edit.set_args(node, *with_arguments(node, {self.sizes: new}))


@dataclass(frozen=True)
class Repeat(Structural):
    """``repeat`` and ``tile``: the copies are an outer factor of their own.

    Attributes:
        repeats: Name of the argument with the numbers of copies.
    """

    repeats: str = "repeats"

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """``repeat x axis``; the number of copies is fixed."""
        repeats: Any = argument(node, self.repeats)
        terms = ax.terms(node.args[0])
        # Only tile may name fewer axes than there are.
        repeats = [1] * (len(terms) - len(repeats)) + list(repeats)
        lead = len(repeats) - len(terms)
        out = []
        for axis, (count, extent) in enumerate(zip(repeats, ax.shape(node), strict=True)):
            term = terms[axis - lead] if axis >= lead else ONE
            if isinstance(count, int) and count == 1:
                out.append(term)
            elif isinstance(count, int) and is_one(term):
                out.append(ax.fresh(count))  # equal copies, of which any may go
            elif isinstance(count, int):
                copies = ax.fresh(count)
                ax.pin(copies, "it numbers the copies of a repeat")
                out.append(ax.solver.product((copies, term)))
            else:
                reason = "it is repeated a dynamic number of times"
                ax.pin(term, reason)
                out.append(ax.fresh(extent))
                ax.pin(out[-1], reason)
        return tuple(out)

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Each axis has what it had before."""
        return from_right(node, flow)

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """The numbers of copies, where those are units."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        repeats: Any = argument(node, self.repeats)
        terms, before = resize.terms(node), resize.terms(source)
        new = list(repeats)
        for place, count in enumerate(repeats):
            axis = place + len(terms) - len(repeats)
            own = axis - len(terms) + len(before)
            if isinstance(count, int) and (own < 0 or is_one(before[own])):
                new[place] = resize.extent(terms[axis])
        if new != list(repeats):
            resize.edit.set_args(node, *with_arguments(node, {self.repeats: new}))


class RepeatInterleave(Structural):
    """``repeat_interleave`` by a number: the copies are an inner factor of their own."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """``axis x repeat``; the number of copies is fixed."""
        repeats, dim = argument(node, "repeats"), argument(node, "dim")
        terms = list(ax.terms(node.args[0]))
        if not isinstance(repeats, int) or dim is None:
            ax.pin_all(terms, "it is repeated by the values of a tensor, or flattened first")
            fresh = tuple(ax.fresh(e) for e in ax.shape(node))
            ax.pin_all(fresh, "it is repeated by the values of a tensor, or flattened first")
            return fresh
        copies = ax.fresh(repeats)
        dim %= len(terms)
        if not is_one(terms[dim]):
            ax.pin(copies, "it numbers the copies of a repeat")
        terms[dim] = ax.solver.product((terms[dim], copies))
        return tuple(terms)

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Each axis has what it had before."""
        if argument(node, "dim") is None:
            return flow.unknown(node)
        return from_right(node, flow)

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """The number of copies, where those are units, and the size that is announced."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        terms, repeats, dim = resize.terms(node), argument(node, "repeats"), argument(node, "dim")
        if not isinstance(repeats, int) or dim is None:
            return
        if not resize.touched(terms[dim]):
            return
        new = {}
        if is_one(resize.terms(source)[dim]):
            new["repeats"] = resize.extent(terms[dim])
        if argument(node, "output_size") is not None:
            new["output_size"] = resize.extent(terms[dim])
        if new:
            resize.edit.set_args(node, *with_arguments(node, new))
