"""Ops that write at places: ``scatter``, ``index_put``, ``slice_scatter``, ``masked_scatter``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from torchlathe.ir.axes.extents import is_static, same
from torchlathe.ir.axes.inference import is_one
from torchlathe.ir.axes.rule import (
    UNKNOWN,
    ZERO,
    Layout,
    Rule,
    Terms,
    Value,
    Values,
    argument,
    join,
    with_arguments,
)
from torchlathe.ir.axes.rules.indexing import Places
from torchlathe.ir.axes.rules.slicing import Slice

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference
    from torchlathe.ir.axes.resize import Resize

__all__ = ["IndexPut", "MaskedScatter", "Scatter", "SelectScatter", "SliceScatter"]

WRITTEN = "the values of a tensor say which of its indices are written to"
PLACES = "its entries say where to write"


def merged(values: list[Value | None], *, adds: bool = False) -> Value:
    """What is left where some elements are kept, and others written over or added to."""
    if any(v is None for v in values):
        return UNKNOWN
    known = [v for v in values if v is not None]
    if adds:
        return ZERO if all(v.is_zero for v in known) else UNKNOWN
    return join(known)


@dataclass(frozen=True)
class Scatter(Rule):
    """``scatter``, ``index_add`` and their like: written to along one axis.

    Attributes:
        source: Name of what is written; it may be a number instead (``value``).
        whole: Whether the index is a vector, so that the other axes are written to as a whole.
        adds: Whether what is written is combined with what is there.
    """

    source: str = "src"
    whole: bool = False
    adds: bool = False

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The axis that is written to is fixed; the others are shared by all operands."""
        terms = ax.terms(node.args[0])
        index = ax.terms(argument(node, "index"))
        source = argument(node, self.source)
        dim = argument(node, "dim") % max(1, len(terms))
        written = ax.terms(source) if isinstance(source, fx.Node) else ()
        if terms:
            ax.pin(terms[dim], WRITTEN)
        if self.whole or not index:
            ax.pin_all(index, PLACES)
        else:
            self._share(ax, terms, index, dim)
        if len(written) == len(terms):
            self._share(ax, terms, written, dim)
        return terms

    @staticmethod
    def _share(ax: Inference, terms: Any, others: Any, dim: int) -> None:
        for axis, (term, own) in enumerate(zip(terms, others, strict=True)):
            if axis == dim:
                ax.pin(own, PLACES)
            elif same(term.extent, own.extent):
                ax.unify(term, own)
            else:
                ax.pin_all((term, own), "only the first indices of it are written")

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Along the axes that pass, what was there and what is written."""
        kept, source = node.args[0], argument(node, self.source)
        assert isinstance(kept, fx.Node)
        out: list[Value | None] = []
        for axis in range(flow.rank(node)):
            value = flow.value(kept, axis)
            if value is None:
                out.append(None)
                continue
            written: Value | None = None
            if isinstance(source, fx.Node):
                if flow.rank(source) == flow.rank(node):
                    written = flow.value(source, axis)
            elif isinstance(number := argument(node, "value"), int | float):
                written = Value(float(number))
            out.append(merged([value, written], adds=self._adds(node)))
        return tuple(out)

    def _adds(self, node: fx.Node) -> bool:
        return self.adds or argument(node, "reduce") is not None


class IndexPut(Rule):
    """``x[i, :, j] = values``: the indexed axes are fixed, the others are shared."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The values have the axes that ``x[i, :, j]`` has, under broadcasting."""
        terms = ax.terms(node.args[0])
        places = Places.of(node, ax)
        expected: list[Any] = [terms[axis] for axis in places.rest]
        expected[places.at : places.at] = places.index
        for index in argument(node, "indices"):
            if index is not None:
                ax.pin_all(ax.terms(index), PLACES)
        values = ax.terms(argument(node, "values"))
        lead = len(expected) - len(values)
        for axis, own in enumerate(values):
            term = expected[axis + lead] if axis + lead >= 0 else None
            if term is None:
                ax.pin(own, PLACES)
            elif not is_one(own):
                ax.unify(term, own)
        # Where the axes stand among the values, which the flow has to know.
        moved = dict(zip(places.rest, places.result_axes(), strict=True))
        layout = Layout(letters={f"{a}:{moved[a] - lead}": terms[a] for a in places.rest})
        ax.layouts[node] = layout
        return terms

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Along the axes that pass, what was there and what is written."""
        kept, values = node.args[0], argument(node, "values")
        assert isinstance(kept, fx.Node)
        found = [flow.value(kept, axis) for axis in range(flow.rank(node))]
        out = [None if v is None else UNKNOWN for v in found]
        for name in flow.letters(node):
            axis, place = map(int, name.split(":"))
            written = flow.value(values, place) if 0 <= place < flow.rank(values) else None
            adds = bool(argument(node, "accumulate", False))
            out[axis] = merged([found[axis], written], adds=adds)
        return tuple(out)


class SliceScatter(Slice):
    """``slice_scatter``: a piece of an axis is written over."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The piece between the bounds is the axis of what is written."""
        terms, source = ax.terms(node.args[0]), ax.terms(argument(node, "src"))
        dim = argument(node, "dim", 0) % len(terms)
        for axis, (term, own) in enumerate(zip(terms, source, strict=True)):
            if axis != dim:
                ax.unify(term, own)
        term = terms[dim]
        if same(term.extent, source[dim].extent):
            ax.unify(term, source[dim])
            return terms
        bounds = self._bounds(node, term)
        if bounds is None or argument(node, "step", 1) != 1 or bounds[0] == bounds[1]:
            ax.pin_all((term, source[dim]), "single indices of it are written to")
            return terms
        start, end = bounds
        if start > 0:
            _, term = ax.cut(term, start)
        if end < terms[dim].extent:
            term, _ = ax.cut(term, end - start)
        ax.unify(term, source[dim])
        return terms

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """What was there and what is written."""
        kept, source = node.args[0], argument(node, "src")
        assert isinstance(kept, fx.Node)
        dim = argument(node, "dim", 0) % flow.rank(node)
        out: list[Value | None] = []
        for axis in range(flow.rank(node)):
            value, written = flow.value(kept, axis), flow.value(source, axis)
            if value is None or (axis == dim and written is None):
                out.append(value)
            else:
                out.append(merged([value, written]))
        return tuple(out)

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """Bounds move with what is left before them."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        terms = resize.terms(source)
        term = terms[argument(node, "dim", 0) % len(terms)]
        bounds = self._bounds(node, term)
        if resize.touched(term) and bounds is not None:
            start, end = (resize.position(term, b) for b in bounds)
            resize.edit.set_args(node, *with_arguments(node, {"start": start, "end": end}))


class SelectScatter(Rule):
    """``select_scatter`` and ``diagonal_scatter``: single indices are written to."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The axis that is written to is fixed; the others are those of what is written."""
        terms = ax.terms(node.args[0])
        rank = len(terms)
        names = ("dim",) if _has(node, "dim") else ("dim1", "dim2")
        chosen = [argument(node, name) % rank for name in names]
        ax.pin_all([terms[d] for d in chosen], "single indices of it are written to")
        rest = [t for axis, t in enumerate(terms) if axis not in chosen]
        source = ax.terms(argument(node, "src"))
        for term, own in zip(rest, source, strict=False):
            ax.unify(term, own)
        ax.pin_all(source[len(rest) :], "it is written along a diagonal")
        return terms

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """What was there and what is written."""
        kept, source = node.args[0], argument(node, "src")
        assert isinstance(kept, fx.Node)
        written: list[Value | None] = list(flow.values(source))
        return tuple(
            None if v is None else merged([v, *(written or [None])])
            for v in (flow.value(kept, axis) for axis in range(flow.rank(node)))
        )


def _has(node: fx.Node, name: str) -> bool:
    return any(a.name == name for a in node.target._schema.arguments)  # type: ignore[union-attr]


class MaskedScatter(Rule):
    """``masked_scatter``: values in order, wherever a mask is true.

    Where the mask is the same along the last axes, whole rows are written, and those axes pass. So
    do multimodal models put the embeddings of images between those of text.
    """

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The last axes along which the mask is expanded are those of the values too."""
        kept, mask, source = node.args[:3]
        assert isinstance(mask, fx.Node)
        terms, own, values = ax.terms(kept), ax.terms(mask), ax.terms(source)
        rows = 0
        inner: Any = 1
        while rows < min(len(terms), len(values)) and self._passes(
            terms[-1 - rows], mask, -1 - rows, values[-1 - rows]
        ):
            inner = inner * terms[-1 - rows].extent
            rows += 1
        for axis in range(1, rows + 1):
            ax.unify(terms[-axis], values[-axis])
        reason = "its indices are filled in order, wherever a mask is true"
        for tensor in (terms, own, values):
            ax.pin_all(tensor[: max(0, len(tensor) - rows)], reason)
        ax.broadcast([terms, own], len(terms))
        return terms

    @staticmethod
    def _passes(term: Any, mask: fx.Node, axis: int, value: Any) -> bool:
        fits = is_static(term.extent) and same(term.extent, value.extent)
        return fits and constant_along(mask, axis)

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """What was there and what is written."""
        kept, _, source = node.args[:3]
        assert isinstance(kept, fx.Node)
        assert isinstance(source, fx.Node)
        rank, lead = flow.rank(node), flow.rank(node) - flow.rank(source)
        out: list[Value | None] = []
        for axis in range(rank):
            value = flow.value(kept, axis)
            written = flow.value(source, axis - lead) if axis >= lead else None
            known = None if value is None else merged([value, written])
            out.append(known)
        return tuple(out)


_ALONG = frozenset(
    f"aten::{name}"
    for name in (
        *("expand", "expand_as", "broadcast_to", "to", "_to_copy", "clone", "contiguous", "detach"),
        *("logical_not", "logical_and", "logical_or", "bitwise_and", "bitwise_or", "bitwise_not"),
        *("__and__", "__or__", "eq", "ne"),
    )
)


def constant_along(node: fx.Node, axis: int) -> bool:
    """Whether a tensor is plainly the same along an axis (counted from the end, below zero).

    It was expanded there, or is elementwise of tensors that were.
    """
    value = node.meta["val"]
    if -axis > value.dim() or (isinstance(value.shape[axis], int) and value.shape[axis] == 1):
        return True
    name = getattr(getattr(node.target, "_schema", None), "name", "")
    if name in ("aten::expand_as", "aten::_to_copy", "aten::to"):
        return constant_along(node.all_input_nodes[0], axis)
    if name in _ALONG:
        operands = [a for a in node.args if isinstance(a, fx.Node)]
        if name in ("aten::expand", "aten::broadcast_to"):
            operands = operands[:1]
        return all(constant_along(used, axis) for used in operands)
    if name == "aten::unsqueeze":
        new = argument(node, "dim") % value.dim() - value.dim()
        return constant_along(node.all_input_nodes[0], axis + (1 if new > axis else 0))
    return False
