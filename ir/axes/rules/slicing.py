"""Ops that cut and join along an axis, or pick from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torchlathe.ir.axes.extents import divide, is_static, same
from torchlathe.ir.axes.rule import Rule, Terms, Values, argument, with_arguments
from torchlathe.ir.axes.rules.shaping import Structural, zeros_or_unknown
from torchlathe.ir.axes.terms import Term
from torchlathe.ir.extents import expression

if TYPE_CHECKING:
    from torchlathe.ir.axes.flow import Flow
    from torchlathe.ir.axes.inference import Inference
    from torchlathe.ir.axes.resize import Resize

__all__ = [
    "Cat",
    "GatedHalves",
    "GetItem",
    "Index",
    "Narrow",
    "Pad",
    "PinnedAxis",
    "Select",
    "Slice",
    "Split",
    "Stack",
]

_SPLIT = torch.ops.aten.split_with_sizes.default


class Slice(Structural):
    """``slice``: cuts an axis at its bounds."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The piece between the bounds; with a step, the outer factor of it."""
        terms = list(ax.terms(node.args[0]))
        dim = argument(node, "dim", 0) % len(terms)
        term = terms[dim]
        result = ax.shape(node)[dim]
        if same(result, term.extent):
            return tuple(terms)
        if same(result, 0):
            terms[dim] = ax.fresh(0)
            return tuple(terms)
        bounds = self._bounds(node, term)
        if bounds is None or not is_static(term.extent):
            ax.pin(term, "it is cut at a dynamic position")
            terms[dim] = ax.fresh(result)
            ax.pin(terms[dim], "it is cut at a dynamic position")
            return tuple(terms)
        start, end = bounds
        step = argument(node, "step", 1)
        if start > 0:
            _, term = ax.cut(term, start)
        if end < terms[dim].extent:
            term, _ = ax.cut(term, end - start)
        if step != 1:
            if divide(end - start, step) is None:
                ax.pin(term, f"every {step}th index of it is taken")
                term = ax.fresh(result)
                ax.pin(term, "it was taken from another axis with a step")
            else:
                term, inner = ax.split(term, step)
                ax.pin(inner, f"every {step}th index of it is taken")
        terms[dim] = term
        return tuple(terms)

    @staticmethod
    def _bounds(node: fx.Node, term: Term) -> tuple[int, int] | None:
        start, end = argument(node, "start"), argument(node, "end")
        start = 0 if start is None else start
        extent = term.extent
        if not is_static(extent):
            return None
        end = extent if end is None else end
        if not (isinstance(start, int) and isinstance(end, int)):
            return None
        start = max(0, start + extent if start < 0 else min(start, extent))
        end = max(start, end + extent if end < 0 else min(end, extent))
        return start, end

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """Bounds move with what is left before them."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        terms = resize.terms(source)
        dim = argument(node, "dim", 0) % len(terms)
        term = terms[dim]
        if not resize.touched(term) or same(term.extent, resize.terms(node)[dim].extent):
            return
        bounds = self._bounds(node, term)
        assert bounds is not None, "a touched axis is static"
        start, end = (resize.position(term, b) for b in bounds)
        resize.edit.set_args(node, *with_arguments(node, self._moved(node, start, end)))

    def _moved(self, node: fx.Node, start: int, end: int) -> dict[str, int]:
        """New bounds as arguments."""
        return {"start": start, "end": end}


class Narrow(Slice):
    """``narrow``: a slice by its start and length."""

    @staticmethod
    def _bounds(node: fx.Node, term: Term) -> tuple[int, int] | None:
        start, length = argument(node, "start"), argument(node, "length")
        extent = term.extent
        if not (isinstance(start, int) and isinstance(length, int) and is_static(extent)):
            return None
        start = start + extent if start < 0 else start
        return start, start + length

    def _moved(self, node: fx.Node, start: int, end: int) -> dict[str, int]:
        return {"start": start, "length": end - start}


class GatedHalves(Structural):
    """``glu``: the first half of an axis times the sigmoid of the second."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The halves are the same indices, once as values and once as gates."""
        terms = list(ax.terms(node.args[0]))
        dim = argument(node, "dim", -1) % len(terms)
        half = divide(terms[dim].extent, 2)
        values, gates = ax.cut(terms[dim], half)
        terms[dim] = ax.unify(values, gates)
        return tuple(terms)

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """A value of zero stays zero whatever its gate."""
        return zeros_or_unknown(node, flow)


class Select(Structural):
    """``select``: takes one index, so the axis stays as it is."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The other axes."""
        terms = list(ax.terms(node.args[0]))
        dim = argument(node, "dim", 0) % len(terms)
        ax.pin(terms.pop(dim), "single indices of it are taken")
        return tuple(terms)


class Split(Structural):
    """``split``, ``chunk``, ``split_with_sizes``, ``tensor_split``, ``unbind``."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """One piece of the axis for each result."""
        terms = list(ax.terms(node.args[0]))
        dim = argument(node, "dim", 0) % len(terms)
        values = node.meta["val"]
        if node.target._schema.name == "aten::unbind":  # type: ignore[union-attr]
            ax.pin(terms.pop(dim), "single indices of it are taken")
            return [tuple(terms) for _ in values]
        rest = terms[dim]
        results: list[tuple[Term, ...] | None] = []
        for value in values[:-1]:
            piece, rest = ax.cut(rest, expression(value.shape[dim]))
            results.append((*terms[:dim], piece, *terms[dim + 1 :]))
        results.append((*terms[:dim], rest, *terms[dim + 1 :]))
        return results

    def resize(self, node: fx.Node, resize: Resize) -> None:
        """Sizes of the pieces, which need not be equal any more."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if node.target._schema.name == "aten::unbind":  # type: ignore[union-attr]
            return
        terms = resize.terms(source)
        dim = argument(node, "dim", 0) % len(terms)
        if not resize.touched(terms[dim]):
            return
        sizes = [resize.extent(r[dim]) for r in resize.axis_map.results(node) if r is not None]
        if node.target is not _SPLIT:
            resize.edit.set_target(node, _SPLIT)
        resize.edit.set_args(node, (source, sizes, dim), {})


class GetItem(Rule):
    """One result of an op with several."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The terms of that result."""
        source, index = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        return ax.results(source)[index] or ()

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """The values of that result."""
        source, index = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(index, int)
        return flow.result_values(source, index)


class Cat(Structural):
    """``cat``: concatenates along one axis, and unifies the others."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The concatenation of the pieces."""
        sources: Any = node.args[0]
        rank = node.meta["val"].dim()
        # Legacy: empty one-dimensional tensors are skipped by the op.
        rows = [t for s in sources if len(t := ax.terms(s)) == rank]
        dim = argument(node, "dim", 0) % rank
        out: list[Term] = []
        for axis in range(rank):
            terms = [row[axis] for row in rows]
            if axis == dim:
                out.append(ax.solver.concat(terms))
                continue
            for other in terms[1:]:
                ax.unify(terms[0], other)
            out.append(terms[0])
        return tuple(out)


class Stack(Structural):
    """``stack``: a new axis whose indices are the operands."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The operands' common terms with a fixed new axis."""
        sources: Any = node.args[0]
        rows = [ax.terms(s) for s in sources]
        dim = argument(node, "dim", 0) % (len(rows[0]) + 1)
        out = []
        for terms in zip(*rows, strict=True):
            for other in terms[1:]:
                ax.unify(terms[0], other)
            out.append(terms[0])
        new = ax.fresh(len(rows))
        ax.pin(new, "its indices are the operands of a stack")
        out.insert(dim, new)
        return tuple(out)


class PinnedAxis(Structural):
    """Ops that depend on the order of the indices along some axes: ``roll``, ``flip``, ``sort``.

    All other axes pass through.
    """

    def __init__(self, names: tuple[str, ...], reason: str) -> None:
        self.names = names
        self.reason = reason

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """The same terms, some of them pinned."""
        terms = ax.terms(node.args[0])
        dims: list[int] = []
        for name in self.names:
            found: Any = argument(node, name)
            dims += found if isinstance(found, list | tuple) else [] if found is None else [found]
        chosen = {d % len(terms) for d in dims} if dims else set(range(len(terms)))
        ax.pin_all([terms[d] for d in chosen], self.reason)
        values = node.meta["val"]
        if isinstance(values, torch.Tensor):
            return self._result(ax, terms, values, chosen)
        return [self._result(ax, terms, v, chosen) for v in values]

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Values change places; what ``sort`` and its like say about places is not known."""
        values = node.meta["val"]
        moved, unknown = flow.structural(node), flow.unknown(node)
        if isinstance(values, torch.Tensor):
            return moved if values.dtype == node.args[0].meta["val"].dtype else unknown  # type: ignore[union-attr]
        return [moved[0], *unknown[1:]]

    def _result(
        self, ax: Inference, terms: tuple[Term, ...], value: torch.Tensor, chosen: set[int]
    ) -> tuple[Term, ...]:
        """Axes that changed their extent (``topk``) are new and fixed."""
        out = []
        for axis, (term, dim) in enumerate(zip(terms, value.shape, strict=True)):
            if axis in chosen and not same(expression(dim), term.extent):
                term = ax.fresh(dim)
                ax.pin(term, self.reason)
            out.append(term)
        return tuple(out)


class Pad(Structural):
    """``pad``: padded axes are fixed."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Axes that change are new and fixed; the others pass through."""
        out = []
        for term, extent in zip(ax.terms(node.args[0]), ax.shape(node), strict=True):
            if same(term.extent, extent):
                out.append(term)
                continue
            ax.pin(term, "it is padded")
            new = ax.fresh(extent)
            ax.pin(new, "it is padded")
            out.append(new)
        return tuple(out)

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """Along another axis, padding a zero with zeros gives zeros."""
        if argument(node, "value") in (None, 0, 0.0):
            return zeros_or_unknown(node, flow)
        return flow.unknown(node)


class Index(Structural):
    """``x[i, :, j]`` with index tensors: the indexed axes are fixed, the others pass through."""

    def infer(self, node: fx.Node, ax: Inference) -> Terms:
        """Index axes broadcast and stand where the first of them was, or in front."""
        terms = ax.terms(node.args[0])
        indices: Any = list(argument(node, "indices"))
        rank = len(terms)
        if any(i is not None and i.meta["val"].dtype == torch.bool for i in indices):
            ax.pin_all(terms, "it is indexed by a mask")
            fresh = ax.fresh_results(node)
            assert isinstance(fresh, tuple)
            ax.pin_all(fresh, "it is indexed by a mask")
            return fresh
        indices += [None] * (rank - len(indices))
        places = [axis for axis, i in enumerate(indices) if i is not None]
        ax.pin_all([terms[axis] for axis in places], "it is indexed by the values of a tensor")
        rows = [ax.terms(i) for i in indices if i is not None]
        index_terms = ax.broadcast(rows, max(len(row) for row in rows))
        rest = [t for axis, t in enumerate(terms) if indices[axis] is None]
        together = places == list(range(places[0], places[-1] + 1))
        at = places[0] if together else 0
        return (*rest[:at], *index_terms, *rest[at:])

    def flow(self, node: fx.Node, flow: Flow) -> Values:
        """What is picked from; the index tensors hold positions, not values."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        values = flow.values(source)
        unknown = flow.unknown(node)
        assert isinstance(unknown, tuple)
        if len(values) != 1:
            return unknown
        return tuple(None if v is None else values[0] for v in unknown)
